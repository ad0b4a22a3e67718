//! Which ranks of a model have which boxes of its tensors, from what all of them tell. Pure.
//!
//! A box counts on the first rank that has it: norms take it from there, and checkpoints and files of weights.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use phalanx_checkpoint::Dtype;
use serde::{Deserialize, Serialize};

use crate::Cut;

/// A variable or buffer as a rank has it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Told {
    pub(crate) name: String,
    pub(crate) dtype: Dtype,
    /// Of the whole.
    pub(crate) shape: Vec<i64>,
    /// None: all of it.
    pub(crate) slice: Option<Slice>,
}

/// Indices of one dimension.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Slice {
    dim: usize,
    ranges: Vec<(i64, i64)>,
}

/// A box, and who has it, in the order of the ranks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Piece {
    pub(crate) slice: Option<Slice>,
    pub(crate) ranks: Vec<usize>,
}

/// A tensor of the model.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Entry {
    pub(crate) dtype: Dtype,
    pub(crate) shape: Vec<i64>,
    pub(crate) pieces: Vec<Piece>,
}

/// All tensors of a model, by name.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Table {
    pub(crate) tensors: BTreeMap<String, Entry>,
}

impl Slice {
    /// Of a cut, with ranges that touch as one; none where it is no cut at all.
    pub(crate) fn of(cut: &Cut) -> Option<Self> {
        let mut ranges: Vec<(i64, i64)> = Vec::new();
        for range in cut.ranges() {
            match ranges.last_mut() {
                Some((_, end)) if *end == range.start => *end = range.end,
                _ => ranges.push((range.start, range.end)),
            }
        }
        let is_all = ranges == [(0, cut.shape()[cut.dim()])];
        (!is_all).then_some(Self { dim: cut.dim(), ranges })
    }

    /// As a cut of a tensor of this shape.
    pub(crate) fn cut(&self, shape: &[i64]) -> Cut {
        Cut::new(shape, self.dim, self.ranges.iter().map(|&(start, end)| start..end).collect())
    }
}

impl Table {
    /// What ranks `told`, rank by rank; else a line for each tensor that their boxes do not make. Ranks are named as in `names`.
    pub(crate) fn new(told: &[Vec<Told>], names: &[usize]) -> Result<Self, String> {
        let mut table = Self::default();
        let mut report = String::new();
        for (rank, list) in told.iter().enumerate() {
            for one in list {
                if let Some(line) = table.take(rank, one, names) {
                    report.push_str(&line);
                }
            }
        }
        for (name, entry) in &table.tensors {
            if let Some(flaw) = entry.flaw(names) {
                // Writing to a String cannot fail.
                _ = writeln!(report, "  {name}: {flaw}");
            }
        }
        if report.is_empty() {
            Ok(table)
        } else {
            Err(report)
        }
    }

    /// Takes a rank's tensor in, or gives the line about why it cannot be.
    fn take(&mut self, rank: usize, one: &Told, names: &[usize]) -> Option<String> {
        let Told { name, dtype, shape, slice } = one;
        let entry = self.tensors.entry(name.clone()).or_insert_with(|| Entry {
            dtype: *dtype,
            shape: shape.clone(),
            pieces: Vec::new(),
        });
        if (entry.dtype, &entry.shape) != (*dtype, shape) {
            let first = entry.pieces.first().and_then(|piece| piece.ranks.first()).copied();
            let first = first.map_or(0, |first| names[first]);
            return Some(format!(
                "  {name}: a part of {} {:?} on rank {first}, of {dtype} {shape:?} on rank {}\n",
                entry.dtype, entry.shape, names[rank]
            ));
        }
        match entry.pieces.iter_mut().find(|piece| piece.slice == *slice) {
            Some(piece) => piece.ranks.push(rank),
            None => entry.pieces.push(Piece { slice: slice.clone(), ranks: vec![rank] }),
        }
        None
    }

    /// Whether the tensor of this name counts on a rank.
    pub(crate) fn counts(&self, name: &str, rank: usize) -> bool {
        let entry = self.tensors.get(name);
        entry
            .is_none_or(|entry| entry.pieces.iter().any(|piece| piece.ranks.first() == Some(&rank)))
    }

    /// One line for each tensor: what all models must have alike.
    pub(crate) fn lines(&self) -> String {
        self.tensors.iter().map(|(name, entry)| format!("{name} {entry:?}\n")).collect()
    }
}

impl Entry {
    /// Whether it is cut.
    pub(crate) fn is_cut(&self) -> bool {
        self.pieces.iter().any(|piece| piece.slice.is_some())
    }

