//! Who writes what. Pure: a function of what all ranks say that they hold.
//!
//! A box that one rank holds is written by it. A box that several hold alike (a replica) is written once, by the one that has least
//! to write so far, largest boxes first; one that is larger than a fair share is cut into parts. So bytes are spread evenly, and
//! every rank comes to the same plan. Source: longest-processing-time-first scheduling (Graham, 1969).

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::cover::{self, Flaw};
use crate::extent::{self, Extent};
use crate::{Dtype, Error, Result};

/// A replica smaller than this is not cut: parts have their costs as well.
const CUT_BYTES_MIN: u64 = 1 << 20;

/// What a rank holds of a tensor.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Held {
    pub(crate) name: String,
    pub(crate) dtype: Dtype,
    /// Of the whole tensor.
    pub(crate) shape: Vec<u64>,
    pub(crate) extents: Vec<Extent>,
}

/// A tensor, and who writes which boxes of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Planned {
    pub(crate) name: String,
    pub(crate) dtype: Dtype,
    pub(crate) shape: Vec<u64>,
    /// In the order of their boxes.
    pub(crate) pieces: Vec<(Extent, usize)>,
}

/// What all ranks write, sorted by name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Plan {
    pub(crate) tensors: Vec<Planned>,
    pub(crate) world_size: usize,
}

/// A tensor as all ranks have it.
struct Merged<'a> {
    dtype: Dtype,
    shape: &'a [u64],
    first_rank: usize,
    /// The ranks that hold each box.
    boxes: BTreeMap<&'a Extent, Vec<usize>>,
}

/// A box that several ranks hold.
struct Replica {
    bytes: u64,
    tensor: usize,
    extent: Extent,
    ranks: Vec<usize>,
}

impl Plan {
    /// The plan for what each rank holds.
    pub(crate) fn new(held: &[Vec<Held>]) -> Result<Self> {
        let merged = merge(held)?;
        for (name, tensor) in &merged {
            check_cover(name, tensor)?;
        }
        let fair = fair_share(&merged, held.len());
        let mut load = vec![0_u64; held.len()];
        let (mut tensors, mut replicas) = (Vec::new(), Vec::new());
        for (at, (name, tensor)) in merged.into_iter().enumerate() {
            let pieces = single(&tensor, &mut load);
            replicas.extend(shared(&tensor, at, fair));
            let (name, shape) = (name.to_owned(), tensor.shape.to_vec());
            tensors.push(Planned { name, dtype: tensor.dtype, shape, pieces });
        }
        spread(replicas, &mut load, &mut tensors);
        tensors.iter_mut().for_each(|tensor| tensor.pieces.sort());
        Ok(Plan { tensors, world_size: held.len() })
    }

    /// What a rank writes: the tensor, and the box of it.
    pub(crate) fn of_rank(&self, rank: usize) -> impl Iterator<Item = (&Planned, &Extent)> {
        self.tensors.iter().flat_map(move |tensor| {
            let its = tensor.pieces.iter().filter(move |(_, writer)| *writer == rank);
            its.map(move |(extent, _)| (tensor, extent))
        })
    }
}

/// All ranks' lists as one, if they agree.
fn merge(held: &[Vec<Held>]) -> Result<BTreeMap<&str, Merged<'_>>> {
    let mut merged: BTreeMap<&str, Merged<'_>> = BTreeMap::new();
    for (rank, list) in held.iter().enumerate() {
        for one in list {
            check_one(one, rank)?;
            let tensor = merged.entry(&one.name).or_insert_with(|| Merged {
                dtype: one.dtype,
                shape: &one.shape,
                first_rank: rank,
                boxes: BTreeMap::new(),
            });
            if (tensor.dtype, tensor.shape) != (one.dtype, one.shape.as_slice()) {
                let (first, dtype, shape) = (tensor.first_rank, tensor.dtype, tensor.shape);
                let reason = format!(
                    "rank {first} has {dtype} {shape:?}, rank {rank} has {} {:?}",
                    one.dtype, one.shape
                );
                return Err(Error::Mismatch { tensor: one.name.clone(), reason });
            }
            for extent in one.extents.iter().filter(|extent| !extent.is_empty()) {
                let ranks = tensor.boxes.entry(extent).or_default();
                if ranks.last() == Some(&rank) {
                    return Err(overlap(&one.name, (extent, rank), (extent, rank)));
                }
                ranks.push(rank);
            }
        }
    }
    Ok(merged)
}

