//! Norms that come out the same however the flat storage is sharded.
//!
//! Every parameter is cut into cells at the multiples of [`BLOCK_LEN`]; a rank's segment is whole blocks, so
//! a cell lies on one rank. A cell's sum of squares is computed in a fixed order in f64, the ranks gather the
//! sums of all cells, and everybody adds them in storage order. So the norm has the same bits on every rank,
//! for every world size and ZeRO stage.

use std::ops::Range;

use phalanx_comm::{Group, Region};

use super::plan::{Plan, BLOCK_LEN};
use crate::shard::Sharding;
use crate::Result;

/// Of which power of their elements' magnitudes cells are summed.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Power {
    /// Of the first.
    One,
    /// Of the second.
    Two,
    /// Of another one.
    Of(f64),
    /// The largest magnitude takes the place of a sum.
    Max,
}

impl Power {
    /// That of the `p`-norm.
    pub(crate) fn of(p: f64) -> Self {
        match p {
            1.0 => Self::One,
            2.0 => Self::Two,
            _ if p.is_infinite() => Self::Max,
            _ => Self::Of(p),
        }
    }

    /// The norm of everything, of the cells' sums in storage order.
    pub(crate) fn norm(self, sums: impl Iterator<Item = f64>) -> f64 {
        match self {
            Self::One => sums.sum(),
            Self::Two => sums.sum::<f64>().sqrt(),
            Self::Of(p) => sums.sum::<f64>().powf(p.recip()),
            Self::Max => sums.fold(0.0, larger),
        }
    }
}

/// The larger of two magnitudes; no number if either is none.
fn larger(left: f64, right: f64) -> f64 {
    if left.is_nan() || right <= left {
        left
    } else {
        right
    }
}

/// Sum of powers in f64, in the order of [`sum_of_squares`].
pub(crate) fn power_sum<T: Copy>(values: &[T], to_f64: impl Fn(T) -> f64, power: Power) -> f64 {
    match power {
        Power::One => folded(values, |value| to_f64(value).abs(), |sum, x| sum + x),
        Power::Two => sum_of_squares(values, to_f64),
        Power::Of(p) => folded(values, |value| to_f64(value).abs().powf(p), |sum, x| sum + x),
        Power::Max => folded(values, |value| to_f64(value).abs(), larger),
    }
}

/// Folds from zero: lane by lane, then the lanes in order.
fn folded<T: Copy>(values: &[T], of: impl Fn(T) -> f64, fold: impl Fn(f64, f64) -> f64) -> f64 {
    let mut lanes = [0.0_f64; LANES];
    let chunks = values.chunks_exact(LANES);
    let rest = chunks.remainder();
    for chunk in std::iter::once(rest).chain(chunks) {
        for (lane, &value) in lanes.iter_mut().zip(chunk) {
            *lane = fold(*lane, of(value));
        }
    }
    lanes.into_iter().fold(0.0, fold)
}

/// Independent sums per cell: two AVX-512 registers of f64, so that the additions overlap.
const LANES: usize = 16;

/// Sum of squares in f64: lane by lane, then the lanes in order.
pub(crate) fn sum_of_squares<T: Copy>(values: &[T], to_f64: impl Fn(T) -> f64) -> f64 {
    let mut lanes = [0.0_f64; LANES];
    let chunks = values.chunks_exact(LANES);
    for (lane, &value) in lanes.iter_mut().zip(chunks.remainder()) {
        let value = to_f64(value);
        *lane += value * value;
    }
    for chunk in chunks {
        for (lane, &value) in lanes.iter_mut().zip(chunk) {
            let value = to_f64(value);
            *lane += value * value;
        }
    }
    lanes.iter().sum()
}

/// A part of a parameter inside one block.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Cell {
    pub(crate) parameter: usize,
    pub(crate) storage: usize,
    pub(crate) range: Range<usize>,
}

/// The cells of parameters inside `owned` (elements of a storage), in storage order. Pure.
fn cells_of(plan: &Plan, bucket: usize, owned: &Range<usize>) -> Vec<Cell> {
    let mut cells = Vec::new();
    for &parameter in &plan.buckets[bucket].parameters {
        let place = &plan.places[parameter];
        let mut start = place.range.start.max(owned.start);
        let end = place.range.end.min(owned.end);
        while start < end {
            let cut = (start + 1).next_multiple_of(BLOCK_LEN).min(end);
            cells.push(Cell { parameter, storage: place.storage, range: start..cut });
            start = cut;
        }
    }
    cells
}

/// All cells of the model, and which of them this rank computes.
#[derive(Debug)]
pub(crate) struct Cells {
    /// This rank's, in storage order within each bucket.
    pub(crate) mine: Vec<Cell>,
    /// For each cell of the model, by bucket, rank and position: its parameter, and its slot among the
    /// gathered sums.
    all: Vec<(usize, usize)>,
    /// Where sums are gathered; nothing when this rank computes all.
    gathered: Option<Region<f64>>,
}

