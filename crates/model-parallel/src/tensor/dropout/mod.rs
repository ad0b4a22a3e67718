//! Dropout by position: what is dropped depends on step, sequence, token and column in the whole model, not on who computes it.

mod mask;

use phalanx_ddp_core::autograd::Function;
use tch::Tensor;

use crate::error::{Error, Result};
use crate::layer::random::Key;
use crate::layer::Pass;
pub(crate) use mask::{run, Mask, Places};

/// Where a tensor is in the whole activation of which it is a part.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Place {
    /// Index of its first token among those of this rank's batch ([`Pass::tokens`] says where these are).
    pub first_token: i64,
    /// Index of its first column.
    pub first_column: i64,
}

/// Sets elements to zero with probability p and divides the others by 1 − p (Srivastava et al. 2014).
///
/// The mask is computed again in the backward: nothing is kept.
///
/// # Example
/// ```
/// use phalanx_model_parallel::layer::{random::Key, Pass};
/// use phalanx_model_parallel::tensor::{Dropout, Place};
/// use tch::{Device, Kind, Tensor};
///
/// let dropout = Dropout::new(0.5, Key::of_seed(1))?;
/// let x = Tensor::ones([2, 4, 8], (Kind::Float, Device::Cpu));
/// let pass = Pass::training(0, 0);
/// let whole = dropout.forward(&x, &pass, Place::default())?;
/// let second = Pass { first_sample: 1, ..pass }; // the second sequence alone
/// assert_eq!(dropout.forward(&x.narrow(0, 1, 1), &second, Place::default())?, whole.narrow(0, 1, 1));
/// # Ok::<(), phalanx_model_parallel::Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Dropout {
    p: f64,
    key: Key,
}

impl Dropout {
    /// Drops with probability `p`; `key` is the layer's ([`Builder::key`](crate::layer::Builder::key)).
    ///
    /// # Errors
    /// [`Error::BadSetting`] unless 0 ≤ p < 1.
    pub fn new(p: f64, key: Key) -> Result<Self> {
        if (0.0..1.0).contains(&p) {
            return Ok(Self { p, key });
        }
        let expected = "at least 0 and less than 1";
        Err(Error::BadSetting { setting: "dropout", value: p.to_string(), expected })
    }

    /// Shape as `x`'s: `[batch, tokens, columns]`. Outside of training, `x` itself.
    ///
    /// # Errors
    /// [`Error::BadInput`] of another number of dimensions; libtorch's own.
    pub fn forward(&self, x: &Tensor, pass: &Pass, place: Place) -> Result<Tensor> {
        if x.dim() != 3 {
            return Err(Error::BadInput {
                layer: "dropout".to_owned(),
                actual: format!("an input of shape {:?}", x.size()),
                expected: "[batch, tokens, columns]".to_owned(),
            });
        }
        let shape = x.size();
        let tokens = pass.tokens.part(place.first_token, shape[1])?;
        let columns = run(place.first_column, shape[2]);
        self.at(x, pass, &[tokens, columns])
    }

    /// `x` is `[batch, …]`, and `places` where its elements are in the other dimensions.
    pub(super) fn at(&self, x: &Tensor, pass: &Pass, places: &[Places]) -> Result<Tensor> {
        if !pass.train || self.p <= 0.0 {
            return Ok(x.shallow_clone());
        }
        let mask = self.mask(x.size()[0], pass, places);
        let again = mask.clone();
        let mut outputs = Function::new("dropout").apply(
            &[x],
            |_, inputs| Ok((vec![inputs[0].f_mul(&mask.like(inputs[0])?)?], ())),
            move |_, gradients| {
                let Some(gradient) = &gradients[0] else { return Ok(vec![None]) };
                Ok(vec![Some(gradient.f_mul(&again.like(gradient)?)?)])
            },
        )?;
        Ok(outputs.swap_remove(0))
    }

    /// The factors of `batch` sequences, of elements at `places` in the other dimensions.
    pub(crate) fn mask(&self, batch: i64, pass: &Pass, places: &[Places]) -> Mask {
        let samples = run(pass.first_sample.cast_signed(), batch);
        let places = std::iter::once(samples).chain(places.iter().cloned()).collect();
        Mask { key: self.key.numbered(pass.step), places, p: self.p }
    }
}
