//! Thin matrices: columns made orthonormal, products, and first values. Pure: the same bits on every processor.

/// A column whose norm shrinks to this share of itself is what rounding left of one that depends on those before it.
pub(super) const DEPENDENT: f64 = 1e-6;

/// Makes the columns of a matrix of `columns` columns, row by row in memory, orthonormal: Gram–Schmidt, each column twice against those before it, with
/// sums in f64. A column that depends on those before it becomes zero. 4 · rows · columns² operations.
///
/// Source: Golub and Van Loan, "Matrix Computations", 5.2; "twice is enough" is Kahan's and Parlett's.
pub(super) fn orthonormalise(matrix: &mut [f32], columns: usize) {
    let mut done: Vec<Vec<f32>> = Vec::with_capacity(columns);
    for index in 0..columns {
        let mut column: Vec<f32> = matrix.iter().skip(index).step_by(columns).copied().collect();
        let before = dot(&column, &column).sqrt();
        for _ in 0..2 {
            for other in &done {
                let along = dot(other, &column);
                for (value, &of_other) in column.iter_mut().zip(other) {
                    *value = rounded(f64::from(*value) - along * f64::from(of_other));
                }
            }
        }
        let norm = dot(&column, &column).sqrt();
        let inverse = if norm <= DEPENDENT * before { 0.0 } else { 1.0 / norm };
        for (value, at) in column.iter_mut().zip(matrix.iter_mut().skip(index).step_by(columns)) {
            *value = rounded(f64::from(*value) * inverse);
            *at = *value;
        }
        done.push(column);
    }
}

/// The product of `p` [rows, rank] and the transpose of `q` [columns, rank], row by row to `product`; with `lost`, adds there what
/// `product` had before, less the product.
pub(super) fn expand(
    (p, q): (&[f32], &[f32]),
    rank: usize,
    product: &mut [f32],
    lost: Option<&mut [f32]>,
) {
    let columns = q.len() / rank.max(1);
    // Its columns, which then run along the rows of the product.
    let transposed: Vec<Vec<f32>> =
        (0..rank).map(|k| q.iter().skip(k).step_by(rank).copied().collect()).collect();
    let mut row = vec![0.0_f32; columns];
    let mut lost = lost.map(|lost| lost.chunks_mut(columns));
    for (factors, out) in p.chunks(rank).zip(product.chunks_mut(columns)) {
        row.fill(0.0);
        for (&factor, along) in factors.iter().zip(&transposed) {
            for (value, &of_column) in row.iter_mut().zip(along) {
                *value += factor * of_column;
            }
        }
        if let Some(of_row) = lost.as_mut().and_then(Iterator::next) {
            for ((rest, &before), &value) in of_row.iter_mut().zip(out.iter()).zip(&row) {
                *rest += before - value;
            }
        }
        out.copy_from_slice(&row);
    }
}

/// A number in [−1, 1] that depends on a seed, a name and an index alone: k/1024 with k from FNV-1a of seed and name and the finaliser of murmur3.
#[expect(clippy::cast_possible_truncation, reason = "the lower half of an index is as good")]
pub(super) fn first_value(seed: u64, name: &str, index: usize) -> f32 {
    let fnv = |x: u32, byte: u8| (x ^ u32::from(byte)).wrapping_mul(0x0100_0193);
    let bytes = seed.to_le_bytes().into_iter().chain(name.bytes());
    let mut x = bytes.fold(0x811C_9DC5, fnv).wrapping_add((index as u32).wrapping_mul(0x9E37_79B1));
    x = (x ^ (x >> 16)).wrapping_mul(0x85EB_CA6B);
    x = (x ^ (x >> 13)).wrapping_mul(0xC2B2_AE35);
    x ^= x >> 16;
    (f32::from((x % 2049) as u16) - 1024.0) / 1024.0
}

