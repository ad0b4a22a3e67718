//! Which parameters of a bucket are matrices worth compressing, and where what travels of each lies. Pure.

use std::ops::Range;

use crate::hooks::Placed;

/// A matrix: its rows lie one after the other in memory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Matrix {
    /// Which parameter of the bucket.
    pub(super) parameter: usize,
    pub(super) rows: usize,
    pub(super) columns: usize,
    pub(super) rank: usize,
    /// Elements of the bucket.
    pub(super) range: Range<usize>,
    /// Elements of what travels first, [rows, rank].
    pub(super) p: Range<usize>,
    /// Elements of what travels second, [columns, rank].
    pub(super) q: Range<usize>,
}

/// What travels of a bucket.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Parts {
    pub(super) matrices: Vec<Matrix>,
    /// The rest, as it is: elements of the bucket, and of what travels first.
    pub(super) rest: Vec<(Range<usize>, Range<usize>)>,
    pub(super) first_len: usize,
    pub(super) second_len: usize,
}

impl Parts {
    /// A parameter is a matrix of the size of its outermost dimension in memory; it is compressed if it has `min_compression` times as many elements as what would
    /// travel of it.
    pub(super) fn of(parameters: &[Placed], rank: usize, min_compression: f64) -> Self {
        let mut parts = Self::default();
        for (parameter, placed) in parameters.iter().enumerate() {
            let len = placed.range.len();
            let rows = outermost(placed);
            let columns = len / rows.max(1);
            let rank = rank.min(rows).min(columns);
            if !is_worthwhile((rows, columns), rank, min_compression) {
                let end = parts.first_len + len;
                parts.rest.push((placed.range.clone(), parts.first_len..end));
                parts.first_len = end;
                continue;
            }
            let (p, q) = (parts.first_len + rows * rank, parts.second_len + columns * rank);
            parts.matrices.push(Matrix {
                parameter,
                rows,
                columns,
                rank,
                range: placed.range.clone(),
                p: parts.first_len..p,
                q: parts.second_len..q,
            });
            (parts.first_len, parts.second_len) = (p, q);
        }
        parts
    }
}

#[expect(clippy::cast_precision_loss, reason = "sizes of parameters are far below 2^53")]
fn is_worthwhile((rows, columns): (usize, usize), rank: usize, min_compression: f64) -> bool {
    ((rows + columns) * rank) as f64 * min_compression < (rows * columns) as f64
}

/// The size of the dimension with the largest stride: of a contiguous parameter the first.
fn outermost(placed: &Placed) -> usize {
    let dims = placed.shape.iter().zip(&placed.strides).filter(|(&size, _)| size != 1);
    let widest = dims.max_by_key(|&(_, &stride)| stride);
    widest.map_or(1, |(&size, _)| usize::try_from(size).unwrap_or(1))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn placed(shape: &[i64], strides: &[i64], start: usize) -> Placed {
        let len = usize::try_from(shape.iter().product::<i64>()).unwrap();
        let (shape, strides) = (shape.to_vec(), strides.to_vec());
        Placed { name: String::new(), shape, strides, range: start..start + len }
    }

    #[test]
    fn matrices_that_shrink_enough_are_compressed_and_the_rest_travels_as_it_is() {
        let all = [
            placed(&[13, 5], &[5, 1], 0),
            placed(&[40], &[1], 128),
            placed(&[16, 4, 3, 3], &[36, 1, 12, 4], 192), // channels last
            placed(&[2, 2], &[2, 1], 1024),
            placed(&[5, 13], &[1, 5], 1088), // transposed
            placed(&[], &[], 1200),
        ];
        let parts = Parts::of(&all, 1, 2.0);
        let sizes: Vec<_> = parts.matrices.iter().map(|m| (m.rows, m.columns, m.rank)).collect();
        assert_eq!(sizes, [(13, 5, 1), (16, 36, 1), (13, 5, 1)]);
        assert_eq!(parts.first_len, 13 + 40 + 16 + 4 + 13 + 1);
        assert_eq!(parts.second_len, 5 + 36 + 5);
        let rest: Vec<_> = parts.rest.iter().map(|(range, _)| range.start).collect();
        assert_eq!(rest, [128, 1024, 1200]);
        // (16 + 36) · 8 is less than 16 · 36, but not by half.
        assert_eq!(Parts::of(&all, 8, 2.0).matrices, []);
        assert_eq!(Parts::of(&all, 8, 1.0).matrices.len(), 1);
    }
}
