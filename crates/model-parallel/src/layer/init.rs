//! How a variable begins: each element by its place in the whole tensor.

use phalanx_ddp_core::Cut;
use tch::{Device, Kind, Tensor};

use super::random::Key;
use crate::error::Result;

/// How a variable begins.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Init {
    /// All elements alike.
    Constant(f64),
    /// Normally distributed around 0.
    Normal {
        /// The standard deviation.
        std: f64,
    },
    /// Uniformly distributed in [-bound, bound).
    Uniform {
        /// The largest magnitude.
        bound: f64,
    },
}

impl Init {
    /// The part of a tensor that `cut` names, in f32 on the CPU: the same elements as the whole tensor has there.
    pub(super) fn part(self, key: Key, cut: &Cut) -> Result<Tensor> {
        let shape = cut.part_shape();
        if let Self::Constant(value) = self {
            return Ok(Tensor::f_full(&shape, value, (Kind::Float, Device::Cpu))?);
        }
        let places = places(cut);
        #[expect(clippy::cast_possible_truncation, reason = "weights begin in single precision")]
        let values: Vec<f32> = places.map(|place| self.value(key, place) as f32).collect();
        Ok(Tensor::f_from_slice(&values)?.f_view(shape.as_slice())?)
    }

    fn value(self, key: Key, place: u64) -> f64 {
        match self {
            Self::Constant(value) => value,
            Self::Normal { std } => std * key.normal(place),
            Self::Uniform { bound } => bound * (2.0 * key.uniform(place) - 1.0),
        }
    }
}

/// The places in the whole tensor of the part's elements, in its order.
fn places(cut: &Cut) -> impl Iterator<Item = u64> + '_ {
    let shape = cut.shape();
    let inner: i64 = shape[cut.dim() + 1..].iter().product();
    let outer: i64 = shape[..cut.dim()].iter().product();
    let len = shape[cut.dim()];
    let of_row = move |row: i64| {
        let runs = cut.ranges().iter();
        runs.flat_map(move |range| {
            (row * len + range.start) * inner..(row * len + range.end) * inner
        })
    };
    (0..outer).flat_map(of_row).map(i64::unsigned_abs)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_part_has_the_elements_of_the_whole() {
        let key = Key::of_seed(3);
        let init = Init::Normal { std: 0.5 };
        let whole = |shape: &[i64]| Cut::new(shape, 0, std::iter::once(0..shape[0]).collect());
        let all = init.part(key, &whole(&[4, 6, 5])).expect("no large tensor");
        let rows = init
            .part(key, &Cut::new(&[4, 6, 5], 0, std::iter::once(1..3).collect()))
            .expect("no large tensor");
        assert_eq!(rows, all.narrow(0, 1, 2));
        let pieces =
            init.part(key, &Cut::new(&[4, 6, 5], 1, vec![4..6, 0..1])).expect("no large tensor");
        assert_eq!(pieces, Tensor::cat(&[all.narrow(1, 4, 2), all.narrow(1, 0, 1)], 1));
        let last = init
            .part(key, &Cut::new(&[4, 6, 5], 2, std::iter::once(2..5).collect()))
            .expect("no large tensor");
        assert_eq!(last, all.narrow(2, 2, 3));
    }
}
