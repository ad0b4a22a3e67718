//! Parameters that a rule needs whole although they are sharded: their directions come together on one rank each, are
//! turned there, and go back.
//!
//! In waves of buckets (`waves`), each the same on every rank:
//!
//! 1. a rank puts its pieces of the wave's directions into registered memory that is laid out like the buckets;
//! 2. where pieces are sharded, buckets are all-gathered;
//! 3. each rank turns the parameters that it owns in place, and zeroes those of others;
//! 4. buckets are summed, in rank order: a value and zeros, so every bit of it stays. Where directions are sharded a
//!    rank gets its segments alone (reduce-scatter), else all (all-reduce);
//! 5. a rank takes its pieces back.
//!
//! A parameter is computed by one rank, from memory of its own at the same alignment, with the same operations, so its
//! bits depend neither on the stage nor on the number of ranks, as long as these compute with as many threads. Cost: a
//! wave of f32 elements as memory (`WAVE_LENS`), and what two exchanges of gradients send. Where sharding is inside
//! parts of the ranks, each part does all of it by itself.
//!
//! Source: Jordan et al. 2024's distributed Muon gives each rank matrices of its own; gathering and returning the
//! pieces of sharded ones follows from the plan of buckets.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use phalanx_comm::Work;
use tch::{Kind, Tensor};

use super::piece::{Owned, Treatment};
use super::rule::{Rule, Whole};
use super::state::{work_kind, RuleState};
use super::waves::{self, Wave, WAVE_LENS};
use crate::shim;
use crate::store::broadcast;
use crate::store::flat::{Flat, Scale};
use crate::store::model::Named;
use crate::store::Store;
use crate::{Error, Result};

/// An error on all ranks of a model where a rule needs a parameter whole that is cut over them, or where it is not the same one. Collective
/// where there is a part.
pub(super) fn check_parts(store: &mut Store, rule: &dyn Rule, signature: &[String]) -> Result<()> {
    let takes = |named: &&Named| {
        let of_rule = rule.whole();
        of_rule.is_some_and(|whole| whole.takes(&named.name, &named.tensor.size()))
    };
    let mut variables =
        store.model.variables.iter().filter(|named| store.cut(&named.name).is_some());
    let name = variables.find(takes).map_or_else(String::new, |named| named.name.clone());
    let Some(part) = &mut store.part else { return Ok(()) };
    part.alike("the optimizers of their parts", signature)?;
    match part.objected("parameters that are cut", &name)? {
        Some(name) => Err(Error::CutParameter { name, rule: rule.name() }),
        None => Ok(()),
    }
}

