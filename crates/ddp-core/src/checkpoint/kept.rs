//! What the communication hook and local training keep from step to step, as checkpoints have it.
//!
//! A tensor that is the same on every rank is one; of one that each rank has for itself the whole has an axis of ranks in front.

use std::collections::BTreeMap;

use phalanx_checkpoint::{Checkpoint, Extent, Tensors};
use serde::{Deserialize, Serialize};
use tch::{Kind, Tensor};

use super::held::{kind_of, Held, HeldPart};
use crate::hooks::{Kept, State};
use crate::reduce::Reducer;
use crate::store::flat::dense_strides;
use crate::{Error, Result};

const HOOK: &str = "hook";
const LOCAL: &str = "local";

/// Of one that keeps something: who it is, and its numbers.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct Numbers {
    of: String,
    numbers: BTreeMap<String, f64>,
}

/// By who keeps it.
pub(super) type AllNumbers = BTreeMap<String, Numbers>;

/// All that this rank has, with its numbers. Of a part of a model nothing: it is of this mesh alone.
pub(super) fn gather(reducer: &Reducer) -> Result<(Vec<Held>, AllNumbers)> {
    let group = &reducer.store.group;
    let (mut held, mut numbers) = (Vec::new(), AllNumbers::new());
    if reducer.store.part.is_some() {
        return Ok((held, numbers));
    }
    for (who, name, state) in states(reducer)? {
        for (of, kept) in &state.tensors {
            held.push(match kept {
                Kept::Alike(tensor) => Held::whole(alike(who, of), tensor)?,
                Kept::ByRank(tensor) => {
                    row(by_rank(who, of), tensor, (group.rank(), group.world_size()))?
                }
            });
        }
        numbers.insert(who.to_owned(), Numbers { of: name, numbers: state.numbers });
    }
    Ok((held, numbers))
}

fn states(reducer: &Reducer) -> Result<Vec<(&'static str, String, State)>> {
    let mut all = Vec::new();
    if let Some(hooked) = &reducer.hooked {
        all.push((HOOK, hooked.name(), hooked.state()?));
    }
    if let Some(local) = &reducer.local {
        all.push((LOCAL, local.name(), local.state(&reducer.store)?));
    }
    Ok(all)
}

fn alike(who: &str, of: &str) -> String {
    format!("kept/alike/{who}/{of}")
}

fn by_rank(who: &str, of: &str) -> String {
    format!("kept/by-rank/{who}/{of}")
}

/// This rank's row of a tensor with an axis of ranks in front.
fn row(name: String, tensor: &Tensor, (rank, ranks): (usize, usize)) -> Result<Held> {
    let whole = Held::whole(name.clone(), tensor)?;
    let len = tensor.numel() as u64;
    let mut shape = vec![i64::try_from(ranks).unwrap_or(i64::MAX)];
    shape.extend(tensor.size());
    let mut strides = vec![i64::try_from(len).unwrap_or(i64::MAX)];
    strides.extend(dense_strides(&name, tensor)?);
    let mut held = Held::like(name, tensor.kind(), (&shape, &strides))?;
    let first = rank as u64 * len;
    let moved = |part: HeldPart| HeldPart {
        range: part.range.start + first..part.range.end + first,
        memory: part.memory,
    };
    held.parts = whole.parts.into_iter().map(moved).collect();
    Ok(held)
}

