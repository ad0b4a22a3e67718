//! An optimizer as a checkpoint has it: its tensors by parameter, whatever the stage, and its numbers.
//!
//! A parameter's state is a tensor of the parameter's shape. Sharded or not, a rank holds ranges of it, in the order of the
//! parameter's memory, which is that of the flat storage: so any stage on any number of ranks reads what another one wrote.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::piece::Piece;
use super::rule::Whole;
use super::whole::Wholes;
use super::{Optimizer, RuleState};
use crate::checkpoint::held::{Held, HeldPart};
use crate::store::Store;
use crate::Result;

/// What an optimizer is beside its tensors.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Numbers {
    /// The rule's name.
    rule: String,
    lr: f64,
    step_count: u64,
    /// By parameter: how often it was updated, where that is not `step_count`.
    steps: BTreeMap<String, u64>,
}

impl Optimizer {
    /// Its numbers.
    pub(crate) fn numbers(&self, store: &Store) -> Numbers {
        let treated = store.model.parameters().zip(&self.parameters);
        let others = treated.filter(|(_, treatment)| treatment.step != self.step_count);
        Numbers {
            rule: self.rule.name().to_owned(),
            lr: self.lr,
            step_count: self.step_count,
            steps: others.map(|(named, treatment)| (named.name.clone(), treatment.step)).collect(),
        }
    }

    /// Its tensors, as far as this rank has them.
    pub(crate) fn held(&mut self, store: &mut Store) -> Result<Vec<Held>> {
        self.fit(store)?;
        let owned = self.everything(store);
        let mut pieces: Vec<Vec<&Piece>> = vec![Vec::new(); self.parameters.len()];
        for piece in owned.iter().flat_map(|of_bucket| &of_bucket.pieces) {
            pieces[piece.parameter].push(piece);
        }
        let mut all = Vec::new();
        let of_whole = self.rule.whole().map_or(&[][..], Whole::states);
        for (parameter, own) in pieces.iter().enumerate() {
            let is_whole = self.parameters[parameter].is_whole;
            let states = if is_whole { of_whole } else { self.rule.states() };
            let of = (parameter, is_whole);
            all.extend(self.state.held(store, of, (states, own))?);
        }
        if let Some(wholes) = &self.wholes {
            all.extend(wholes.held(store)?);
        }
        Ok(all)
    }

    /// Lets go of what it has come to: a checkpoint's takes its place, at places that may be others.
    pub(crate) fn forget(&mut self) {
        self.step_count = 0;
    }

    /// Takes the numbers of a checkpoint over; its tensors were read already.
    pub(crate) fn go_on(&mut self, store: &mut Store, numbers: &Numbers) -> Result<()> {
        self.lr = numbers.lr;
        self.step_count = numbers.step_count;
        for (named, treatment) in store.model.parameters().zip(&mut self.parameters) {
            treatment.step = numbers.step_of(&named.name);
        }
        store.optimizer.steps = numbers.step_count;
        store.optimizer.lr = numbers.lr;
        self.state.believe_masters(store)
    }

    /// A line where a checkpoint is of another rule.
    pub(crate) fn misfit(&self, numbers: &Numbers) -> Option<String> {
        let (then, now) = (&numbers.rule, self.rule.name());
        (then != now).then(|| format!("  the optimizer: {then}, here it is {now}\n"))
    }
}

impl Numbers {
    /// Takes in how often parameters of another part of the model were updated.
    pub(crate) fn take_in(&mut self, other: &Self) {
        self.steps.extend(other.steps.iter().map(|(name, step)| (name.clone(), *step)));
    }

    fn step_of(&self, parameter: &str) -> u64 {
        self.steps.get(parameter).copied().unwrap_or(self.step_count)
    }
}

impl RuleState {
    /// What is kept of one parameter.
    fn held(
        &self,
        store: &Store,
        (parameter, is_whole): (usize, bool),
        (states, pieces): (&[&str], &[&Piece]),
    ) -> Result<Vec<Held>> {
        let named = store.model.parameter(parameter);
        let place = &store.plan.places[parameter];
        let part = &self.parts[place.storage][usize::from(is_whole)];
        let flats = states.iter().copied().zip(&part.states);
        let masters = part.masters.as_ref().map(|masters| ("master", masters));
        let mut all = Vec::new();
        for (state, flat) in flats.chain(masters) {
            let name = format!("optimizer/{state}/{}", named.name);
            let (shape, strides) = (named.tensor.size(), named.tensor.stride());
            let mut held = Held::like(name, flat.kind(), (&shape, &strides))?;
            for piece in pieces {
                // Without the padding behind the parameter.
                let end = piece.run.range.end.min(place.range.end);
                let len = end - piece.run.range.start;
                let start = piece.run.range.start - place.range.start;
                held.parts.push(HeldPart {
                    range: start as u64..(start + len) as u64,
                    memory: flat.range(&(piece.run.state.start..piece.run.state.start + len))?,
                });
            }
            all.push(held);
        }
        Ok(all)
    }
}

impl Wholes {
    /// What owners keep of parameters that are taken whole.
    fn held(&self, store: &Store) -> Result<Vec<Held>> {
        let mut all = Vec::new();
        for (parameter, kept) in &self.kept {
            let named = store.model.parameter(*parameter);
            for (state, tensor) in kept {
                all.push(Held::whole(format!("optimizer/{state}/{}", named.name), tensor)?);
            }
        }
        Ok(all)
    }
}