/// What owners keep: by parameter, names and tensors.
pub(super) type Kept = BTreeMap<usize, Vec<(&'static str, Tensor)>>;

/// What brings parameters together.
#[derive(Debug)]
pub(super) struct Wholes {
    /// Among how many ranks, and which of them this one is: alone where ranks train by themselves.
    among: (usize, usize),
    waves: Vec<Wave>,
    /// By kind, as long as the longest wave of that kind.
    memory: Vec<Flat>,
    /// Of the parameters that this rank owns.
    pub(super) kept: Kept,
}

impl Wholes {
    /// For the store's present plan; what was kept goes to its owners. Collective.
    pub(super) fn new(
        store: &mut Store,
        whole: &dyn Whole,
        treatments: &[Treatment],
        mut before: Option<Self>,
    ) -> Result<Self> {
        let (rank, world_size) = among(store);
        let shapes: Vec<Vec<i64>> =
            store.model.parameters().map(|named| named.tensor.size()).collect();
        let of = |(treatment, shape): (&Treatment, &Vec<i64>)| {
            treatment.is_whole.then(|| waves::cost(shape))
        };
        let costs: Vec<Option<u64>> = treatments.iter().zip(&shapes).map(of).collect();
        let waves = waves::waves(&store.plan, &costs, world_size, WAVE_LENS);
        let mut kept = Kept::new();
        for wave in &waves {
            let options = (kind_of(store, wave), store.device());
            for member in &wave.members {
                let parts = whole.kept(&shapes[member.parameter]);
                let zeros = |(name, shape): (&'static str, Vec<i64>)| {
                    Ok((name, Tensor::f_zeros(shape.as_slice(), options)?))
                };
                let mut own: Vec<_> = parts.into_iter().map(zeros).collect::<Result<_>>()?;
                if let Some(before) = &mut before {
                    before.hand_over(
                        store,
                        member.parameter,
                        (member.owner, world_size),
                        &mut own,
                    )?;
                }
                if member.owner == rank {
                    kept.insert(member.parameter, own);
                }
            }
        }
        let kind_of = |wave: &Wave| kind_of(store, wave);
        let lens = [Kind::Float, Kind::Double].map(|kind| {
            let of_kind = waves.iter().filter(|wave| kind_of(wave) == kind);
            (kind, of_kind.map(Wave::len).max().unwrap_or(0))
        });
        let mut memory = Vec::new();
        for (kind, len) in lens.into_iter().filter(|(_, len)| *len > 0) {
            let device = store.device();
            memory.push(match world_size {
                1 => Flat::private(kind, device, len)?,
                _ => Flat::registered(store.sharers(), kind, device, len)?,
            });
        }
        Ok(Self { among: (rank, world_size), waves, memory, kept })
    }

    /// Whether ranks have begun to train by themselves since, or have ended to.
    pub(super) fn is_outdated(&self, store: &mut Store) -> bool {
        self.among != among(store)
    }

    /// Brings what the present owner keeps of a parameter to the one that it has `among` so many ranks. Collective.
    fn hand_over(
        &mut self,
        store: &mut Store,
        parameter: usize,
        (owner, among): (usize, usize),
        kept: &mut Vec<(&'static str, Tensor)>,
    ) -> Result<()> {
        let mut members = self.waves.iter().flat_map(|wave| &wave.members);
        let Some(known) = members.find(|member| member.parameter == parameter) else {
            return Ok(());
        };
        if let Some(own) = self.kept.remove(&parameter) {
            *kept = own;
        }
        if self.among.1 == 1 || kept.is_empty() || (known.owner == owner && among > 1) {
            return Ok(());
        }
        let tensors: Vec<&Tensor> = kept.iter().map(|(_, tensor)| tensor).collect();
        broadcast::plain(store.sharers(), "what an optimizer keeps", known.owner, &tensors)
    }

    /// Turns the directions of all parameters that are taken whole: `turn` makes one parameter's of what it was, or
    /// nothing where it is not updated. Says how long this rank waited for others. Collective.
    pub(super) fn turn(
        &self,
        store: &mut Store,
        state: &RuleState,
        parts: &[Owned],
        turn: impl Fn(usize, &Tensor, &[Tensor]) -> Result<Option<Tensor>>,
    ) -> Result<Duration> {
        let mut waited = Duration::ZERO;
        for wave in &self.waves {
            let kind = kind_of(store, wave);
            let Some(memory) = self.memory.iter().find(|flat| flat.kind() == kind) else {
                continue;
            };
            copy(store, state, parts, (wave, memory), Way::In)?;
            if store.sharding.parts() > 1 {
                waited += exchange(store, wave, |store, range| {
                    memory.all_gather(store.sharers(), range)
                })?;
            }
            self.turn_own(store, wave, memory, &turn)?;
            let (is_sharded, whole) = (store.sharding.parts() > 1, Scale(1.0));
            if self.among.1 > 1 {
                waited += exchange(store, wave, |store, range| match is_sharded {
                    true => memory.reduce_scatter(store.sharers(), range, whole),
                    false => memory.all_reduce(store.sharers(), range, whole),
                })?;
            }
            copy(store, state, parts, (wave, memory), Way::Out)?;
        }
        Ok(waited)
    }

    /// Turns the parameters that this rank owns where they lie, and zeroes the others.
    fn turn_own(
        &self,
        store: &mut Store,
        wave: &Wave,
        memory: &Flat,
        turn: impl Fn(usize, &Tensor, &[Tensor]) -> Result<Option<Tensor>>,
    ) -> Result<()> {
        let (rank, _) = self.among;
        for member in &wave.members {
            let tensor = &store.model.parameter(member.parameter).tensor;
            let view = || memory.view(&member.range, &tensor.size(), &tensor.stride());
            let mut turned = None;
            if member.owner == rank {
                let kept = self.kept.get(&member.parameter).map_or(&[][..], Vec::as_slice);
                let kept: Vec<Tensor> = kept.iter().map(|(_, kept)| kept.shallow_clone()).collect();
                turned = tch::no_grad(|| turn(member.parameter, &view()?, &kept))?;
            }
            // A zero that comes out of a sum has no sign, so none has. And `turned` may be the same memory.
            let turned = turned.map(|turned| turned.f_add_scalar(0.0)).transpose()?;
            drop(memory.range(&member.range)?.f_zero_()?);
            if let Some(turned) = turned {
                view()?.f_copy_(&turned)?;
            }
        }
        Ok(())
    }
}

/// Which rank this is of those that turn parameters together, and how many they are.
fn among(store: &mut Store) -> (usize, usize) {
    match store.trains_locally {
        true => (0, 1),
        false => (store.sharers().rank(), store.sharers().world_size()),
    }
}

/// The kind in which a wave's parameters are turned.
fn kind_of(store: &Store, wave: &Wave) -> Kind {
    let first = wave.buckets.first().map(|(bucket, _)| store.plan.buckets[*bucket].storage);
    first.map_or(Kind::Float, |storage| work_kind(store.storages[storage].parameters.kind()))
}

/// Between directions and the memory of a wave.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    In,
    Out,
}

fn copy(
    store: &Store,
    state: &RuleState,
    parts: &[Owned],
    (wave, memory): (&Wave, &Flat),
    way: Way,
) -> Result<()> {
    for (bucket, range) in &wave.buckets {
        let start = store.plan.buckets[*bucket].range.start;
        for piece in parts[*bucket].pieces.iter().filter(|piece| piece.run.treatment.is_whole) {
            let run = &piece.run;
            let from = range.start + (run.range.start - start);
            let mut place = memory.range(&(from..from + run.range.len()))?;
            let Some(mut direction) = state.direction(store, parts[*bucket].storage, run)? else {
                continue;
            };
            match way {
                Way::In => place.f_copy_(&direction)?,
                Way::Out => direction.f_copy_(&place)?,
            }
        }
    }
    Ok(())
}

/// Starts a collective on each bucket of a wave, and waits for all.
fn exchange(
    store: &mut Store,
    wave: &Wave,
    start: impl Fn(&mut Store, std::ops::Range<usize>) -> Result<Work<'static>>,
) -> Result<Duration> {
    let begun = Instant::now();
    let stream = shim::current_stream(store.device())?;
    let mut works = Vec::with_capacity(wave.buckets.len());
    for (bucket, range) in &wave.buckets {
        store.sharers().set_stream(stream);
        store.sharers().tagged(&format!("whole parameters of bucket {bucket}"));
        works.push(start(store, range.clone())?);
    }
    works.into_iter().try_for_each(Work::wait)?;
    Ok(begun.elapsed())
}
