//! The outer optimizer: SGD with momentum on the mean of the ranks' changes.

use tch::Tensor;

use crate::{Error, Result};

/// Settings of the outer SGD. The defaults are those of the paper.
///
/// With g the mean of the ranks' changes: m ← momentum · m + g; θ ← θ₀ − lr · (g + momentum · m) with Nesterov's momentum, θ₀ − lr · m without.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct OuterSgd {
    /// Learning rate. Default 0.7.
    pub lr: f64,
    /// Momentum; 0 keeps none. Default 0.9.
    pub momentum: f64,
    /// Whether it looks ahead along its momentum. Default true.
    pub nesterov: bool,
}

impl Default for OuterSgd {
    fn default() -> Self {
        Self { lr: 0.7, momentum: 0.9, nesterov: true }
    }
}

impl OuterSgd {
    pub(super) fn check(&self) -> Result<()> {
        let bad = |setting, value: f64, expected| {
            Err(Error::BadSetting { setting, value: value.to_string(), expected })
        };
        if !self.lr.is_finite() || self.lr <= 0.0 {
            return bad("outer lr", self.lr, "a number > 0");
        }
        if !(0.0..1.0).contains(&self.momentum) {
            return bad("outer momentum", self.momentum, "a number from 0 to below 1");
        }
        Ok(())
    }

    /// Steps `parameters` on `change`, which is used up. One operation after the other, so that no processor fuses two.
    pub(super) fn step(
        &self,
        parameters: &Tensor,
        change: &Tensor,
        momentum: Option<&Tensor>,
    ) -> Result<()> {
        let (mut parameters, mut change) = (parameters.shallow_clone(), change.shallow_clone());
        if let Some(momentum) = momentum {
            let mut momentum = momentum.shallow_clone();
            drop(momentum.f_mul_scalar_(self.momentum)?);
            drop(momentum.f_add_(&change)?);
            if self.nesterov {
                drop(change.f_add_(&momentum.f_mul_scalar(self.momentum)?)?);
            } else {
                change.f_copy_(&momentum)?;
            }
        }
        drop(change.f_mul_scalar_(self.lr)?);
        drop(parameters.f_sub_(&change)?);
        Ok(())
    }
}
