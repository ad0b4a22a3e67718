//! Lion. Plain tensor operations, each a single IEEE operation per element, so that the bits do not depend on how
//! libtorch cuts the work.

use super::rule::{check_lr_and_decay, check_setting, divided};
use super::{Now, Rule, Runs};
use crate::Result;

/// Lion: the sign of a momentum, with decoupled weight decay; half of AdamW's state.
///
/// With gradient *g*, momentum *m*, parameter *p*, learning rate γ and weight decay λ:
///
/// p ← (1 − γ λ) p − γ sign(β₁ m + (1 − β₁) g); m ← β₂ m + (1 − β₂) g
///
/// Every element moves by γ, so γ is to be 3 to 10 times smaller than AdamW's, and λ larger by as much. An element
/// whose gradient has always been zero only decays: sign(0) = 0.
///
/// # Source
/// Chen et al. 2023, "Symbolic Discovery of Optimization Algorithms", algorithm 2; the defaults of its authors' code.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Lion {
    /// Learning rate.
    pub lr: f64,
    /// Weight of the momentum in the direction.
    pub beta1: f64,
    /// Decay of the momentum.
    pub beta2: f64,
    /// Weight decay, times the learning rate.
    pub weight_decay: f64,
}

impl Default for Lion {
    fn default() -> Self {
        Self { lr: 1e-4, beta1: 0.9, beta2: 0.99, weight_decay: 0.0 }
    }
}

impl Rule for Lion {
    fn name(&self) -> &'static str {
        "Lion"
    }

    fn lr(&self) -> f64 {
        self.lr
    }

    fn weight_decay(&self) -> f64 {
        self.weight_decay
    }

    fn states(&self) -> &'static [&'static str] {
        &["exp_avg"]
    }

    fn check(&self) -> Result<()> {
        check_lr_and_decay(self.lr, self.weight_decay)?;
        for (setting, beta) in [("beta1", self.beta1), ("beta2", self.beta2)] {
            check_setting(setting, beta, (0.0..1.0).contains(&beta), "a number in [0, 1)")?;
        }
        Ok(())
    }

    fn update(&self, now: &Now, runs: &Runs) -> Result<()> {
        for (at, parameter) in runs.parameters.iter().enumerate() {
            let gradient = divided(now, &runs.gradients[at])?;
            let mut momentum = runs.states[0][at].shallow_clone();
            let mut direction = momentum.f_mul_scalar(self.beta1)?;
            drop(direction.f_add_(&gradient.f_mul_scalar(1.0 - self.beta1)?)?);
            drop(direction.f_sign_()?);
            drop(momentum.f_mul_scalar_(self.beta2)?);
            drop(momentum.f_add_(&gradient.f_mul_scalar(1.0 - self.beta2)?)?);
            let mut parameter = parameter.shallow_clone();
            tch::no_grad(|| -> Result<()> {
                if now.weight_decay > 0.0 {
                    drop(parameter.f_mul_scalar_(1.0 - now.lr * now.weight_decay)?);
                }
                drop(parameter.f_sub_(&direction.f_mul_scalar(now.lr)?)?);
                Ok(())
            })?;
        }
        Ok(())
    }
}
