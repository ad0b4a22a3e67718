//! Adam, with weight decay as a term of the loss.

use super::rule::{check_betas, check_lr_and_decay};
use super::{Now, Rule, Runs};
use crate::shim::{self, AdamSettings};
use crate::Result;

/// Adam; defaults are PyTorch's.
///
/// # Source
/// Kingma & Ba 2015; `at::_fused_adam_`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Adam {
    /// Learning rate.
    pub lr: f64,
    /// Decay of the first moment.
    pub beta1: f64,
    /// Decay of the second moment.
    pub beta2: f64,
    /// Added to the root of the second moment.
    pub eps: f64,
    /// L2 penalty: added to the gradient, times the parameter.
    pub weight_decay: f64,
}

impl Default for Adam {
    fn default() -> Self {
        Self { lr: 1e-3, beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay: 0.0 }
    }
}

impl Rule for Adam {
    fn name(&self) -> &'static str {
        "Adam"
    }

    fn lr(&self) -> f64 {
        self.lr
    }

    fn weight_decay(&self) -> f64 {
        self.weight_decay
    }

    fn states(&self) -> &'static [&'static str] {
        &["exp_avg", "exp_avg_sq"]
    }

    fn check(&self) -> Result<()> {
        check_lr_and_decay(self.lr, self.weight_decay)?;
        check_betas(self.beta1, self.beta2, self.eps)
    }

    fn update(&self, now: &Now, runs: &Runs) -> Result<()> {
        let settings = AdamSettings {
            lr: now.lr,
            beta1: self.beta1,
            beta2: self.beta2,
            weight_decay: now.weight_decay,
            eps: self.eps,
            decoupled: 0,
        };
        let lists = [&runs.parameters[..], &runs.gradients, &runs.states[0], &runs.states[1]];
        shim::fused_adam(lists, &now.step_tensor, now.divisor_tensor.as_ref(), settings)
    }
}
