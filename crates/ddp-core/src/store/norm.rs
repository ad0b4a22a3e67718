//! Sums of squares that come out the same however the flat storage is laid out and sharded.
//!
//! A parameter starts at a multiple of 64 elements, and a rank's segment is whole blocks of more: so a chunk of 64 elements,
//! counted from the parameter's start, is on one rank, in whatever layout. Its squares are summed in a fixed order in f64, and the
//! sums of chunks are added exactly ([`ExactSum`]), over the ranks too. So a norm has the same bits on every rank, for
//! every world size, ZeRO stage and layout. On a GPU the sums of chunks are the GPU's own.

use std::ops::Range;

use half::{bf16, f16};
use phalanx_comm::{Group, Sum};
use tch::Kind;

use super::device_norm;
use super::exact::{ExactSum, WORDS};
use super::flat::Flat;
use super::plan::PARAMETER_ALIGNMENT_LEN as CHUNK_LEN;
use crate::Result;

/// Independent sums of a chunk: additions overlap.
const LANES: usize = 8;

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

    /// The norm of everything, of the sum (or largest) of its powers.
    pub(crate) fn norm(self, sum: f64) -> f64 {
        match self {
            Self::One | Self::Max => sum,
            Self::Two => sum.sqrt(),
            Self::Of(p) => sum.powf(p.recip()),
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

/// Elements of a flat memory, from a multiple of [`CHUNK_LEN`] of their parameter on, and the number of the sum that they go to.
#[derive(Debug)]
pub(crate) struct NormPart<'a> {
    pub(crate) memory: &'a Flat,
    pub(crate) range: Range<usize>,
    pub(crate) sum: usize,
}

/// What parts have come to on this rank.
#[derive(Debug)]
pub(crate) enum Own {
    Sums(Vec<ExactSum>),
    Largest(Vec<f64>),
}

/// What the powers of `parts` come to, by the numbers of their sums, which are below `count`.
pub(crate) fn of(parts: &[NormPart<'_>], count: usize, power: Power) -> Result<Own> {
    let mut own = match power {
        Power::Max => Own::Largest(vec![0.0; count]),
        _ => Own::Sums(vec![ExactSum::default(); count]),
    };
    let (on_gpu, on_host): (Vec<&NormPart<'_>>, Vec<&NormPart<'_>>) =
        parts.iter().partition(|part| part.memory.device().is_cuda());
    for (part, value) in on_gpu.iter().zip(device_norm::power_sums(&on_gpu, power)?) {
        own.take(part.sum, value);
    }
    for NormPart { memory, range, sum } in on_host {
        match memory.kind() {
            Kind::Double => own.add((*sum, power), memory.elements::<f64>(range), |x| x),
            Kind::Half => own.add((*sum, power), memory.elements(range), f16::to_f64),
            Kind::BFloat16 => own.add((*sum, power), memory.elements(range), bf16::to_f64),
            _ => own.add((*sum, power), memory.elements::<f32>(range), f64::from),
        }
    }
    Ok(own)
}

impl Own {
    fn take(&mut self, sum: usize, value: f64) {
        match self {
            Self::Sums(sums) => sums[sum].add(value),
            Self::Largest(all) => all[sum] = larger(all[sum], value),
        }
    }

    /// Adds the powers of `values`, chunk by chunk.
    fn add<T: Copy>(
        &mut self,
        (sum, power): (usize, Power),
        values: &[T],
        to_f64: impl Fn(T) -> f64,
    ) {
        let (chunks, rest) = values.as_chunks::<CHUNK_LEN>();
        for chunk in chunks {
            self.take(sum, of_chunk(chunk, &to_f64, power));
        }
        if !rest.is_empty() {
            self.take(sum, of_chunk(rest, &to_f64, power));
        }
    }

    /// Both together.
    pub(crate) fn with(self, other: Self) -> Self {
        match (self, other) {
            (Self::Sums(mut sums), Self::Sums(others)) => {
                sums.iter_mut().zip(&others).for_each(|(sum, more)| sum.take_in(more));
                Self::Sums(sums)
            }
            (Self::Largest(mut all), Self::Largest(others)) => {
                all.iter_mut().zip(&others).for_each(|(one, more)| *one = larger(*one, *more));
                Self::Largest(all)
            }
            (own, _) => own,
        }
    }

    /// The values, where this rank has all.
    pub(crate) fn values(&self) -> Vec<f64> {
        match self {
            Self::Sums(sums) => sums.iter().map(ExactSum::value).collect(),
            Self::Largest(all) => all.clone(),
        }
    }
}

/// What a chunk comes to.
#[inline]
fn of_chunk<T: Copy>(values: &[T], to_f64: &impl Fn(T) -> f64, power: Power) -> f64 {
    match power {
        Power::Two => sum_of_squares(values, to_f64),
        Power::One => values.iter().map(|&value| to_f64(value).abs()).sum(),
        Power::Of(p) => values.iter().map(|&value| to_f64(value).abs().powf(p)).sum(),
        Power::Max => values.iter().map(|&value| to_f64(value).abs()).fold(0.0, larger),
    }
}

/// Sum of squares in f64: lane by lane, then the lanes in pairs. Zeros behind the values change nothing.
#[inline]
fn sum_of_squares<T: Copy>(values: &[T], to_f64: &impl Fn(T) -> f64) -> f64 {
    let mut lanes = [0.0_f64; LANES];
    let (rows, rest) = values.as_chunks::<LANES>();
    for row in rows {
        for (lane, &value) in lanes.iter_mut().zip(row) {
            let value = to_f64(value);
            *lane += value * value;
        }
    }
    for (lane, &value) in lanes.iter_mut().zip(rest) {
        let value = to_f64(value);
        *lane += value * value;
    }
    let [a, b, c, d, e, f, g, h] = lanes;
    ((a + e) + (c + g)) + ((b + f) + (d + h))
}

/// What parts on the ranks of `group` have come to together, exact still. Collective.
pub(crate) fn summed(group: &mut Group, own: Own) -> Result<Own> {
    match own {
        Own::Sums(sums) => {
            let mut words: Vec<i64> = sums.into_iter().flat_map(ExactSum::into_words).collect();
            group.tagged("norms").all_reduce(&mut words[..], Sum)?.wait()?;
            let of_all = words.chunks_exact(WORDS).filter_map(ExactSum::of_words);
            Ok(Own::Sums(of_all.collect()))
        }
        Own::Largest(mut all) => {
            let mine: Vec<u8> = all.iter().flat_map(|value| value.to_le_bytes()).collect();
            for of_rank in group.tagged("norms").all_gather_bytes(&mine)? {
                let (values, _) = of_rank.as_chunks::<8>();
                for (largest, &bytes) in all.iter_mut().zip(values) {
                    *largest = larger(*largest, f64::from_le_bytes(bytes));
                }
            }
            Ok(Own::Largest(all))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_sum_is_right_for_every_remainder() {
        for len in 0..200_u16 {
            let values: Vec<f32> = (0..len).map(f32::from).collect();
            let expected: u32 = (0..u32::from(len)).map(|x| x * x).sum();
            let mut sum = Own::Sums(vec![ExactSum::default()]);
            sum.add((0, Power::Two), &values, f64::from);
            assert!(sum.values()[0].to_bits() == f64::from(expected).to_bits(), "{len}");
        }
    }

    #[test]
    fn a_parameter_has_one_sum_however_it_is_cut_and_padded() {
        let values: Vec<f32> = (0..1000_u16).map(|at| (f32::from(at) * 0.37).sin()).collect();
        let sum = |parts: &[&[f32]], power: Power| {
            let mut sum = match power {
                Power::Max => Own::Largest(vec![0.0]),
                _ => Own::Sums(vec![ExactSum::default()]),
            };
            parts.iter().for_each(|part| sum.add((0, power), part, f64::from));
            sum.values()[0].to_bits()
        };
        let mut padded = values.clone();
        padded.resize(1024, 0.0);
        for power in [Power::One, Power::Two, Power::Of(3.0), Power::Max] {
            let whole = sum(&[&values], power);
            for cut in (0..1000).step_by(CHUNK_LEN) {
                assert_eq!(sum(&[&values[cut..], &values[..cut]], power), whole, "{power:?} {cut}");
            }
            assert_eq!(sum(&[&padded], power), whole, "{power:?}");
        }
        let with_nan = [1.0, f32::NAN, 2.0];
        assert!(f64::from_bits(sum(&[&with_nan], Power::Max)).is_nan());
    }
}
