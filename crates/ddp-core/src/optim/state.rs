//! What an optimizer keeps of the elements that this rank updates: its rule's state, f32 masters of parameters in
//! half precision, and directions where norms of whole parameters decide. Offloaded, all of it is in the host's memory,
//! masters of all parameters included, and gradients are copied there for the step.

use tch::{Device, Kind, Tensor};

use super::piece::{self, Owned, Run};
use super::rule::{Rule, Runs, Whole};
use crate::shim::Variable;
use crate::store::flat::Flat;
use crate::store::{norm, Held, Storage, Store};
use crate::{Error, Result};

/// Of one storage's parameters that are taken by the element, or of those that are taken whole.
#[derive(Debug)]
pub(super) struct StatePart {
    pub(super) states: Vec<Flat>,
    pub(super) masters: Option<Flat>,
    directions: Directions,
}

/// Where directions are.
#[derive(Debug)]
enum Directions {
    /// There are none.
    Nowhere,
    /// In the place of the gradients, which are of the kind that rules work in and are not needed any more.
    Gradients,
    /// In memory of their own, beside the state.
    Own(Flat),
}

/// Of all storages.
#[derive(Debug, Default)]
pub(super) struct RuleState {
    pub(super) parts: Vec<[StatePart; 2]>,
    /// The variables, and the store's renewals, when masters were last read; else empty.
    seen: (Vec<Variable>, u64),
    is_offloaded: bool,
}

/// Where a storage's state is, and in which kind.
#[derive(Clone, Copy, Debug)]
struct Home {
    kind: Kind,
    device: Device,
    is_offloaded: bool,
}

impl RuleState {
    pub(super) fn new(is_offloaded: bool) -> Self {
        Self { is_offloaded, ..Self::default() }
    }

    /// Where rules work.
    pub(super) fn device(&self, store: &Store) -> Device {
        if self.is_offloaded {
            Device::Cpu
        } else {
            store.device()
        }
    }

    /// Allocates what the present plan needs for `everything` that this rank owns: all of it `anew`, or that of
    /// storages that were added.
    pub(super) fn fit(
        &mut self,
        store: &Store,
        rule: &dyn Rule,
        everything: &[Owned],
        anew: bool,
    ) -> Result<()> {
        if anew {
            self.parts.clear();
        }
        let has_ratio = rule.has_trust_ratio();
        let of_whole = rule.whole().map_or(&[][..], Whole::states);
        let lens = piece::state_lens(everything, store.storages.len());
        for (storage, len) in store.storages.iter().zip(lens).skip(self.parts.len()) {
            let kind = work_kind(storage.parameters.kind());
            let home = Home { kind, device: store.device(), is_offloaded: self.is_offloaded };
            let by_element = StatePart::new(home, storage, (rule.states(), has_ratio), len[0])?;
            let is_turned = has_ratio || rule.whole().is_some();
            let whole = StatePart::new(home, storage, (of_whole, is_turned), len[1])?;
            self.parts.push([by_element, whole]);
        }
        self.seen.0.clear();
        self.heed_masters(store, everything)
    }

    /// Masters begin from parameters as they were before they were rounded, where those are known.
    fn begin_masters(&self, store: &Store, owned: &Owned) -> Result<()> {
        let Some(unrounded) = &store.storages[owned.storage].unrounded else { return Ok(()) };
        for run in &owned.runs {
            let Some(masters) = &self.part(owned.storage, run).masters else { continue };
            let mut target = masters.range(&run.state)?;
            tch::no_grad(|| target.f_copy_(&unrounded.range(&run.segment)?).map_err(Error::from))?;
        }
        Ok(())
    }

    /// Whether there are copies in another precision, or in other memory, of what is updated.
    pub(super) fn has_masters(&self) -> bool {
        self.parts.iter().flatten().any(|part| part.masters.is_some())
    }

    /// Masters are right as they are: they were read together with the parameters.
    pub(super) fn believe_masters(&mut self, store: &Store) -> Result<()> {
        if self.has_masters() {
            self.seen = (store.model.states()?, store.renewals);
        }
        Ok(())
    }

    /// Reads masters anew where parameters were changed by somebody else: weights were loaded.
    pub(super) fn heed_masters(&mut self, store: &Store, everything: &[Owned]) -> Result<()> {
        if !self.has_masters() {
            return Ok(());
        }
        let now = store.model.states()?;
        let (seen, renewals) = &self.seen;
        let is_same = now.len() == seen.len()
            && *renewals == store.renewals
            && now.iter().zip(seen).all(|(now, seen)| now.version == seen.version);
        self.seen = (now, store.renewals);
        if is_same {
            return Ok(());
        }
        for owned in everything {
            self.begin_masters(store, owned)?;
            for run in &owned.runs {
                let Some(masters) = &self.part(owned.storage, run).masters else { continue };
                let mut target = masters.range(&run.state)?;
                let parameters = taken(&store.storages[owned.storage].parameters, run)?
                    .f_to_device(target.device())?;
                // Only where a master does not round to its parameter: weights that were taken out and put back are the same.
                let rounds_to_it = target.f_to_kind(parameters.kind())?.f_eq_tensor(&parameters)?;
                let heeded =
                    target.f_where_self(&rounds_to_it, &parameters.f_to_kind(target.kind())?)?;
                tch::no_grad(|| target.f_copy_(&heeded).map(drop))?;
            }
        }
        Ok(())
    }