/// Whether one rank's entry makes sense by itself.
fn check_one(one: &Held, rank: usize) -> Result<()> {
    let bad = |reason: String| Error::Mismatch { tensor: one.name.clone(), reason };
    if one.name.is_empty() || one.name == "__metadata__" {
        return Err(bad(format!("rank {rank}: safetensors does not allow this name")));
    }
    let bytes = extent::bytes(&one.shape, one.dtype.bytes());
    if bytes.is_none_or(|bytes| bytes > i64::MAX.unsigned_abs()) {
        return Err(bad(format!("rank {rank}: shape {:?} is too large", one.shape)));
    }
    match one.extents.iter().find(|extent| !extent.fits(&one.shape)) {
        Some(extent) => {
            Err(bad(format!("rank {rank}: {extent} is no box of shape {:?}", one.shape)))
        }
        None => Ok(()),
    }
}

fn check_cover(name: &str, tensor: &Merged<'_>) -> Result<()> {
    let elements = extent::elements(tensor.shape).unwrap_or(u64::MAX);
    let boxes: Vec<&Extent> = tensor.boxes.keys().copied().collect();
    let holder = |at: usize| {
        let extent = boxes[at];
        (extent, tensor.boxes.get(extent).and_then(|ranks| ranks.first()).copied().unwrap_or(0))
    };
    match cover::check(elements, &boxes) {
        Ok(()) => Ok(()),
        Err(Flaw::Overlap(left, right)) => Err(overlap(name, holder(left), holder(right))),
        Err(Flaw::Missing(missing)) => {
            let (tensor, shape) = (name.to_owned(), tensor.shape.to_vec());
            Err(Error::Hole { tensor, shape, missing })
        }
        Err(Flaw::Tangled) => {
            let reason = format!("its {} boxes are too many to be compared", boxes.len());
            Err(Error::Mismatch { tensor: name.to_owned(), reason })
        }
    }
}

fn overlap(name: &str, left: (&Extent, usize), right: (&Extent, usize)) -> Error {
    Error::Overlap {
        tensor: name.to_owned(),
        left: left.0.to_string(),
        left_rank: left.1,
        right: right.0.to_string(),
        right_rank: right.1,
    }
}

/// The bytes that each rank would write if they could be spread at will.
fn fair_share(merged: &BTreeMap<&str, Merged<'_>>, world_size: usize) -> u64 {
    let sizes = merged.values().map(|tensor| extent::bytes(tensor.shape, tensor.dtype.bytes()));
    let total = sizes.flatten().fold(0, u64::saturating_add);
    total.div_ceil(crate::cast::to_u64(world_size.max(1))).max(CUT_BYTES_MIN)
}

/// The boxes that only one rank holds. A tensor without elements is one of them, so that it is written down somewhere.
fn single(tensor: &Merged<'_>, load: &mut [u64]) -> Vec<(Extent, usize)> {
    if tensor.boxes.is_empty() {
        return vec![(Extent::whole(tensor.shape), tensor.first_rank)];
    }
    let mut pieces = Vec::new();
    for (&extent, ranks) in &tensor.boxes {
        if let [rank] = ranks[..] {
            load[rank] += byte_count(extent, tensor.dtype);
            pieces.push((extent.clone(), rank));
        }
    }
    pieces
}

/// The boxes that several ranks hold, none of them larger than a fair share where that can be.
fn shared(tensor: &Merged<'_>, at: usize, fair: u64) -> Vec<Replica> {
    let mut replicas = Vec::new();
    for (extent, ranks) in tensor.boxes.iter().filter(|(_, ranks)| ranks.len() > 1) {
        for part in extent.cut(byte_count(extent, tensor.dtype).div_ceil(fair)) {
            let (bytes, ranks) = (byte_count(&part, tensor.dtype), ranks.clone());
            replicas.push(Replica { bytes, tensor: at, extent: part, ranks });
        }
    }
    replicas
}

/// Gives each replica to the rank with least to write, of those that hold it.
fn spread(mut replicas: Vec<Replica>, load: &mut [u64], tensors: &mut [Planned]) {
    replicas.sort_by(|a, b| {
        let key = |one: &Replica| std::cmp::Reverse(one.bytes);
        (key(a), a.tensor, &a.extent).cmp(&(key(b), b.tensor, &b.extent))
    });
    for replica in replicas {
        let Some(&rank) = replica.ranks.iter().min_by_key(|&&rank| (load[rank], rank)) else {
            continue;
        };
        load[rank] += replica.bytes;
        tensors[replica.tensor].pieces.push((replica.extent, rank));
    }
}

