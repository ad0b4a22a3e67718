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

/// Elements of a flat memory, from a multiple of [`CHUNK_LEN`] of their parameter on, and the number of the sum that they go to.
#[derive(Debug)]
pub(crate) struct Part<'a> {
    pub(crate) memory: &'a Flat,
    pub(crate) range: Range<usize>,
    pub(crate) sum: usize,
}

/// Sums of squares of `parts`, by their numbers below `count`.
pub(crate) fn sums_of_squares(parts: &[Part<'_>], count: usize) -> Result<Vec<ExactSum>> {
    let mut sums = vec![ExactSum::default(); count];
    if parts.iter().any(|part| part.memory.device().is_cuda()) {
        let of_parts = device_norm::sums_of_squares(parts)?;
        for (part, sum) in parts.iter().zip(of_parts) {
            sums[part.sum].add(sum);
        }
        return Ok(sums);
    }
    for Part { memory, range, sum } in parts {
        let sum = &mut sums[*sum];
        match memory.kind() {
            Kind::Double => add_squares(sum, memory.elements::<f64>(range), |x| x),
            Kind::Half => add_squares(sum, memory.elements(range), f16::to_f64),
            Kind::BFloat16 => add_squares(sum, memory.elements(range), bf16::to_f64),
            _ => add_squares(sum, memory.elements::<f32>(range), f64::from),
        }
    }
    Ok(sums)
}

/// Adds the squares of `values`, chunk by chunk.
fn add_squares<T: Copy>(sum: &mut ExactSum, values: &[T], to_f64: impl Fn(T) -> f64) {
    let (chunks, rest) = values.as_chunks::<CHUNK_LEN>();
    for chunk in chunks {
        sum.add(sum_of_squares(chunk, &to_f64));
    }
    if !rest.is_empty() {
        sum.add(sum_of_squares(rest, &to_f64));
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

/// The values of sums whose parts lie on the ranks of `group`. Collective.
pub(crate) fn over_ranks(group: &mut Group, sums: Vec<ExactSum>) -> Result<Vec<f64>> {
    let mut words: Vec<i64> = sums.into_iter().flat_map(ExactSum::into_words).collect();
    group.tagged("norms").all_reduce(&mut words[..], Sum)?.wait()?;
    let sums = words.chunks_exact(WORDS).filter_map(ExactSum::of_words);
    Ok(sums.map(|sum| sum.value()).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_sum_is_right_for_every_remainder() {
        for len in 0..200_u16 {
            let values: Vec<f32> = (0..len).map(f32::from).collect();
            let expected: u32 = (0..u32::from(len)).map(|x| x * x).sum();
            let mut sum = ExactSum::default();
            add_squares(&mut sum, &values, f64::from);
            assert!(sum.value().to_bits() == f64::from(expected).to_bits(), "{len}");
        }
    }

    #[test]
    fn a_parameter_has_one_sum_however_it_is_cut_and_padded() {
        let values: Vec<f32> = (0..1000_u16).map(|at| (f32::from(at) * 0.37).sin()).collect();
        let mut whole = ExactSum::default();
        add_squares(&mut whole, &values, f64::from);
        for cut in (0..1000).step_by(CHUNK_LEN) {
            let mut parts = ExactSum::default();
            add_squares(&mut parts, &values[cut..], f64::from);
            add_squares(&mut parts, &values[..cut], f64::from);
            assert_eq!(parts.value().to_bits(), whole.value().to_bits(), "{cut}");
        }
        let mut padded = values.clone();
        padded.resize(1024, 0.0);
        let mut of_padded = ExactSum::default();
        add_squares(&mut of_padded, &padded, f64::from);
        assert_eq!(of_padded.value().to_bits(), whole.value().to_bits());
    }
}