    /// Where a run's state is.
    fn part(&self, storage: usize, run: &Run) -> &StatePart {
        &self.parts[storage][usize::from(run.treatment.is_whole)]
    }

    /// A run's directions, where it has any.
    pub(super) fn direction(
        &self,
        store: &Store,
        storage: usize,
        run: &Run,
    ) -> Result<Option<Tensor>> {
        match &self.part(storage, run).directions {
            Directions::Nowhere => Ok(None),
            Directions::Gradients => taken(&store.storages[storage].gradients, run).map(Some),
            Directions::Own(flat) => flat.range(&run.state).map(Some),
        }
    }

    /// The tensors of `runs` of one storage, all treated alike, in the kind that the rule works in.
    pub(super) fn runs(&self, store: &Store, storage: usize, runs: &[&Run]) -> Result<Runs> {
        let memory = &store.storages[storage];
        let kind = work_kind(memory.parameters.kind());
        let mut all = Runs::default();
        for run in runs {
            let part = self.part(storage, run);
            all.parameters.push(match &part.masters {
                Some(masters) => masters.range(&run.state)?,
                None => taken(&memory.parameters, run)?,
            });
            // The same tensor where kind and device are the same.
            let gradient = taken(&memory.gradients, run)?;
            all.gradients.push(gradient.f_to_device(self.device(store))?.f_to_kind(kind)?);
            all.states.resize_with(part.states.len(), Vec::new);
            for (list, state) in all.states.iter_mut().zip(&part.states) {
                list.push(state.range(&run.state)?);
            }
            all.directions.extend(self.direction(store, storage, run)?);
        }
        Ok(all)
    }

    /// Rounds a bucket's updated masters to its parameters.
    pub(super) fn write_back(&self, store: &Store, owned: &Owned) -> Result<()> {
        for run in &owned.runs {
            let Some(masters) = &self.part(owned.storage, run).masters else { continue };
            let mut parameters = taken(&store.storages[owned.storage].parameters, run)?;
            let updated = masters.range(&run.state)?;
            tch::no_grad(|| parameters.f_copy_(&updated).map(drop))?;
        }
        Ok(())
    }

    /// The directions of this rank's pieces, by parameter.
    pub(super) fn direction_parts<'a>(
        &'a self,
        store: &'a Store,
        owned: &[Owned],
    ) -> Vec<norm::NormPart<'a>> {
        let of = |(storage, piece): (usize, &piece::Piece)| {
            let run = &piece.run;
            let (memory, range) = match &self.part(storage, run).directions {
                Directions::Nowhere => return None,
                Directions::Gradients => {
                    store.storages[storage].gradients.at(&run.range, &run.segment)
                }
                Directions::Own(flat) => (flat, run.state.clone()),
            };
            Some(norm::NormPart { memory, range, sum: piece.parameter })
        };
        super::pieces(owned).filter_map(of).collect()
    }
}

impl StatePart {
    /// Zeroed, of `len` elements of a storage.
    fn new(
        home: Home,
        storage: &Storage,
        (states, has_directions): (&[&str], bool),
        len: usize,
    ) -> Result<Self> {
        let Home { kind, device, is_offloaded } = home;
        let flat = || match is_offloaded {
            true => Flat::on_host(kind, device, len),
            false => Flat::private(kind, device, len),
        };
        let is_elsewhere = is_offloaded && device != Device::Cpu;
        let directions = match has_directions {
            false => Directions::Nowhere,
            true if storage.gradients.kind() == kind && !is_elsewhere => Directions::Gradients,
            true => Directions::Own(flat()?),
        };
        let has_masters = is_offloaded || storage.parameters.kind() != kind;
        Ok(Self {
            states: states.iter().map(|_| flat()).collect::<Result<_>>()?,
            masters: has_masters.then(flat).transpose()?,
            directions,
        })
    }
}

/// The elements of a run.
pub(super) fn taken(memory: &Held, run: &Run) -> Result<Tensor> {
    let (flat, range) = memory.at(&run.range, &run.segment);
    flat.range(&range)
}

/// The kind in which a rule works.
pub(super) fn work_kind(kind: Kind) -> Kind {
    match kind {
        Kind::Half | Kind::BFloat16 => Kind::Float,
        other => other,
    }
}
