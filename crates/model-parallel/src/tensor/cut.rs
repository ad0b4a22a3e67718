//! Which columns, rows and words of the vocabulary are whose. Pure.

use std::ops::Range;

use crate::error::{Error, Result};
use crate::mesh::Axis;

/// A rank's piece of one matrix of those that stand side by side.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Piece {
    /// In the whole.
    pub(super) range: Range<i64>,
    /// Where several ranks have the same piece.
    pub(super) repeated: Option<Repeated>,
}

/// Which of the units that are on several ranks each.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Repeated {
    pub(super) index: i64,
    pub(super) count: i64,
}

impl Piece {
    pub(super) fn len(&self) -> i64 {
        self.range.end - self.range.start
    }
}

/// Cuts each of `parts`, which stand side by side, evenly, in units. A part of fewer units than ranks has each of them on several.
pub(super) fn even(
    layer: &str,
    what: &'static str,
    (parts, unit): (&[i64], i64),
    (rank, ranks): (i64, i64),
) -> Result<Vec<Piece>> {
    let mut start = 0;
    let mut pieces = Vec::new();
    for &len in parts {
        let units = if unit > 0 && len % unit == 0 { len / unit } else { 0 };
        let piece = match units {
            1.. if units % ranks == 0 => {
                let each = units / ranks * unit;
                let first = start + rank * each;
                Piece { range: first..first + each, repeated: None }
            }
            // Without heads there is nothing that could be of use to several ranks.
            1.. if unit > 1 && ranks % units == 0 => {
                let index = rank / (ranks / units);
                let first = start + index * unit;
                let repeated = Some(Repeated { index, count: units });
                Piece { range: first..first + unit, repeated }
            }
            _ => return Err(indivisible(layer, what, if units > 0 { units } else { len }, ranks)),
        };
        pieces.push(piece);
        start += len;
    }
    Ok(pieces)
}

/// The rank's range of `len` things, of which ranks have as many or one more.
pub(super) fn uneven(len: i64, (rank, ranks): (i64, i64)) -> Range<i64> {
    let (each, more) = (len / ranks, len % ranks);
    let start = rank * each + rank.min(more);
    start..start + each + i64::from(rank < more)
}

/// The error that says which sizes would do.
pub(super) fn indivisible(layer: &str, what: &'static str, len: i64, ranks: i64) -> Error {
    let possible = (1..=len.min(LISTED_MAX)).filter(|count| len % count == 0);
    Error::Indivisible {
        layer: layer.to_owned(),
        what,
        len,
        axis: Axis::Tp,
        ranks: usize::try_from(ranks).unwrap_or(0),
        possible: possible.filter_map(|count| usize::try_from(count).ok()).collect(),
    }
}

/// No node has more devices.
const LISTED_MAX: i64 = 64;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_row_is_on_one_rank_and_parts_differ_by_one() {
        for len in 1..40 {
            for ranks in 1..=len.min(9) {
                let parts: Vec<_> = (0..ranks).map(|rank| uneven(len, (rank, ranks))).collect();
                let mut at = 0;
                for part in &parts {
                    assert_eq!(part.start, at);
                    assert!((len / ranks..=len / ranks + 1).contains(&(part.end - part.start)));
                    at = part.end;
                }
                assert_eq!(at, len);
            }
        }
    }

    #[test]
    fn parts_side_by_side_are_cut_each_and_few_heads_are_on_several_ranks() {
        let cut = |rank| even("qkv", "heads", (&[8, 4, 4], 2), (rank, 4)).expect("4 ranks");
        let ranges = |rank| cut(rank).into_iter().map(|piece| piece.range).collect::<Vec<_>>();
        assert_eq!(ranges(0), [0..2, 8..10, 12..14]);
        assert_eq!(ranges(1), [2..4, 8..10, 12..14]);
        assert_eq!(ranges(3), [6..8, 10..12, 14..16]);
        assert_eq!(cut(3)[1].repeated, Some(Repeated { index: 1, count: 2 }));
        assert_eq!(cut(3)[0].repeated, None);
    }

    #[test]
    fn what_cannot_be_cut_is_an_error_with_what_can() {
        let error = even("h.0.attn", "heads", (&[12], 2), (0, 4)).expect_err("6 heads");
        assert_eq!(
            error.to_string(),
            "h.0.attn: heads 6 cannot be divided by tp 4; possible: 1, 2, 3, 6"
        );
        assert!(even("fc", "columns", (&[3], 1), (0, 6)).is_err());
    }
}