impl Cells {
    /// Collective under ZeRO: allocates the memory for gathering.
    pub(crate) fn new(plan: &Plan, sharding: Sharding, group: &mut Group) -> Result<Self> {
        let (rank, world_size) = (sharding.part(), sharding.parts());
        let mut per_rank: Vec<Vec<Cell>> = vec![Vec::new(); world_size];
        let mut all = Vec::new();
        for (index, bucket) in plan.buckets.iter().enumerate() {
            for (owner, cells) in per_rank.iter_mut().enumerate() {
                for cell in cells_of(plan, index, &bucket.segment(owner, world_size)) {
                    all.push((cell.parameter, owner, cells.len()));
                    cells.push(cell);
                }
            }
        }
        let stride = per_rank.iter().map(Vec::len).max().unwrap_or(0);
        let all = all.into_iter().map(|(p, owner, at)| (p, owner * stride + at)).collect();
        let gathered = match world_size {
            1 => None,
            parts => Some(group.allocate_on_host(parts * stride)?),
        };
        Ok(Self { mine: per_rank.swap_remove(rank), all, gathered })
    }

    /// Where this rank's cells lie.
    pub(crate) fn places(&self) -> Vec<(usize, Range<usize>)> {
        self.mine.iter().map(|cell| (cell.storage, cell.range.clone())).collect()
    }

    /// Takes the sums of this rank's cells to (parameter, sum) of every cell of the model. Collective
    /// under ZeRO.
    pub(crate) fn gather(&self, group: &mut Group, sums: &[f64]) -> Result<Vec<(usize, f64)>> {
        let Some(region) = &self.gathered else {
            return Ok(self.all.iter().map(|&(parameter, slot)| (parameter, sums[slot])).collect());
        };
        let stride = region.len() / group.world_size();
        region.write(group.rank() * stride, sums);
        group.tagged("norms").all_gather_in_place(region.full())?.wait()?;
        let gathered = region.read(0..region.len());
        Ok(self.all.iter().map(|&(parameter, slot)| (parameter, gathered[slot])).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::plan::{Caps, Extent};

    #[test]
    fn the_sum_is_right_for_every_remainder() {
        for len in 0..50_u16 {
            let values: Vec<f32> = (0..len).map(f32::from).collect();
            let expected: u32 = (0..u32::from(len)).map(|x| x * x).sum();
            let sum = sum_of_squares(&values, f64::from);
            assert!(sum.to_bits() == f64::from(expected).to_bits(), "{len}: {sum}");
        }
    }

    #[test]
    fn norms_are_those_of_the_values() {
        let values = [3.0_f32, -4.0, 0.5, -0.25];
        for (p, expected) in [(1.0, 7.75), (2.0, 25.3125_f64.sqrt()), (f64::INFINITY, 4.0)] {
            let power = Power::of(p);
            let sums = values.chunks(3).map(|cell| power_sum(cell, f64::from, power));
            assert!((power.norm(sums) - expected).abs() <= f64::EPSILON * expected, "{p}");
        }
        let cubes = (27.0 + 64.0 + 0.125 + 1.0 / 64.0_f64).cbrt();
        let sum = power_sum(&values, f64::from, Power::of(3.0));
        assert!(
            (Power::of(3.0).norm([sum].into_iter()) - cubes).abs() <= 8.0 * f64::EPSILON * cubes
        );
        for p in [1.0, 2.0, 2.5, f64::INFINITY] {
            for at in 0..40 {
                let mut spoilt = [1.0_f32; 40];
                spoilt[at] = f32::NAN;
                let power = Power::of(p);
                let sums = [power_sum(&spoilt, f64::from, power), 1.0];
                assert!(power.norm(sums.into_iter()).is_nan(), "{p}: {at}");
            }
        }
    }

    #[test]
    fn cells_are_the_same_however_a_bucket_is_cut() {
        let lens = [5000, 64, 1, 9000, 2048, 77];
        let extents: Vec<Extent> =
            lens.iter().map(|&len| Extent { len, element_bytes: 4, storage: 0 }).collect();
        let order = [5, 4, 3, 2, 1, 0];
        let relative = |world_size: usize, plan: &Plan| {
            let mut cells = Vec::new();
            for (index, bucket) in plan.buckets.iter().enumerate() {
                for rank in 0..world_size {
                    for cell in cells_of(plan, index, &bucket.segment(rank, world_size)) {
                        cells.push((cell.parameter, cell.range.start - bucket.range.start));
                    }
                }
            }
            // Inside a segment cells come by parameter, and parameters lie in that order.
            cells
        };
        let plan_for = |world_size| {
            Plan::new(&extents, &order, Caps { bucket_bytes: &[8000, 30000], world_size })
        };
        let whole = relative(1, &plan_for(1));
        for world_size in [2, 3, 4, 7] {
            assert_eq!(relative(world_size, &plan_for(world_size)), whole, "{world_size} ranks");
        }
    }
}
