//! What is dropped: a number for each element, from the key and the element's indices in the whole.
//!
//! The key goes through all indices but the last, [`Key::numbered`] by each; the last is the place that bits are drawn for. On a GPU the same is computed with 64-bit
//! integers there.

use phalanx_ddp_core::Result;
use tch::{Device, Kind, Tensor};

use crate::layer::random::Key;

/// The generator's increment and factors as the signed numbers that tensors have.
const GAMMA: i64 = 0x9E37_79B9_7F4A_7C15_u64.cast_signed();
const FIRST: i64 = 0xBF58_476D_1CE4_E5B9_u64.cast_signed();
const SECOND: i64 = 0x94D0_49BB_1331_11EB_u64.cast_signed();

/// Numbers are drawn from so many bits.
const BITS: u32 = 53;

/// Factors of elements: 0, or what keeps the mean.
#[derive(Clone, Debug)]
pub(in crate::tensor) struct Mask {
    pub(in crate::tensor) key: Key,
    /// The indices of the first element.
    pub(in crate::tensor) firsts: Vec<u64>,
    /// How often an element is dropped.
    pub(in crate::tensor) p: f64,
}

impl Mask {
    /// The factors of a tensor's elements, of its kind.
    pub(in crate::tensor) fn like(&self, x: &Tensor) -> Result<Tensor> {
        let shape = x.size();
        let mask = match x.device() {
            Device::Cpu => self.on_host(&shape)?,
            device => self.on_device(&shape, device)?,
        };
        Ok(mask.f_to_kind(x.kind())?)
    }

    /// Elements whose number is below this are dropped.
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        clippy::cast_precision_loss,
        reason = "p is in [0, 1), and 53 bits fit"
    )]
    fn threshold(&self) -> u64 {
        (self.p * (1_u64 << BITS) as f64) as u64
    }

    #[expect(clippy::cast_possible_truncation, reason = "factors of activations are in f32")]
    fn kept(&self) -> f32 {
        (1.0 / (1.0 - self.p)) as f32
    }

    fn on_host(&self, shape: &[i64]) -> Result<Tensor> {
        let total: i64 = shape.iter().product();
        let mut factors = Vec::with_capacity(usize::try_from(total).unwrap_or(0));
        self.fill(self.key, shape, &self.firsts, &mut factors);
        Ok(Tensor::f_from_slice(&factors)?.f_view(shape)?)
    }

    fn fill(&self, key: Key, shape: &[i64], firsts: &[u64], factors: &mut Vec<f32>) {
        let range = firsts[0]..firsts[0] + shape[0].unsigned_abs();
        if shape.len() > 1 {
            return range
                .for_each(|at| self.fill(key.numbered(at), &shape[1..], &firsts[1..], factors));
        }
        let (threshold, kept) = (self.threshold(), self.kept());
        let factor = |at| if key.bits(at) >> (64 - BITS) < threshold { 0.0 } else { kept };
        factors.extend(range.map(factor));
    }

    fn on_device(&self, shape: &[i64], device: Device) -> Result<Tensor> {
        let mut keys = Tensor::f_full([], self.key.value().cast_signed(), (Kind::Int64, device))?;
        let count = shape.len();
        for (dim, (len, first)) in shape.iter().zip(&self.firsts).enumerate() {
            let first = first.cast_signed();
            let at = Tensor::f_arange_start(first, first + len, (Kind::Int64, device))?;
            // Behind the dimensions before it.
            let keys_here = keys.f_unsqueeze(-1)?;
            keys = if dim + 1 == count {
                let steps = at.f_add_scalar(1)?.f_mul_scalar(GAMMA)?;
                mix(&keys_here.f_add(&steps)?)?
            } else {
                mix(&keys_here.f_add(&mix(&at.f_add_scalar(GAMMA)?)?)?)?
            };
        }
        let threshold = self.threshold().cast_signed();
        let keeps = shifted(&keys, 64 - i64::from(BITS))?.f_ge(threshold)?;
        Ok(keeps.f_to_kind(Kind::Float)?.f_mul_scalar(f64::from(self.kept()))?)
    }
}

/// The generator's output function ([`mix`](crate::layer::random::mix)) of each element.
fn mix(state: &Tensor) -> Result<Tensor> {
    let state = state.f_bitwise_xor_tensor(&shifted(state, 30)?)?.f_mul_scalar(FIRST)?;
    let state = state.f_bitwise_xor_tensor(&shifted(&state, 27)?)?.f_mul_scalar(SECOND)?;
    Ok(state.f_bitwise_xor_tensor(&shifted(&state, 31)?)?)
}

/// To the right, with zeros from the left: libtorch's own shift repeats the sign.
fn shifted(state: &Tensor, by: i64) -> Result<Tensor> {
    let mask = (1_i64 << (64 - by)) - 1;
    Ok(state.f_bitwise_right_shift_tensor_scalar(by)?.f_bitwise_and(mask)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_drops_what_the_host_drops() {
        for shape in [vec![3, 5, 7], vec![2, 3, 4, 6]] {
            let firsts = (0..shape.len()).map(|dim| 11 * dim as u64 + 2).collect();
            let mask = Mask { key: Key::of_seed(5), firsts, p: 0.3 };
            let host = mask.on_host(&shape).expect("libtorch");
            let device = mask.on_device(&shape, Device::Cpu).expect("libtorch");
            assert!(host.equal(&device));
            assert!(host.min().double_value(&[]) == 0.0 && host.max().double_value(&[]) > 1.0);
        }
    }

    #[test]
    fn as_many_are_dropped_as_asked_for() {
        let (len, p) = (100_000_i32, 0.1);
        let mask = Mask { key: Key::of_seed(9), firsts: vec![0, 0], p };
        let kept = mask.on_host(&[100, i64::from(len / 100)]).expect("libtorch").gt(0.0);
        let kept = kept.sum(Kind::Double).double_value(&[]);
        let deviation = (p * (1.0 - p) * f64::from(len)).sqrt();
        assert!((kept - (1.0 - p) * f64::from(len)).abs() < 5.0 * deviation);
    }
}