fn dot(left: &[f32], right: &[f32]) -> f64 {
    left.iter().zip(right).map(|(&l, &r)| f64::from(l) * f64::from(r)).sum()
}

#[expect(clippy::cast_possible_truncation, reason = "values are kept in f32")]
fn rounded(value: f64) -> f32 {
    value as f32
}

#[cfg(test)]
#[expect(clippy::cast_precision_loss, reason = "small numbers")]
#[expect(clippy::float_cmp, clippy::shadow_unrelated, reason = "exact values, case by case")]
mod tests {
    use super::*;

    fn made(rows: usize, columns: usize) -> Vec<f32> {
        (0..rows * columns).map(|index| first_value(3, "m", index)).collect()
    }

    fn column(matrix: &[f32], columns: usize, index: usize) -> Vec<f32> {
        matrix.iter().skip(index).step_by(columns).copied().collect()
    }

    #[test]
    fn columns_become_orthonormal_and_span_what_they_spanned() {
        for (rows, columns) in [(1, 1), (5, 1), (4, 4), (1000, 7)] {
            let before = made(rows, columns);
            let mut after = before.clone();
            orthonormalise(&mut after, columns);
            // A column's rounding, and that of the one it is compared with.
            let bound = 4.0 * f64::from(f32::EPSILON);
            for left in 0..columns {
                for right in 0..columns {
                    let one = f64::from(u8::from(left == right));
                    let product =
                        dot(&column(&after, columns, left), &column(&after, columns, right));
                    assert!((product - one).abs() < bound, "{rows}x{columns}: {left} {right}");
                }
                // What is left of a column after its parts along the new ones.
                let old = column(&before, columns, left);
                let mut rest: Vec<f64> = old.iter().map(|&x| f64::from(x)).collect();
                for other in 0..=left {
                    let other = column(&after, columns, other);
                    let along = dot(&other, &old);
                    rest.iter_mut().zip(&other).for_each(|(r, &o)| *r -= along * f64::from(o));
                }
                let off = rest.iter().map(|r| r * r).sum::<f64>().sqrt();
                let bound = 8.0 * (columns as f64) * f64::from(f32::EPSILON);
                assert!(off <= bound * dot(&old, &old).sqrt(), "{rows}x{columns}: {left}: {off}");
            }
        }
    }

    #[test]
    fn columns_that_depend_on_others_and_zero_ones_become_zero() {
        let mut matrix = Vec::new();
        for row in 0..50 {
            let (a, b) = (first_value(1, "a", row), first_value(1, "b", row));
            matrix.extend([a, 0.0, 2.0 * a, b, a - 3.0 * b]);
        }
        orthonormalise(&mut matrix, 5);
        let norm = |index| dot(&column(&matrix, 5, index), &column(&matrix, 5, index));
        assert!([0, 3].iter().all(|&index| (norm(index) - 1.0).abs() < 1e-6));
        assert!([1, 2, 4].iter().all(|&index| norm(index) == 0.0));
    }

    #[test]
    fn a_product_is_the_sum_of_its_columns_products_and_the_rest_is_lost() {
        let (rows, columns, rank) = (7, 33, 3);
        let (p, q) = (made(rows, rank), made(columns, rank));
        let before: Vec<f32> = (0..rows * columns).map(|i| i as f32 * 0.01).collect();
        let (mut product, mut lost) = (before.clone(), vec![1.0; rows * columns]);
        expand((&p, &q), rank, &mut product, Some(&mut lost));
        for row in 0..rows {
            for column in 0..columns {
                let exact: f64 = (0..rank)
                    .map(|k| f64::from(p[row * rank + k]) * f64::from(q[column * rank + k]))
                    .sum();
                let at = row * columns + column;
                // Values of at most 1: `rank` products and sums.
                assert!((f64::from(product[at]) - exact).abs() <= 9.0 * f64::from(f32::EPSILON));
                assert_eq!(lost[at], 1.0 + (before[at] - product[at]));
            }
        }
    }
}
