//! A parameter that is a part of a larger tensor, of which other ranks have the other parts. Pure.

use std::ops::Range;

/// Which part of a tensor a variable is: ranges of one dimension, one behind the other in the variable.
///
/// A matrix that is cut over two ranks by rows is two variables with one range each; of a matrix that holds queries, keys and values side by
/// side, each rank's variable is three ranges.
///
/// # Example
/// ```
/// use phalanx_ddp_core::Cut;
///
/// // Rows 4 to 7 of a matrix of 8 by 3.
/// let cut = Cut::new(&[8, 3], 0, vec![4..8]);
/// assert_eq!(cut.part_shape(), [4, 3]);
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cut {
    shape: Vec<i64>,
    dim: usize,
    ranges: Vec<Range<i64>>,
}

impl Cut {
    /// `ranges` of dimension `dim` of a tensor of `shape`, inside of it and none of them empty.
    ///
    /// # Panics
    /// Where they are not.
    #[must_use]
    pub fn new(shape: &[i64], dim: usize, ranges: Vec<Range<i64>>) -> Self {
        let len = shape[dim];
        let fits =
            |range: &Range<i64>| 0 <= range.start && range.start < range.end && range.end <= len;
        assert!(!ranges.is_empty() && ranges.iter().all(fits), "{ranges:?} of {shape:?}, {dim}");
        Self { shape: shape.to_vec(), dim, ranges }
    }

    /// Shape of the whole tensor.
    #[must_use]
    pub fn shape(&self) -> &[i64] {
        &self.shape
    }

    /// The dimension that is cut.
    #[must_use]
    pub fn dim(&self) -> usize {
        self.dim
    }

    /// Which indices of that dimension are in the variable, in its order.
    #[must_use]
    pub fn ranges(&self) -> &[Range<i64>] {
        &self.ranges
    }

    /// Shape of the variable.
    #[must_use]
    pub fn part_shape(&self) -> Vec<i64> {
        let mut shape = self.shape.clone();
        shape[self.dim] = self.ranges.iter().map(|range| range.end - range.start).sum();
        shape
    }
}
