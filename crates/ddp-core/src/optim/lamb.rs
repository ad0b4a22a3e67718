//! LAMB. Plain tensor operations, each a single IEEE operation per element, so that the bits do not depend on how
//! libtorch cuts the work.

use super::rule::{check_betas, check_lr_and_decay, divided};
use super::{Norms, Now, Rule, Runs};
use crate::Result;

/// LAMB: AdamW's step, scaled per parameter by ‖parameter‖ / ‖step‖; for very large batches.
///
/// Parameters of a group [`without_trust_ratio`](super::ParameterGroup::without_trust_ratio) are not scaled.
///
/// # Source
/// You et al. 2020, "Large Batch Optimization for Deep Learning: Training BERT in 76 minutes", algorithm 2
/// with φ(x) = x and bias correction.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Lamb {
    /// Learning rate.
    pub lr: f64,
    /// Decay of the first moment.
    pub beta1: f64,
    /// Decay of the second moment.
    pub beta2: f64,
    /// Added to the root of the second moment.
    pub eps: f64,
    /// Weight decay inside the step.
    pub weight_decay: f64,
}

impl Default for Lamb {
    fn default() -> Self {
        Self { lr: 1e-3, beta1: 0.9, beta2: 0.999, eps: 1e-6, weight_decay: 0.01 }
    }
}

impl Rule for Lamb {
    fn name(&self) -> &'static str {
        "LAMB"
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

    /// m, v and the direction m̂ / (√v̂ + ε) + λp.
    fn update(&self, now: &Now, runs: &Runs) -> Result<()> {
        let count = i32::try_from(now.step).unwrap_or(i32::MAX);
        let (correct1, correct2) = (1.0 - self.beta1.powi(count), 1.0 - self.beta2.powi(count));
        for (at, parameter) in runs.parameters.iter().enumerate() {
            let gradient = divided(now, &runs.gradients[at])?;
            let mut first = runs.states[0][at].shallow_clone();
            let mut second = runs.states[1][at].shallow_clone();
            drop(first.f_mul_scalar_(self.beta1)?);
            drop(first.f_add_(&gradient.f_mul_scalar(1.0 - self.beta1)?)?);
            drop(second.f_mul_scalar_(self.beta2)?);
            let square = gradient.f_mul(&gradient)?;
            drop(second.f_add_(&square.f_mul_scalar(1.0 - self.beta2)?)?);
            let mut root = second.f_div_scalar(correct2)?;
            drop(root.f_sqrt_()?);
            drop(root.f_add_scalar_(self.eps)?);
            let mut direction = first.f_div_scalar(correct1)?;
            drop(direction.f_div_(&root)?);
            if now.weight_decay > 0.0 {
                drop(direction.f_add_(&parameter.f_mul_scalar(now.weight_decay)?)?);
            }
            runs.directions[at].shallow_clone().f_copy_(&direction)?;
        }
        Ok(())
    }

    fn has_trust_ratio(&self) -> bool {
        true
    }

    /// 1 where either norm is zero.
    fn trust_ratio(&self, now: &Now, norms: Norms) -> f64 {
        if now.is_scaled && norms.parameter > 0.0 && norms.direction > 0.0 {
            norms.parameter / norms.direction
        } else {
            1.0
        }
    }
}
