//! Sums of powers on a GPU: few kernels over whole buckets, and one copy to the host.
//!
//! Rows of [`ROW`] elements are summed in f64, then the rows of each part. Parameters start at multiples of
//! [`ROW`] and are padded with zeros, so a row belongs to one part. The order of a sum is fixed, but it is not
//! the CPU's.

use std::ops::Range;

use tch::{Kind, Tensor};

use super::norm::{NormPart, Power};
use super::plan::PARAMETER_ALIGNMENT_LEN as ROW;
use crate::Result;

/// Elements that are squared at once: bounds the f64 copy.
const ELEMENTS_MAX: usize = 16 << 20;

/// Neighbouring cells of one storage, from row to row.
#[derive(Debug, Default, PartialEq, Eq)]
struct Stretch {
    storage: usize,
    rows: Range<usize>,
    /// Rows of each segment.
    lengths: Vec<i64>,
    /// Which segments are cells; the others are gaps.
    is_cell: Vec<bool>,
}

/// Cuts cells into stretches, in order. Pure.
fn stretches(cells: &[(usize, Range<usize>)]) -> Vec<Stretch> {
    let mut all: Vec<Stretch> = Vec::new();
    for (storage, range) in cells {
        let rows = range.start / ROW..range.end.div_ceil(ROW);
        let fits = |stretch: &&mut Stretch| {
            stretch.storage == *storage
                && stretch.rows.end <= rows.start
                && (rows.end - stretch.rows.start) * ROW <= ELEMENTS_MAX
        };
        let stretch = match all.last_mut().filter(fits) {
            Some(last) => last,
            None => {
                let start = rows.start..rows.start;
                all.push(Stretch { storage: *storage, rows: start, ..Stretch::default() });
                match all.last_mut() {
                    Some(last) => last,
                    None => continue,
                }
            }
        };
        if rows.start > stretch.rows.end {
            stretch.lengths.push(as_i64(rows.start - stretch.rows.end));
            stretch.is_cell.push(false);
        }
        stretch.lengths.push(as_i64(rows.len()));
        stretch.is_cell.push(true);
        stretch.rows.end = rows.end;
    }
    all
}

fn as_i64(rows: usize) -> i64 {
    i64::try_from(rows).unwrap_or(i64::MAX)
}

/// Sums of powers of `parts`, or what is largest in them.
pub(crate) fn power_sums(parts: &[&NormPart<'_>], power: Power) -> Result<Vec<f64>> {
    let mut cells: Vec<(usize, Range<usize>)> = Vec::with_capacity(parts.len());
    for (at, part) in parts.iter().enumerate() {
        let before = cells.last().map(|(storage, _)| *storage);
        let storage = before.filter(|&of| std::ptr::eq(parts[of].memory, part.memory));
        cells.push((storage.unwrap_or(at), part.range.clone()));
    }
    let cells = &cells;
    let stretches = stretches(cells);
    let mut sums = Vec::new();
    for stretch in &stretches {
        let storage = parts[stretch.storage].memory;
        let values = storage.range(&(stretch.rows.start * ROW..stretch.rows.end * ROW))?;
        let rows = of_rows(&values.f_view([-1, as_i64(ROW)])?.f_to_kind(Kind::Double)?, power)?;
        let lengths = Tensor::f_from_slice(&stretch.lengths)?.f_to_device(storage.device())?;
        let none: Option<Tensor> = None;
        let sum = Tensor::f_segment_reduce(
            &rows,
            if power == Power::Max { "max" } else { "sum" },
            Some(&lengths),
            none.as_ref(),
            none.as_ref(),
            0,
            false,
            0.0,
        )?;
        sums.push(sum);
    }
    if sums.is_empty() {
        return Ok(Vec::new());
    }
    // One copy for all: each costs a round trip to the device.
    let sums = Tensor::f_cat(&sums, 0)?.f_to_device(tch::Device::Cpu)?;
    let sums: Vec<f64> = Vec::try_from(&sums)?;
    let is_cell = stretches.iter().flat_map(|stretch| &stretch.is_cell);
    Ok(sums.into_iter().zip(is_cell).filter(|(_, is_cell)| **is_cell).map(|(sum, _)| sum).collect())
}

/// What each row comes to.
fn of_rows(values: &Tensor, power: Power) -> Result<Tensor> {
    let powers = match power {
        Power::One => values.f_abs()?,
        Power::Two => values.f_square()?,
        Power::Of(p) => values.f_abs()?.f_pow_tensor_scalar(p)?,
        Power::Max => return Ok(values.f_abs()?.f_amax([1_i64].as_slice(), false)?),
    };
    Ok(powers.f_sum_dim_intlist(1, false, Kind::Double)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::flat::Flat;
    use crate::store::norm;

    #[test]
    fn sums_are_those_of_the_cells() {
        let mut values = vec![0.0_f32; 64 * 40];
        // Cells of odd lengths from aligned places, padding between them zero, a gap of rows.
        let cells = [(0, 0..70), (1, 128..192), (2, 640..641), (3, 704..2560)];
        for (_, range) in &cells {
            for index in range.clone() {
                values[index] = f32::from(u8::try_from(index % 7).unwrap()) - 3.0;
            }
        }
        let storage = Flat::private(Kind::Float, tch::Device::Cpu, values.len()).unwrap();
        let mut target = storage.range(&(0..values.len())).unwrap();
        target.copy_(&Tensor::from_slice(&values));
        let parts = cells.map(|(sum, range)| NormPart { memory: &storage, range, sum });
        for power in [Power::One, Power::Two, Power::Of(3.0), Power::Max] {
            let on_cpu = norm::of(&parts, 4, power).unwrap().values();
            let by_rows = power_sums(&parts.each_ref(), power).unwrap();
            assert_eq!(by_rows, on_cpu, "sums of small integers are exact: {power:?}");
        }
    }

    #[test]
    fn other_storages_and_long_stretches_begin_anew() {
        let far = 2 * ELEMENTS_MAX;
        let all =
            stretches(&[(0, 0..64), (1, 64..128), (1, far..far + 64), (1, far + 64..far + 65)]);
        let shape: Vec<(usize, usize)> = all.iter().map(|s| (s.storage, s.rows.len())).collect();
        assert_eq!(shape, [(0, 1), (1, 1), (1, 2)]);
        assert!(power_sums(&[], Power::Two).unwrap().is_empty());
    }
}