/// Goes on from what a checkpoint has; what it has not begins anew.
pub(super) fn load(checkpoint: &Checkpoint, reducer: &mut Reducer, all: &AllNumbers) -> Result<()> {
    if reducer.store.part.is_some() {
        warn_of_left_out(reducer);
        return Ok(());
    }
    let place = (reducer.store.group.rank(), reducer.store.group.world_size());
    let device = reducer.store.device();
    let names: Vec<(&'static str, String)> =
        states(reducer)?.into_iter().map(|(who, name, _)| (who, name)).collect();
    let read = |who: &str, name: &str| -> Result<Option<State>> {
        let Some(numbers) = all.get(who) else {
            tracing::warn!("the checkpoint has nothing of {name}, which begins anew");
            return Ok(None);
        };
        if numbers.of != *name {
            let then = &numbers.of;
            tracing::warn!("the checkpoint is of {then}; {name} begins anew");
            return Ok(None);
        }
        let mut state = State { numbers: numbers.numbers.clone(), ..State::default() };
        for saved in checkpoint.names() {
            let of = |kind: fn(&str, &str) -> String| {
                saved.strip_prefix(kind(who, "").as_str()).map(ToOwned::to_owned)
            };
            let kept = match (of(alike), of(by_rank)) {
                (Some(of), _) => (of, Kept::Alike(whole(checkpoint, saved)?.f_to(device)?)),
                (None, Some(of)) => {
                    (of, Kept::ByRank(own(checkpoint, saved, place)?.f_to(device)?))
                }
                (None, None) => continue,
            };
            state.tensors.insert(kept.0, kept.1);
        }
        Ok(Some(state))
    };
    let absent = all.iter().filter(|(who, _)| names.iter().all(|(here, _)| here != who));
    for (_, numbers) in absent {
        tracing::warn!(
            "the checkpoint has what {} keeps, and nothing here takes it over: give it to the Ddp before resuming",
            numbers.of
        );
    }
    for (who, name) in names {
        let state = read(who, &name)?;
        match (who, state) {
            (HOOK, Some(state)) => {
                reducer.hooked.iter_mut().try_for_each(|hooked| hooked.load(&state))?;
            }
            (LOCAL, Some(state)) => reducer.load_local(&state)?,
            (LOCAL, None) => reducer.start_anew()?,
            _ => {}
        }
    }
    Ok(())
}

/// Says that a hook begins anew when a training on a mesh goes on.
pub(super) fn warn_of_left_out(reducer: &Reducer) {
    if let (Some(hooked), 0) = (&reducer.hooked, reducer.store.rank_of_all()) {
        let name = hooked.name();
        tracing::warn!(
            "checkpoints of a model in parts do not have what {name} keeps: it begins anew when a training goes on"
        );
    }
}

fn whole(checkpoint: &Checkpoint, name: &str) -> Result<Tensor> {
    let bytes = checkpoint.read_whole(name)?;
    let (kind, shape) = spec(checkpoint, name)?;
    Ok(Tensor::f_from_data_size(&bytes, &shape, kind)?)
}

/// This rank's row; on another number of ranks the mean of all.
fn own(checkpoint: &Checkpoint, name: &str, (rank, ranks): (usize, usize)) -> Result<Tensor> {
    let (kind, shape) = spec(checkpoint, name)?;
    if shape.first().copied() != i64::try_from(ranks).ok() {
        let all = whole(checkpoint, name)?;
        return Ok(all.f_mean_dim([0_i64].as_slice(), false, kind)?);
    }
    let len = shape.iter().skip(1).product::<i64>();
    let row: Vec<u64> = shape.iter().skip(1).map(|&n| u64::try_from(n).unwrap_or(0)).collect();
    let start: Vec<u64> = std::iter::once(rank as u64).chain(row.iter().map(|_| 0)).collect();
    let lens: Vec<u64> = std::iter::once(1).chain(row.iter().copied()).collect();
    let bytes = usize::try_from(len).unwrap_or(0) * kind.elt_size_in_bytes();
    let mut out = vec![0; bytes];
    checkpoint.read(name, &Extent::new(&start, &lens), &mut out)?;
    Ok(Tensor::f_from_data_size(&out, shape.get(1..).unwrap_or_default(), kind)?)
}

fn spec(checkpoint: &Checkpoint, name: &str) -> Result<(Kind, Vec<i64>)> {
    let misfit = || Error::CheckpointMisfit {
        path: checkpoint.path().to_owned(),
        report: format!("  {name}: not of a kind that hooks keep\n"),
    };
    let spec = checkpoint.spec(name).ok_or_else(misfit)?;
    let kind = kind_of(spec.dtype).ok_or_else(misfit)?;
    let shape = spec.shape.iter().map(|&n| i64::try_from(n).unwrap_or(i64::MAX)).collect();
    Ok((kind, shape))
}