    /// Why its boxes are not the tensor, each element once.
    fn flaw(&self, names: &[usize]) -> Option<String> {
        let rank_of = |piece: &Piece| names[piece.ranks[0]];
        let mut slices = Vec::new();
        for piece in &self.pieces {
            match &piece.slice {
                Some(slice) => slices.push((slice, rank_of(piece))),
                None if self.pieces.len() == 1 => return None,
                None => {
                    let all = rank_of(piece);
                    let other = self.pieces.iter().find(|other| other.slice.is_some())?;
                    let part = rank_of(other);
                    return Some(format!("all of it is on rank {all}, and a part on rank {part}"));
                }
            }
        }
        let (first, first_rank) = *slices.first()?;
        if let Some((other, rank)) = slices.iter().find(|(slice, _)| slice.dim != first.dim) {
            return Some(format!(
                "cut along dimension {} on rank {first_rank}, along {} on rank {rank}",
                first.dim, other.dim
            ));
        }
        let ranges = slices.iter().flat_map(|(slice, rank)| {
            slice.ranges.iter().map(move |&(start, end)| (start, end, *rank))
        });
        let mut ranges: Vec<(i64, i64, usize)> = ranges.collect();
        ranges.sort_unstable();
        let (mut at, mut last) = (0, first_rank);
        for &(start, end, rank) in &ranges {
            if start > at {
                return Some(format!("no rank has {at}..{start} of dimension {}", first.dim));
            }
            if start < at {
                let dim = first.dim;
                return Some(format!(
                    "{start}..{} of dimension {dim} are on rank {last} and on rank {rank}, in parts that are not alike",
                    at.min(end)
                ));
            }
            (at, last) = (end, rank);
        }
        let len = self.shape[first.dim];
        (at < len).then(|| format!("no rank has {at}..{len} of dimension {}", first.dim))
    }
}

#[cfg(test)]
#[expect(clippy::single_range_in_vec_init, reason = "cuts of one range")]
mod tests {
    use super::*;

    fn told(name: &str, cut: &Cut) -> Told {
        Told {
            name: name.to_owned(),
            dtype: Dtype::F32,
            shape: cut.shape().to_vec(),
            slice: Slice::of(cut),
        }
    }

    fn rows(ranges: &[std::ops::Range<i64>]) -> Vec<Told> {
        vec![told("w", &Cut::new(&[6, 2], 0, ranges.to_vec()))]
    }

    #[test]
    fn a_box_counts_on_the_first_rank_that_has_it() {
        let all = Cut::new(&[6, 2], 0, vec![0..2, 2..6]);
        // Two stages of two ranks; the last has the first one's embedding.
        let [top, bottom] = [0..2, 2..6].map(|range| Cut::new(&[6, 2], 0, vec![range]));
        let ranks = [
            vec![told("embedding", &top), told("norm.0", &all)],
            vec![told("embedding", &bottom), told("norm.0", &all)],
            vec![told("embedding", &top), told("norm.1", &all)],
            vec![told("embedding", &bottom), told("norm.1", &all)],
        ];
        let table = Table::new(&ranks, &[0, 1, 2, 3]).unwrap();
        let counts = |name| [0, 1, 2, 3].map(|rank| table.counts(name, rank));
        assert_eq!(counts("embedding"), [true, true, false, false]);
        assert_eq!(counts("norm.0"), [true, false, false, false]);
        assert_eq!(counts("norm.1"), [false, false, true, false]);
        assert!(table.tensors["embedding"].is_cut() && !table.tensors["norm.0"].is_cut());
    }

    #[test]
    fn holes_overlap_and_other_shapes_are_named_with_their_ranks() {
        let other = vec![told("w", &Cut::new(&[6, 3], 0, vec![3..6]))];
        let columns = vec![told("w", &Cut::new(&[6, 2], 1, vec![1..2]))];
        let cases = [
            (vec![rows(&[0..2]), rows(&[3..6])], "no rank has 2..3 of dimension 0"),
            (vec![rows(&[0..2]), rows(&[2..5])], "no rank has 5..6 of dimension 0"),
            (vec![rows(&[0..4]), rows(&[2..6])], "2..4 of dimension 0 are on rank 7 and on rank 9"),
            (vec![rows(&[0..6]), rows(&[2..6])], "all of it is on rank 7, and a part on rank 9"),
            (vec![rows(&[0..3]), columns], "along dimension 0 on rank 7, along 1 on rank 9"),
            (vec![rows(&[0..3]), other], "of F32 [6, 3] on rank 9"),
        ];
        for (ranks, expected) in cases {
            let report = Table::new(&ranks, &[7, 9]).unwrap_err();
            assert!(report.contains(expected), "{expected} in {report}");
        }
        assert!(Table::new(&[rows(&[0..1, 4..6]), rows(&[1..4])], &[0, 1]).is_ok());
    }

    #[test]
    fn a_slice_is_its_cut() {
        let cut = Cut::new(&[2, 9], 1, vec![0..1, 1..3, 6..9]);
        let slice = Slice::of(&cut).unwrap();
        assert_eq!(slice.cut(&[2, 9]), Cut::new(&[2, 9], 1, vec![0..3, 6..9]));
    }
}
