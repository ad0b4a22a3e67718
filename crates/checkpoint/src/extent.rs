//! Boxes of a tensor, and the contiguous runs that two boxes share. Pure.
//!
//! A box ([`Extent`]) is a start and a length in each dimension of the whole tensor. What two boxes have in common is a box again;
//! it is copied from the memory of one to that of the other in runs, as long as both are contiguous: trailing dimensions that lie
//! alike in both are one run.

use serde::{Deserialize, Serialize};

/// A box of a tensor: where it starts and how long it is, dimension by dimension. A tensor without dimensions has one box.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Extent {
    start: Vec<u64>,
    len: Vec<u64>,
}

impl Extent {
    /// The box that starts at `start` and has these lengths; both have an entry for each dimension.
    pub fn new(start: &[u64], len: &[u64]) -> Self {
        Extent { start: start.to_vec(), len: len.to_vec() }
    }

    /// All of a tensor of this shape.
    pub fn whole(shape: &[u64]) -> Self {
        Extent { start: vec![0; shape.len()], len: shape.to_vec() }
    }

    /// Where it starts in each dimension.
    pub fn start(&self) -> &[u64] {
        &self.start
    }

    /// How long it is in each dimension.
    pub fn len(&self) -> &[u64] {
        &self.len
    }

    /// How many elements it has. What is too many for a number is the largest number.
    pub fn elements(&self) -> u64 {
        self.len.iter().fold(1, |product: u64, &len| product.saturating_mul(len))
    }

    /// Whether it has no elements.
    pub fn is_empty(&self) -> bool {
        self.len.contains(&0)
    }

    /// Whether it is a box of a tensor of this shape.
    pub fn fits(&self, shape: &[u64]) -> bool {
        let fits_in = |((&start, &len), &all): ((&u64, &u64), &u64)| {
            start.checked_add(len).is_some_and(|end| end <= all)
        };
        self.start.len() == shape.len()
            && self.len.len() == shape.len()
            && self.start.iter().zip(&self.len).zip(shape).all(fits_in)
    }

    /// Whether it is all of a tensor of this shape.
    pub(crate) fn is_whole(&self, shape: &[u64]) -> bool {
        self.len == shape && self.start.iter().all(|&start| start == 0)
    }

    /// What two boxes of one tensor have in common, if that is anything.
    pub fn intersection(&self, other: &Extent) -> Option<Extent> {
        let (mut start, mut len) = (Vec::new(), Vec::new());
        for (mine, its) in self.ranges().zip(other.ranges()) {
            let (from, until) = (mine.start.max(its.start), mine.end.min(its.end));
            if from >= until {
                return None;
            }
            start.push(from);
            len.push(until - from);
        }
        Some(Extent { start, len })
    }

    /// Whether two boxes of one tensor share an element.
    pub(crate) fn overlaps(&self, other: &Extent) -> bool {
        self.ranges()
            .zip(other.ranges())
            .all(|(mine, its)| mine.start.max(its.start) < mine.end.min(its.end))
    }

    /// Its indices in each dimension.
    pub(crate) fn ranges(&self) -> impl Iterator<Item = std::ops::Range<u64>> + '_ {
        self.start.iter().zip(&self.len).map(|(&start, &len)| start..start.saturating_add(len))
    }

    /// The box with other indices in one dimension.
    pub(crate) fn with(&self, dimension: usize, start: u64, len: u64) -> Extent {
        let mut other = self.clone();
        other.set(dimension, start, len);
        other
    }

    pub(crate) fn set(&mut self, dimension: usize, start: u64, len: u64) {
        self.start[dimension] = start;
        self.len[dimension] = len;
    }

    /// The box in at most so many parts, cut along its first dimension that can be cut. Each part is contiguous where the box is.
    pub(crate) fn cut(&self, parts: u64) -> Vec<Extent> {
        let Some(dimension) = self.len.iter().position(|&len| len > 1) else {
            return vec![self.clone()];
        };
        let (start, len) = (self.start[dimension], self.len[dimension]);
        let parts = parts.clamp(1, len);
        let at = |part: u64| {
            let product = u128::from(len) * u128::from(part) / u128::from(parts);
            u64::try_from(product).unwrap_or(len)
        };
        let one = |part| self.with(dimension, start + at(part), at(part + 1) - at(part));
        (0..parts).map(one).collect()
    }

    /// The runs of `part` that are contiguous both in the memory of `from` and of `to`, which are boxes around it, each stored
    /// by itself with the last dimension fastest: offset in `from`, offset in `to`; in elements.
    pub(crate) fn runs(part: &Extent, from: &Extent, to: &Extent) -> Runs {
        let (left, right) = (strides(&from.len), strides(&to.len));
        let offsets = (from.offset(part, &left), to.offset(part, &right));
        Runs::new(&part.len, &left, &right, offsets)
    }

    /// How many elements `part` starts after this box does, with these strides.
    fn offset(&self, part: &Extent, strides: &[u64]) -> u64 {
        let steps = part.start.iter().zip(&self.start).zip(strides);
        steps.map(|((inner, outer), stride)| (inner - outer).saturating_mul(*stride)).sum()
    }
}

/// `[0:4, 8:16]`
impl std::fmt::Display for Extent {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let ranges: Vec<_> = self.ranges().map(|r| format!("{}:{}", r.start, r.end)).collect();
        write!(f, "[{}]", ranges.join(","))
    }
}

