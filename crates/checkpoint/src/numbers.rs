//! Elements as numbers: converted, and compared. Pure.

use half::{bf16, f16};

use crate::Dtype;

/// Elements of one floating-point type as those of another, rounded to the nearest, ties to even. Other types stay as they are.
pub(crate) fn convert(bytes: &[u8], from: Dtype, to: Dtype) -> Vec<u8> {
    if from == to || !from.is_float() || !to.is_float() {
        return bytes.to_vec();
    }
    let mut out = Vec::with_capacity(bytes.len() / from.bytes() * to.bytes());
    for element in bytes.chunks_exact(from.bytes()) {
        encode(value(element, from), to, &mut out);
    }
    out
}

#[expect(clippy::cast_possible_truncation, reason = "rounds, as it is meant to")]
fn encode(value: f64, to: Dtype, out: &mut Vec<u8>) {
    match to {
        Dtype::F32 => out.extend_from_slice(&(value as f32).to_le_bytes()),
        Dtype::F16 => out.extend_from_slice(&f16::from_f64(value).to_le_bytes()),
        Dtype::BF16 => out.extend_from_slice(&bf16::from_f64(value).to_le_bytes()),
        _ => out.extend_from_slice(&value.to_le_bytes()),
    }
}

/// How elements of two tensors of one type differ.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct Difference {
    pub(crate) count: u64,
    /// The largest absolute difference; not a number where one side is not.
    pub(crate) max: f64,
}

impl Difference {
    /// Compares more elements of this type, bit by bit.
    pub(crate) fn add(&mut self, left: &[u8], right: &[u8], dtype: Dtype) {
        if left == right {
            return;
        }
        let pairs = left.chunks_exact(dtype.bytes()).zip(right.chunks_exact(dtype.bytes()));
        for (mine, other) in pairs.filter(|(mine, other)| mine != other) {
            self.count += 1;
            let distance = distance(mine, other, dtype);
            if distance > self.max || distance.is_nan() {
                self.max = distance;
            }
        }
    }
}

#[expect(clippy::cast_precision_loss, reason = "it is shown with a few digits")]
fn distance(left: &[u8], right: &[u8], dtype: Dtype) -> f64 {
    match (integer(left, dtype), integer(right, dtype)) {
        (Some(a), Some(b)) => (a - b).abs() as f64,
        _ => (value(left, dtype) - value(right, dtype)).abs(),
    }
}

/// An element of a floating-point type.
fn value(element: &[u8], dtype: Dtype) -> f64 {
    match (dtype, element) {
        (Dtype::F64, &[a, b, c, d, e, f, g, h]) => f64::from_le_bytes([a, b, c, d, e, f, g, h]),
        (Dtype::F32, &[a, b, c, d]) => f32::from_le_bytes([a, b, c, d]).into(),
        (Dtype::F16, &[a, b]) => f16::from_le_bytes([a, b]).into(),
        (Dtype::BF16, &[a, b]) => bf16::from_le_bytes([a, b]).into(),
        _ => f64::NAN,
    }
}

/// An element of an integer type.
fn integer(element: &[u8], dtype: Dtype) -> Option<i128> {
    Some(match (dtype, element) {
        (Dtype::I64, &[a, b, c, d, e, f, g, h]) => {
            i64::from_le_bytes([a, b, c, d, e, f, g, h]).into()
        }
        (Dtype::U64, &[a, b, c, d, e, f, g, h]) => {
            u64::from_le_bytes([a, b, c, d, e, f, g, h]).into()
        }
        (Dtype::I32, &[a, b, c, d]) => i32::from_le_bytes([a, b, c, d]).into(),
        (Dtype::U32, &[a, b, c, d]) => u32::from_le_bytes([a, b, c, d]).into(),
        (Dtype::I16, &[a, b]) => i16::from_le_bytes([a, b]).into(),
        (Dtype::U16, &[a, b]) => u16::from_le_bytes([a, b]).into(),
        (Dtype::I8, &[a]) => i8::from_le_bytes([a]).into(),
        (Dtype::U8 | Dtype::Bool, &[a]) => a.into(),
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_rounded_to_the_nearest() {
        // Halfway between two bf16 values, of which the even one is below; and something that f16 cannot hold.
        let bytes: Vec<u8> =
            [1.0 + 2_f32.powi(-8), 1e6, f32::NAN].iter().flat_map(|x| x.to_le_bytes()).collect();
        let narrow = convert(&bytes, Dtype::F32, Dtype::BF16);
        assert_eq!(narrow[..2], bf16::ONE.to_le_bytes());
        let wide = convert(&narrow, Dtype::BF16, Dtype::F32);
        assert_eq!(wide[..4], 1_f32.to_le_bytes());
        let half = convert(&bytes, Dtype::F32, Dtype::F16);
        assert_eq!(half[2..4], f16::INFINITY.to_le_bytes());
        assert!(f16::from_le_bytes([half[4], half[5]]).is_nan());
        assert_eq!(convert(&bytes, Dtype::I32, Dtype::F16), bytes, "integers stay");
    }

    #[test]
    fn differences_are_counted_by_bits_and_measured_by_values() {
        let mut found = Difference::default();
        let bytes = |values: [i64; 3]| values.map(i64::to_le_bytes).concat();
        found.add(&bytes([1, i64::MIN, 3]), &bytes([1, i64::MAX, 5]), Dtype::I64);
        assert_eq!(found, Difference { count: 2, max: 2_f64.powi(64) });
        let mut of_floats = Difference::default();
        let zeros = [0_f32, -0.0].map(f32::to_le_bytes);
        of_floats.add(&zeros[0], &zeros[1], Dtype::F32);
        assert_eq!(of_floats, Difference { count: 1, max: 0.0 });
        of_floats.add(&zeros[0], &f32::NAN.to_le_bytes(), Dtype::F32);
        assert!(of_floats.max.is_nan() && of_floats.count == 2);
    }
}