/// The bytes of a box of a tensor whose size was checked.
pub(crate) fn byte_count(extent: &Extent, dtype: Dtype) -> u64 {
    extent.elements().saturating_mul(crate::cast::to_u64(dtype.bytes()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn held(name: &str, shape: &[u64], extents: &[Extent]) -> Held {
        let (name, shape, extents) = (name.to_owned(), shape.to_vec(), extents.to_vec());
        Held { name, dtype: Dtype::F32, shape, extents }
    }

    fn whole(name: &str, shape: &[u64]) -> Held {
        held(name, shape, &[Extent::whole(shape)])
    }

    fn load(plan: &Plan) -> Vec<u64> {
        (0..plan.world_size)
            .map(|rank| plan.of_rank(rank).map(|(t, extent)| byte_count(extent, t.dtype)).sum())
            .collect()
    }

    #[test]
    fn replicas_are_written_once_and_spread_evenly() {
        let sizes: Vec<u64> = (1..40).map(|n| n * n % 83 + 1).collect();
        let tensors: Vec<Held> =
            sizes.iter().enumerate().map(|(n, &size)| whole(&format!("t{n}"), &[size])).collect();
        for world_size in [1, 2, 3, 4, 7] {
            let plan = Plan::new(&vec![tensors.clone(); world_size]).unwrap();
            assert!(plan.tensors.iter().all(|tensor| tensor.pieces.len() == 1));
            let load = load(&plan);
            assert_eq!(load.iter().sum::<u64>(), 4 * sizes.iter().sum::<u64>());
            let (least, most) = (load.iter().min().unwrap(), load.iter().max().unwrap());
            assert!(most - least <= 4 * 83, "{load:?}");
        }
    }

    #[test]
    fn a_replica_beyond_a_fair_share_is_cut() {
        let plan = Plan::new(&vec![vec![whole("big", &[1, 4096, 512])]; 4]).unwrap();
        assert_eq!(load(&plan), [2 << 20; 4]);
        assert_eq!(plan.tensors[0].pieces[1].0, Extent::new(&[0, 1024, 0], &[1, 1024, 512]));
    }

    #[test]
    fn what_one_rank_alone_holds_counts_before_replicas_are_spread() {
        let shard = |rank: u64| held("m", &[20], &[Extent::new(&[rank * 15], &[15 - 10 * rank])]);
        let ranks = [vec![shard(0), whole("w", &[8])], vec![shard(1), whole("w", &[8])]];
        let plan = Plan::new(&ranks).unwrap();
        assert_eq!(load(&plan), [60, 52]);
    }

    #[test]
    fn empty_tensors_and_scalars_are_written_by_somebody() {
        let tensors =
            vec![whole("empty", &[0, 3]), held("no box", &[0], &[]), whole("scalar", &[])];
        let plan = Plan::new(&[tensors.clone(), tensors]).unwrap();
        assert_eq!(plan.tensors[0].pieces, [(Extent::whole(&[0, 3]), 0)]);
        assert_eq!(plan.tensors[1].pieces, [(Extent::whole(&[0]), 0)]);
        assert_eq!(plan.tensors[2].pieces, [(Extent::whole(&[]), 0)]);
    }

    #[test]
    fn disagreement_overlap_and_holes_name_tensor_and_ranks() {
        let part = |start, len| held("m", &[9], &[Extent::new(&[start], &[len])]);
        let cases = [
            (vec![vec![part(0, 5)], vec![part(4, 5)]], "[0:5] of rank 0 and [4:9] of rank 1"),
            (vec![vec![part(0, 5)], vec![part(6, 3)]], "no rank holds 1 of its elements"),
            (vec![vec![part(0, 9)], vec![whole("m", &[3, 3])]], "rank 1 has F32 [3, 3]"),
            (vec![vec![part(0, 9)], vec![part(8, 2)]], "rank 1: [8:10] is no box of shape [9]"),
            (vec![vec![part(0, 9), part(0, 9)]], "[0:9] of rank 0 and [0:9] of rank 0"),
            (vec![vec![held("m", &[2], &[])]], "no rank holds 2"),
            (vec![vec![whole("__metadata__", &[2])]], "does not allow this name"),
            (vec![vec![held("m", &[1 << 40, 1 << 40], &[])]], "too large"),
        ];
        for (ranks, expected) in cases {
            let error = Plan::new(&ranks).unwrap_err().to_string();
            assert!(error.contains(expected), "{expected} in {error}");
        }
    }
}
