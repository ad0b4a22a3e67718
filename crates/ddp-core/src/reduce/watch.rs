//! Is the model still what was wrapped? Checked when a backward begins. A change of which
//! parameters train is followed; any other change is an error.

use super::Reducer;
use crate::shim::{self, GradientPlace, Variable};
use crate::store::{agree, model};
use crate::{Error, Result};

impl Reducer {
    /// The variables as they are, if they are what was wrapped. Gradients that accumulated and were
    /// released since are forgotten.
    pub(super) fn looked_at(&mut self) -> Result<Vec<Variable>> {
        let mut now = self.store.inspect()?;
        self.heed_zeroed(&mut now)?;
        if !self.accumulated.pending.contains(&true) {
            return Ok(now);
        }
        let samples = self.store.samples();
        let known = &self.accumulated.samples;
        let is_other =
            |slot: usize| known.get(slot).is_some_and(|known| samples.get(slot) != Some(known));
        let mut is_pending = false;
        let mut stepped = None;
        for (variable, state) in now.iter().enumerate() {
            let Some(slot) = self.store.model.slot(variable) else { continue };
            let is_gone = state.has_gradient == 0 && !self.shards_accumulation();
            if self.accumulated.pending[slot] && is_gone {
                self.accumulated.pending[slot] = false;
            }
            is_pending |= self.accumulated.pending[slot];
            let before = self.accumulated.states.get(variable);
            let is_changed = before.is_some_and(|before| before.version != state.version);
            if is_changed || is_other(slot) {
                stepped = stepped.or(Some(variable));
            }
        }
        if !is_pending {
            // Gradients are gone, a step on them is not: the ranks compare parameters in the next exchange.
            self.is_suspect |= stepped.is_some();
            self.accumulated.weight = 0.0;
            self.accumulated.is_weighted = false;
            return Ok(now);
        }
        match stepped {
            Some(variable) => Err(Error::SteppedOnLocalGradients {
                name: self.store.model.variables[variable].name.clone(),
            }),
            None => Ok(now),
        }
    }

    /// Gradients that were zeroed in place (`Tensor::zero_grad`) count as released.
    fn heed_zeroed(&mut self, now: &mut [Variable]) -> Result<()> {
        if !now.iter().any(|state| state.has_gradient != 0) {
            return Ok(());
        }
        let versions = self.store.gradient_versions()?;
        for (variable, state) in now.iter_mut().enumerate() {
            let Some(slot) = self.store.model.slot(variable) else { continue };
            let is_touched = self.accumulated.views.get(slot).is_some_and(|&v| v != versions[slot]);
            if state.has_gradient == 0 || !is_touched {
                continue;
            }
            let tensor = &self.store.model.variables[variable].tensor;
            let Some(view) = self.store.gradient(slot)? else { continue };
            let is_here = shim::gradient_place(tensor, &view)? == GradientPlace::InView;
            if is_here && view.f_count_nonzero(None)?.f_int64_value(&[])? == 0 {
                shim::gradient_set(tensor, None)?;
                state.has_gradient = 0;
            }
        }
        Ok(())
    }

    /// Ranks compare which variables train; those that begin to are laid flat, those that ended are taken
    /// out. Collective on every rank that sees the change.
    pub(super) fn agree_on_what_trains(&mut self, trains: Vec<bool>) -> Result<()> {
        self.check_frozen(&trains)?;
        self.store.meet()?;
        let line = |(named, &on): (&model::Named, &bool)| {
            format!("{} {}", if on { "trains" } else { "frozen" }, named.name)
        };
        let mut signature = vec![String::from("which variables train")];
        signature.extend(self.store.model.variables.iter().zip(&trains).map(line));
        let tag = "a change of which variables train";
        agree::alike(&mut self.store.group, tag, "which variables train", &signature)?;
        for (variable, _) in trains.iter().enumerate().filter(|(_, &trains)| !trains) {
            if let Some(slot) = self.store.model.slot(variable).filter(|_| self.agreed[variable]) {
                self.retire(slot)?;
            }
        }
        self.agreed = trains;
        self.store.adopt(&self.options)?;
        if let Some(local) = &mut self.local {
            local.follow(&self.store)?;
        }
        self.fit()?;
        self.counts = None; // a static graph is counted anew
        Ok(())
    }

    /// Gradients of a parameter that is frozen are not exchanged any more, so none may wait for it.
    fn check_frozen(&self, trains: &[bool]) -> Result<()> {
        let holds = |variable: usize| {
            self.store.model.slot(variable).is_some_and(|slot| self.accumulated.pending[slot])
        };
        match (0..trains.len()).find(|&variable| !trains[variable] && holds(variable)) {
            Some(variable) => Err(Error::FrozenWithGradients { name: self.name_of(variable) }),
            None => Ok(()),
        }
    }

    /// A parameter trains no more: what gradient it has stays, outside of the exchange.
    fn retire(&mut self, slot: usize) -> Result<()> {
        let variable = &self.store.model.parameter(slot).tensor;
        let Some(view) = self.store.view(slot) else { return Ok(()) };
        if shim::gradient_place(variable, view)? == GradientPlace::InView {
            let mut kept = view.f_zeros_like()?;
            tch::no_grad(|| kept.f_copy_(view).map(drop))?;
            shim::gradient_set(variable, Some(&kept))?;
        }
        self.store.zero_view(slot)
    }

    /// Whether a parameter trains.
    pub(super) fn trains(&self, slot: usize) -> bool {
        self.agreed[self.store.model.variable_of(slot)]
    }
}
