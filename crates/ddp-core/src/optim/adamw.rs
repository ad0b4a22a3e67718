//! AdamW: Adam with decoupled weight decay.

use super::rule::{check_betas, check_lr_and_decay};
use super::{Now, Rule, Runs};
use crate::shim::{self, AdamSettings};
use crate::Result;

/// AdamW with decoupled weight decay; defaults are PyTorch's.
///
/// # Source
/// Loshchilov & Hutter 2019; `at::_fused_adamw_`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AdamW {
    /// Learning rate.
    pub lr: f64,
    /// Decay of the first moment.
    pub beta1: f64,
    /// Decay of the second moment.
    pub beta2: f64,
    /// Added to the root of the second moment.
    pub eps: f64,
    /// Weight decay, times the learning rate.
    pub weight_decay: f64,
}

impl Default for AdamW {
    fn default() -> Self {
        Self { lr: 1e-3, beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay: 0.01 }
    }
}

impl Rule for AdamW {
    fn name(&self) -> &'static str {
        "AdamW"
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
            decoupled: 1,
        };
        let lists = [&runs.parameters[..], &runs.gradients, &runs.states[0], &runs.states[1]];
        shim::fused_adam(lists, &now.step_tensor, now.divisor_tensor.as_ref(), settings)
    }
}
