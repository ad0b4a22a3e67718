//! f32 values as a byte each and a scale for each block. Pure.
//!
//! Of a block x with the largest magnitude a: scale s = a/127, q = x · (127/a) to the nearest whole number, ties to even; x ≈ s · q, off by at most s/2 and
//! the rounding of three operations. A block that is below [`TINY`] altogether becomes zero; one with a value that is not finite becomes NaN in part.

/// Largest magnitude of a block that counts as zero: 127 over a smaller one may be infinite.
pub(super) const TINY: f32 = 1e-30;

/// 1.5 · 2²³: adding it rounds to whole numbers, which are then in the last bits.
const ROUNDER: f32 = 12_582_912.0;

/// Encodes `values` in blocks of `block`, a `scale` for each block and a code for each value; with `lost`, adds there what is lost times `weight`.
pub(super) fn encode(
    values: &[f32],
    block: usize,
    (scales, codes): (&mut [f32], &mut [u8]),
    mut lost: Option<(&mut [f32], f32)>,
) {
    let parts = values.chunks(block).zip(codes.chunks_mut(block)).zip(scales);
    for (number, ((part, out), scale)) in parts.enumerate() {
        let inverse;
        (*scale, inverse) = scale_of(part);
        for (code, &value) in out.iter_mut().zip(part) {
            // The lowest byte of the sum is the whole number in two's complement.
            [*code, ..] = (value * inverse + ROUNDER).to_bits().to_le_bytes();
        }
        if let Some((lost, weight)) = &mut lost {
            let of_block = &mut lost[number * block..][..part.len()];
            for ((rest, &code), &value) in of_block.iter_mut().zip(out.iter()).zip(part) {
                *rest += *weight * (value - decoded(code, *scale));
            }
        }
    }
}

/// Replaces `values` by what codes mean.
pub(super) fn decode(values: &mut [f32], block: usize, (scales, codes): (&[f32], &[u8])) {
    let parts = values.chunks_mut(block).zip(codes.chunks(block)).zip(scales);
    for ((part, of_part), &scale) in parts {
        for (value, &code) in part.iter_mut().zip(of_part) {
            *value = decoded(code, scale);
        }
    }
}

/// Adds what codes mean.
pub(super) fn add(values: &mut [f32], block: usize, (scales, codes): (&[f32], &[u8])) {
    let parts = values.chunks_mut(block).zip(codes.chunks(block)).zip(scales);
    for ((part, of_part), &scale) in parts {
        for (value, &code) in part.iter_mut().zip(of_part) {
            *value += decoded(code, scale);
        }
    }
}

fn decoded(code: u8, scale: f32) -> f32 {
    f32::from(code.cast_signed()) * scale
}

/// The scale of a block, and what values are multiplied by.
fn scale_of(block: &[f32]) -> (f32, f32) {
    // Magnitudes are in the order of their bits, and what is not finite is above all.
    let largest = block.iter().fold(0, |largest, value| (value.to_bits() & !SIGN).max(largest));
    let largest = f32::from_bits(largest);
    if largest < TINY {
        return (0.0, 0.0);
    }
    (largest / 127.0, 127.0 / largest)
}

const SIGN: u32 = 1 << 31;

#[cfg(test)]
#[expect(clippy::cast_precision_loss, reason = "small numbers")]
#[expect(clippy::float_cmp, clippy::shadow_unrelated, reason = "exact values, case by case")]
mod tests {
    use super::*;

    fn round_trip(values: &[f32], block: usize) -> (Vec<f32>, Vec<f32>, Vec<f32>) {
        let mut scales = vec![0.0; values.len().div_ceil(block)];
        let mut codes = vec![0; values.len()];
        let mut lost = vec![0.0; values.len()];
        encode(values, block, (&mut scales, &mut codes), Some((&mut lost, 2.0)));
        let mut back = vec![f32::NAN; values.len()];
        decode(&mut back, block, (&scales, &codes));
        (back, lost, scales)
    }

    #[test]
    fn every_value_comes_back_to_half_a_step() {
        let values: Vec<f32> = (0..1000).map(|i| ((i * 37 % 201) as f32 - 100.0) * 0.31).collect();
        let (back, lost, scales) = round_trip(&values, 64);
        for (at, (&value, &back)) in values.iter().zip(&back).enumerate() {
            let largest = values[at / 64 * 64..].iter().take(64).fold(0.0, |a, v| v.abs().max(a));
            assert_eq!(scales[at / 64], largest / 127.0);
            // Half a step, and three roundings of values up to 127.
            let bound = f64::from(largest) / 254.0 * (1.0 + 256.0 * f64::from(f32::EPSILON));
            assert!((f64::from(value) - f64::from(back)).abs() <= bound, "{value} {back}");
            assert_eq!(lost[at], 2.0 * (value - back));
        }
    }

    #[test]
    fn the_largest_value_and_zero_and_ties_are_exact() {
        // A scale of one.
        let (back, ..) = round_trip(&[127.0, -127.0, 0.0, 0.5, 1.5, -2.5, 63.0], 64);
        assert_eq!(back, [127.0, -127.0, 0.0, 0.0, 2.0, -2.0, 63.0]);
    }

    #[test]
    fn tiny_blocks_are_zero_and_what_is_not_finite_stays_so() {
        let (back, ..) = round_trip(&[1e-31, -1e-38, f32::MIN_POSITIVE / 4.0], 4);
        assert_eq!(back, [0.0; 3]);
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let (back, ..) = round_trip(&[1.0, bad, 2.0], 4);
            assert!(back.iter().any(|value| !value.is_finite()), "{bad}: {back:?}");
        }
    }

    #[test]
    fn adding_is_decoding_and_a_sum() {
        let values = [3.0, -1.0, 0.25, 8.0, 1.0];
        let (back, ..) = round_trip(&values, 4);
        let (mut scales, mut codes) = ([0.0; 2], [0; 5]);
        encode(&values, 4, (&mut scales, &mut codes), None);
        let mut sum = [1.0; 5];
        add(&mut sum, 4, (&scales, &codes));
        assert!(sum.iter().zip(&back).all(|(sum, back)| *sum == 1.0 + back));
    }
}
