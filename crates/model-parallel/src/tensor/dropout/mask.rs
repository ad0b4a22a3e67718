//! What is dropped: a number for each element, from the key and the element's indices in the whole.
//!
//! The key goes through all indices but the last, [`Key::numbered`] by each; the last is the place that bits are drawn for. On a GPU the same is computed with 64-bit
//! integers there.

use std::ops::Range;

use phalanx_ddp_core::Result;
use tch::{Device, Kind, Tensor};

use crate::layer::numbers;
use crate::layer::random::Key;

/// The generator's increment and factors as the signed numbers that tensors have.
const GAMMA: i64 = 0x9E37_79B9_7F4A_7C15_u64.cast_signed();
const FIRST: i64 = 0xBF58_476D_1CE4_E5B9_u64.cast_signed();
const SECOND: i64 = 0x94D0_49BB_1331_11EB_u64.cast_signed();

/// Numbers are drawn from so many bits.
const BITS: u32 = 53;

/// Indices of elements in one dimension of the whole, one run behind the other.
pub(crate) type Places = Vec<Range<i64>>;

/// So many places from the first on.
pub(crate) fn run(first: i64, len: i64) -> Places {
    std::iter::once(first..first + len).collect()
}

/// Factors of elements: 0, or what keeps the mean.
#[derive(Clone, Debug)]
pub(crate) struct Mask {
    pub(super) key: Key,
    /// By dimension.
    pub(super) places: Vec<Places>,
    /// How often an element is dropped.
    pub(super) p: f64,
}

impl Mask {
    /// The factors of a tensor's elements, of its kind.
    pub(crate) fn like(&self, x: &Tensor) -> Result<Tensor> {
        let mask = match x.device() {
            Device::Cpu => self.on_host()?,
            device => self.on_device(device)?,
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

    /// How many elements there are in each dimension.
    fn shape(&self) -> Vec<i64> {
        let len = |places: &Places| places.iter().map(|run| run.end - run.start).sum();
        self.places.iter().map(len).collect()
    }

    fn on_host(&self) -> Result<Tensor> {
        let shape = self.shape();
        let total: i64 = shape.iter().product();
        let mut factors = Vec::with_capacity(usize::try_from(total).unwrap_or(0));
        self.fill(self.key, &self.places, &mut factors);
        Ok(Tensor::f_from_slice(&factors)?.f_view(shape.as_slice())?)
    }

    fn fill(&self, key: Key, places: &[Places], factors: &mut Vec<f32>) {
        let Some((first, others)) = places.split_first() else { return };
        let (threshold, kept) = (self.threshold(), self.kept());
        let factor = |at| if key.bits(at) >> (64 - BITS) < threshold { 0.0 } else { kept };
        for run in first {
            let run = run.start.cast_unsigned()..run.end.cast_unsigned();
            match others {
                [] => factors.extend(run.map(factor)),
                _ => run.for_each(|at| self.fill(key.numbered(at), others, factors)),
            }
        }
    }

    fn on_device(&self, device: Device) -> Result<Tensor> {
        let mut keys = Tensor::f_full([], self.key.value().cast_signed(), (Kind::Int64, device))?;
        let count = self.places.len();
        for (dim, places) in self.places.iter().enumerate() {
            let at = numbers(places, (Kind::Int64, device))?;
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
        for places in [
            vec![run(2, 3), run(13, 5), run(24, 7)],
            vec![run(2, 2), vec![13..14, 0..2], vec![24..26, 40..42], run(7, 6)],
        ] {
            let mask = Mask { key: Key::of_seed(5), places, p: 0.3 };
            let host = mask.on_host().expect("libtorch");
            let device = mask.on_device(Device::Cpu).expect("libtorch");
            assert_eq!(host.size(), mask.shape());
            assert!(host.equal(&device));
            assert!(host.min().double_value(&[]) == 0.0 && host.max().double_value(&[]) > 1.0);
        }
    }

    #[test]
    fn as_many_are_dropped_as_asked_for() {
        let (len, p) = (100_000_i32, 0.1);
        let places = vec![run(0, 100), run(0, i64::from(len / 100))];
        let mask = Mask { key: Key::of_seed(9), places, p };
        let kept = mask.on_host().expect("libtorch").gt(0.0);
        let kept = kept.sum(Kind::Double).double_value(&[]);
        let deviation = (p * (1.0 - p) * f64::from(len)).sqrt();
        assert!((kept - (1.0 - p) * f64::from(len)).abs() < 5.0 * deviation);
    }
}
