//! Stochastic gradient descent, with momentum or Nesterov's.

use super::rule::{check_lr_and_decay, check_setting};
use super::{Now, Rule, Runs};
use crate::shim::{self, SgdSettings};
use crate::{Error, Result};

/// SGD; defaults are PyTorch's but for the learning rate, which there has none.
///
/// # Source
/// Sutskever et al. 2013, in the form of `torch.optim.SGD`; `at::_fused_sgd_`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Sgd {
    /// Learning rate.
    pub lr: f64,
    /// Decay of the momentum; 0 keeps none.
    pub momentum: f64,
    /// By how much less than all of a gradient goes into the momentum, from the second step on.
    pub dampening: f64,
    /// Whether the step looks ahead; needs a momentum, and no dampening.
    pub nesterov: bool,
    /// L2 penalty: added to the gradient, times the parameter.
    pub weight_decay: f64,
}

impl Default for Sgd {
    fn default() -> Self {
        Self { lr: 1e-2, momentum: 0.0, dampening: 0.0, nesterov: false, weight_decay: 0.0 }
    }
}

impl Rule for Sgd {
    fn name(&self) -> &'static str {
        "SGD"
    }

    fn lr(&self) -> f64 {
        self.lr
    }

    fn weight_decay(&self) -> f64 {
        self.weight_decay
    }

    fn states(&self) -> &'static [&'static str] {
        if self.momentum > 0.0 {
            &["momentum_buffer"]
        } else {
            &[]
        }
    }

    fn check(&self) -> Result<()> {
        check_lr_and_decay(self.lr, self.weight_decay)?;
        let is_right = self.momentum >= 0.0 && self.momentum.is_finite();
        check_setting("momentum", self.momentum, is_right, "a number ≥ 0")?;
        check_setting("dampening", self.dampening, self.dampening.is_finite(), "a number")?;
        if self.nesterov && (self.momentum <= 0.0 || self.dampening.abs() > 0.0) {
            let (setting, value) = ("nesterov", "true".to_owned());
            let expected = "a momentum above 0 and no dampening beside it";
            return Err(Error::BadSetting { setting, value, expected });
        }
        Ok(())
    }

    fn update(&self, now: &Now, runs: &Runs) -> Result<()> {
        let settings = SgdSettings {
            lr: now.lr,
            momentum: self.momentum,
            dampening: self.dampening,
            weight_decay: now.weight_decay,
            nesterov: i32::from(self.nesterov),
            first_step: i32::from(now.step == 1),
        };
        let momenta = runs.states.first().map_or(&[][..], Vec::as_slice);
        let lists = [&runs.parameters[..], &runs.gradients, momenta];
        shim::fused_sgd(lists, now.divisor_tensor.as_ref(), settings)
    }
}
