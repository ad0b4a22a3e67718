//! A range of a tensor's memory as boxes. Pure.
//!
//! An optimizer that is sharded as ZeRO-1 has it owns flat ranges: elements `a..b` in the order of memory. In a dense tensor that
//! order is the tensor's own with dimensions permuted (channels-last is one such), and a range of it is: the rest of a first
//! slice, whole slices, the beginning of a last slice, where the two ends are ranges of one dimension less. That makes at most
//! `2 × dimensions − 1` boxes, no two of which make one together.

use std::ops::Range;

use crate::extent::{elements, Extent};
use crate::{Error, Result};

/// The boxes that elements `range` of a tensor's memory are, in the order of memory. Each is one run of that memory.
///
/// An empty range is no box, but of a tensor without elements it is that tensor: so each rank names it, and it is saved.
///
/// # Units
/// Strides and range are in elements. Strides are those of the whole tensor, which must be dense: some permutation of dimensions
/// makes it contiguous. The strides of dimensions of length 1 do not matter.
///
/// # Errors
/// [`Error::NotDense`]; [`Error::OutOfBounds`] when the range ends beyond the tensor.
///
/// # Example
/// ```
/// use phalanx_checkpoint::{flat_range, Extent};
/// let boxes = flat_range(&[3, 4], &[4, 1], 2..9)?;
/// assert_eq!(boxes.iter().map(Extent::to_string).collect::<Vec<_>>(), ["[0:1,2:4]", "[1:2,0:4]", "[2:3,0:1]"]);
/// # Ok::<(), phalanx_checkpoint::Error>(())
/// ```
pub fn flat_range(shape: &[u64], strides: &[u64], range: Range<u64>) -> Result<Vec<Extent>> {
    let not_dense = || Error::NotDense { shape: shape.to_vec(), strides: strides.to_vec() };
    let all = elements(shape).ok_or_else(not_dense)?;
    if range.end > all || range.start > range.end {
        let what = format!("elements {}..{} of a tensor of {all}", range.start, range.end);
        return Err(Error::OutOfBounds { what });
    }
    let order = memory_order(shape, strides).ok_or_else(not_dense)?;
    if all == 0 {
        return Ok(vec![Extent::whole(shape)]);
    }
    let mut boxes = Vec::new();
    if range.start < range.end {
        take(&order, shape, range, &mut Extent::whole(shape), &mut boxes);
    }
    Ok(boxes)
}

/// The dimensions longer than 1, slowest first, if they make the tensor dense.
fn memory_order(shape: &[u64], strides: &[u64]) -> Option<Vec<usize>> {
    if shape.len() != strides.len() {
        return None;
    }
    if shape.contains(&0) {
        return Some(Vec::new());
    }
    let mut order: Vec<usize> = (0..shape.len()).filter(|&at| shape[at] > 1).collect();
    order.sort_by_key(|&at| std::cmp::Reverse(strides[at]));
    let mut expected = 1;
    for &at in order.iter().rev() {
        if strides[at] != expected {
            return None;
        }
        expected *= shape[at];
    }
    Some(order)
}

/// Appends the boxes of a range that is not empty. `slice` is whole in the dimensions of `order`, before and after.
fn take(
    order: &[usize],
    shape: &[u64],
    range: Range<u64>,
    slice: &mut Extent,
    boxes: &mut Vec<Extent>,
) {
    let Some((&dimension, rest)) = order.split_first() else {
        return boxes.push(slice.clone());
    };
    let inner: u64 = rest.iter().map(|&at| shape[at]).product();
    let (mut first, last) = (range.start / inner, range.end / inner);
    let (head, tail) = (range.start % inner, range.end % inner);
    if head > 0 {
        slice.set(dimension, first, 1);
        take(rest, shape, head..if first == last { tail } else { inner }, slice, boxes);
        first += 1;
    }
    if first < last {
        boxes.push(slice.with(dimension, first, last - first));
    }
    if first <= last && tail > 0 {
        slice.set(dimension, last, 1);
        take(rest, shape, 0..tail, slice, boxes);
    }
    slice.set(dimension, 0, shape[dimension]);
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The place in memory of each element of a box.
    fn places(extent: &Extent, strides: &[u64]) -> Vec<u64> {
        let mut places = vec![0];
        for (range, stride) in extent.ranges().zip(strides) {
            places =
                places.iter().flat_map(|at| range.clone().map(move |i| at + i * stride)).collect();
        }
        places.sort_unstable();
        places
    }

    fn check(shape: &[u64], strides: &[u64]) {
        let all: u64 = shape.iter().product();
        for (from, until) in (0..=all).flat_map(|from| (from..=all).map(move |to| (from, to))) {
            let boxes = flat_range(shape, strides, from..until).unwrap();
            let found: Vec<u64> = boxes.iter().flat_map(|one| places(one, strides)).collect();
            assert_eq!(found, (from..until).collect::<Vec<_>>(), "{shape:?} {strides:?}");
            assert!(boxes.len() < 2 * shape.len().max(1), "{boxes:?}");
            for (n, one) in boxes.iter().enumerate() {
                assert!(one.fits(shape) && one.is_empty() == (all == 0));
                assert!(boxes[..n].iter().all(|other| !make_one(one, other)), "{boxes:?}");
            }
        }
    }

    /// Whether two boxes differ in one dimension alone and touch there.
    fn make_one(a: &Extent, b: &Extent) -> bool {
        let pairs: Vec<_> = a.ranges().zip(b.ranges()).filter(|(a, b)| a != b).collect();
        pairs.len() == 1
            && (pairs[0].0.end == pairs[0].1.start || pairs[0].1.end == pairs[0].0.start)
    }

    #[test]
    fn every_range_is_its_boxes_in_the_order_of_memory() {
        check(&[], &[]);
        check(&[7], &[1]);
        check(&[3, 4], &[4, 1]);
        check(&[3, 4], &[1, 3]);
        check(&[2, 3, 4], &[12, 4, 1]);
        // Channels last: shape N C H W, memory N H W C.
        check(&[2, 3, 2, 2], &[12, 1, 6, 3]);
        // Strides of dimensions of length 1 mean nothing.
        check(&[1, 5, 1, 2], &[77, 2, 0, 1]);
        check(&[3, 0, 2], &[0, 2, 1]);
    }

    #[test]
    fn memory_with_gaps_or_ranges_beyond_it_are_refused() {
        for (shape, strides) in [([2, 3], [4, 1]), ([2, 3], [1, 1]), ([2, 3], [0, 1])] {
            let error = flat_range(&shape, &strides, 0..1).unwrap_err();
            assert!(matches!(error, Error::NotDense { .. }), "{error}");
        }
        assert!(matches!(flat_range(&[2], &[1, 1], 0..1), Err(Error::NotDense { .. })));
        assert!(matches!(flat_range(&[2], &[1], 1..3), Err(Error::OutOfBounds { .. })));
        let huge = flat_range(&[1 << 63, 4], &[4, 1], 0..1);
        assert!(matches!(huge, Err(Error::NotDense { .. })));
    }
}
