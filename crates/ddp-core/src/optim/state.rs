//! What an optimizer keeps of the elements that this rank updates: its rule's state, f32 masters of parameters in
//! half precision, and directions where norms of whole parameters decide.

use tch::{Kind, Tensor};

use super::piece::{self, Owned, Run};
use super::rule::{Rule, Runs};
use crate::shim::Variable;
use crate::store::flat::Flat;
use crate::store::{norm, Held, Store};
use crate::Result;

/// Of one storage.
#[derive(Debug)]
pub(super) struct Part {
    pub(super) states: Vec<Flat>,
    pub(super) masters: Option<Flat>,
    directions: Option<Flat>,
}

/// Of all storages.
#[derive(Debug)]
pub(super) struct State {
    pub(super) parts: Vec<Part>,
    /// The variables when masters were last read from them; else empty.
    seen: Vec<Variable>,
}

impl State {
    pub(super) fn new(store: &Store, rule: &dyn Rule) -> Result<Self> {
        let mut state = Self { parts: Vec::new(), seen: Vec::new() };
        state.fit(store, rule, true)?;
        Ok(state)
    }

    /// Allocates what the present plan needs: all of it `anew`, or that of storages that were added.
    pub(super) fn fit(&mut self, store: &Store, rule: &dyn Rule, anew: bool) -> Result<()> {
        if anew {
            self.parts.clear();
        }
        for bucket in &store.plan.buckets[self.parts.len()..] {
            let (storage, len) =
                (&store.storages[bucket.storage], store.sharding.segment(bucket).len());
            let (kind, device) = (storage.parameters.kind(), store.device());
            let flat = || Flat::private(work_kind(kind), device, len);
            let states = rule.states().iter().map(|_| flat());
            self.parts.push(Part {
                states: states.collect::<Result<_>>()?,
                masters: (work_kind(kind) != kind).then(flat).transpose()?,
                directions: rule.trust_ratio().map(|_| flat()).transpose()?,
            });
        }
        self.seen.clear();
        self.heed_masters(store)
    }

    /// Masters are right as they are: they were read together with the parameters.
    pub(super) fn believe_masters(&mut self, store: &Store) -> Result<()> {
        if self.parts.iter().any(|part| part.masters.is_some()) {
            self.seen = store.model.states()?;
        }
        Ok(())
    }

    /// Reads masters anew where parameters were changed by somebody else: weights were loaded.
    pub(super) fn heed_masters(&mut self, store: &Store) -> Result<()> {
        if self.parts.iter().all(|part| part.masters.is_none()) {
            return Ok(());
        }
        let now = store.model.states()?;
        let is_same = now.len() == self.seen.len()
            && now.iter().zip(&self.seen).all(|(now, seen)| now.version == seen.version);
        self.seen = now;
        if is_same {
            return Ok(());
        }
        for bucket in &store.plan.buckets {
            let segment = store.sharding.segment(bucket);
            let Some(masters) = &self.parts[bucket.storage].masters else { continue };
            let own = 0..segment.len();
            let (memory, range) = store.storages[bucket.storage].parameters.at(&segment, &own);
            let parameters = memory.range(&range)?;
            let mut target = masters.range(&own)?;
            // Only where a master does not round to its parameter: weights that were taken out and put back are the same.
            let rounds_to_it = target.f_to_kind(parameters.kind())?.f_eq_tensor(&parameters)?;
            let heeded =
                target.f_where_self(&rounds_to_it, &parameters.f_to_kind(target.kind())?)?;
            tch::no_grad(|| target.f_copy_(&heeded).map(drop))?;
        }
        Ok(())
    }

    /// The tensors of `runs` of one storage, in the kind that the rule works in.
    pub(super) fn runs(&self, store: &Store, storage: usize, runs: &[&Run]) -> Result<Runs> {
        let (part, memory) = (&self.parts[storage], &store.storages[storage]);
        let kind = work_kind(memory.parameters.kind());
        let mut all =
            Runs { states: part.states.iter().map(|_| Vec::new()).collect(), ..Runs::default() };
        for run in runs {
            all.parameters.push(match &part.masters {
                Some(masters) => masters.range(&run.state)?,
                None => taken(&memory.parameters, run)?,
            });
            // The same tensor where the kind is the same.
            all.gradients.push(taken(&memory.gradients, run)?.f_to_kind(kind)?);
            for (list, state) in all.states.iter_mut().zip(&part.states) {
                list.push(state.range(&run.state)?);
            }
            if let Some(directions) = &part.directions {
                all.directions.push(directions.range(&run.state)?);
            }
        }
        Ok(all)
    }

    /// Rounds a bucket's updated masters to its parameters.
    pub(super) fn write_back(&self, store: &Store, owned: &Owned) -> Result<()> {
        let Some(masters) = &self.parts[owned.storage].masters else { return Ok(()) };
        for run in &owned.runs {
            let mut parameters = taken(&store.storages[owned.storage].parameters, run)?;
            let updated = masters.range(&run.state)?;
            tch::no_grad(|| parameters.f_copy_(&updated).map(drop))?;
        }
        Ok(())
    }

    /// The directions of this rank's pieces, by parameter.
    pub(super) fn direction_parts<'a>(&'a self, owned: &[Owned]) -> Vec<norm::Part<'a>> {
        let of = |(storage, piece): (usize, &piece::Piece)| {
            let memory = self.parts[storage].directions.as_ref()?;
            Some(norm::Part { memory, range: piece.run.state.clone(), sum: piece.parameter })
        };
        super::pieces(owned).filter_map(of).collect()
    }
}

/// The elements of a run.
fn taken(memory: &Held, run: &Run) -> Result<Tensor> {
    let (flat, range) = memory.at(&run.range, &run.state);
    flat.range(&range)
}

/// The kind in which a rule works.
fn work_kind(kind: Kind) -> Kind {
    match kind {
        Kind::Half | Kind::BFloat16 => Kind::Float,
        other => other,
    }
}