/// How many elements a shape has, if that is a number.
pub(crate) fn elements(shape: &[u64]) -> Option<u64> {
    shape.iter().try_fold(1, |product: u64, &len| product.checked_mul(len))
}

/// How many bytes a shape has, if that is a number.
pub(crate) fn bytes(shape: &[u64], element_bytes: usize) -> Option<u64> {
    elements(shape)?.checked_mul(crate::cast::to_u64(element_bytes))
}

/// The strides of memory in which the last dimension is the fastest, in elements.
pub(crate) fn strides(len: &[u64]) -> Vec<u64> {
    let mut strides = vec![1_u64; len.len()];
    for dimension in (1..len.len()).rev() {
        strides[dimension - 1] = strides[dimension].saturating_mul(len[dimension]);
    }
    strides
}

/// Runs of elements that are contiguous on both sides, all of one length: offset left, offset right.
#[derive(Clone, Debug)]
pub(crate) struct Runs {
    /// The dimensions that are stepped through: length, left stride, right stride.
    outer: Vec<(u64, u64, u64)>,
    at: Vec<u64>,
    offsets: (u64, u64),
    run: u64,
    left: u64,
}

impl Runs {
    /// A box of these lengths that lies on both sides with strides, from offsets.
    pub(crate) fn new(len: &[u64], left: &[u64], right: &[u64], offsets: (u64, u64)) -> Self {
        let mut outer: Vec<_> =
            len.iter().zip(left).zip(right).map(|((&len, &l), &r)| (len, l, r)).collect();
        outer.retain(|(count, ..)| *count > 1);
        let mut run = 1;
        while let Some(&(count, ..)) = outer.last().filter(|(_, l, r)| *l == run && *r == run) {
            run *= count;
            outer.pop();
        }
        let is_empty = len.contains(&0);
        let count = if is_empty { 0 } else { outer.iter().map(|(count, ..)| count).product() };
        Runs { at: vec![0; outer.len()], outer, offsets, run, left: count }
    }

    /// The elements of each run.
    pub(crate) fn run_len(&self) -> u64 {
        self.run
    }
}

impl Iterator for Runs {
    type Item = (u64, u64);

    fn next(&mut self) -> Option<Self::Item> {
        self.left = self.left.checked_sub(1)?;
        let run = self.offsets;
        for (at, (len, left, right)) in self.at.iter_mut().zip(&self.outer).rev() {
            *at += 1;
            self.offsets.0 += left;
            self.offsets.1 += right;
            if *at < *len {
                break;
            }
            self.offsets.0 -= left * len;
            self.offsets.1 -= right * len;
            *at = 0;
        }
        Some(run)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn boxes_meet_where_both_are() {
        let left = Extent::new(&[0, 2], &[4, 4]);
        let right = Extent::new(&[3, 0], &[4, 3]);
        assert_eq!(left.intersection(&right), Some(Extent::new(&[3, 2], &[1, 1])));
        assert!(left.overlaps(&right));
        let beside = Extent::new(&[4, 0], &[1, 9]);
        assert_eq!(left.intersection(&beside), None);
        assert!(!left.overlaps(&beside));
        let scalar = Extent::whole(&[]);
        assert_eq!(scalar.intersection(&scalar), Some(scalar.clone()));
        assert_eq!((scalar.elements(), scalar.to_string()), (1, "[]".to_owned()));
    }

    #[test]
    fn what_lies_alike_on_both_sides_is_one_run() {
        let all = Extent::whole(&[3, 4, 5]);
        let runs = |part: &Extent| {
            let runs = Extent::runs(part, &all, part);
            (runs.run_len(), runs.collect::<Vec<_>>())
        };
        assert_eq!(runs(&all), (60, vec![(0, 0)]));
        assert_eq!(runs(&Extent::new(&[1, 0, 0], &[2, 4, 5])), (40, vec![(20, 0)]));
        assert_eq!(runs(&Extent::new(&[1, 2, 0], &[2, 2, 5])), (10, vec![(30, 0), (50, 10)]));
        assert_eq!(runs(&Extent::new(&[2, 1, 3], &[1, 2, 2])), (2, vec![(48, 0), (53, 2)]));
        assert_eq!(runs(&Extent::new(&[2, 1, 3], &[1, 0, 2])).1, []);
        let scalar = Extent::whole(&[]);
        assert_eq!(Extent::runs(&scalar, &scalar, &scalar).collect::<Vec<_>>(), [(0, 0)]);
    }

    #[test]
    fn parts_of_a_box_are_even_and_in_order() {
        let parts = Extent::new(&[2, 3, 0], &[1, 10, 4]).cut(3);
        let expected = [(3, 3), (6, 3), (9, 4)].map(|(s, l)| Extent::new(&[2, s, 0], &[1, l, 4]));
        assert_eq!(parts, expected);
        assert_eq!(Extent::whole(&[2, 7]).cut(9).len(), 2);
        assert_eq!(Extent::whole(&[]).cut(9), [Extent::whole(&[])]);
    }

    #[test]
    fn numbers_without_end_are_no_box() {
        assert!(!Extent::new(&[u64::MAX], &[1]).fits(&[u64::MAX]));
        assert!(!Extent::new(&[0], &[1, 1]).fits(&[1]));
        assert_eq!(elements(&[1 << 40, 1 << 40]), None);
        assert_eq!(Extent::whole(&[1 << 40, 1 << 40]).elements(), u64::MAX);
    }
}
