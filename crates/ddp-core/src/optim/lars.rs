//! LARS. Plain tensor operations, each a single IEEE operation per element, so that the bits do not depend on how
//! libtorch cuts the work.

use super::rule::{check_lr_and_decay, check_momentum, check_setting, divided};
use super::{Norms, Now, Rule, Runs};
use crate::{Error, Result};

/// LARS: SGD with momentum whose gradients are scaled per parameter by its own norm; for very large batches.
///
/// With gradient *g*, parameter *p*, learning rate γ, trust coefficient η, weight decay β and momentum *m*:
///
/// λ = η ‖p‖ / (‖g‖ + β ‖p‖ + ε), 1 where ‖p‖ = 0; v ← m v + λ (g + β p); p ← p − γ v
///
/// with Nesterov's momentum p ← p − γ (λ (g + β p) + m v). Parameters of a group
/// [`without_trust_ratio`](super::ParameterGroup::without_trust_ratio) have λ = 1, which is usual for biases and
/// norms, together with no decay.
///
/// # Source
/// You, Gitman & Ginsburg 2017, "Large Batch Training of Convolutional Networks", algorithm 1; the learning rate
/// stands outside of the momentum, as in NVIDIA Apex's `LARC(SGD, clip=False)` and in PyTorch's SGD, which is the
/// paper's form while the rate stays. Apex leaves a parameter whose gradient is all zero undecayed; here, as in the
/// paper, it decays.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Lars {
    /// Learning rate.
    pub lr: f64,
    /// Decay of the momentum; 0 keeps none.
    pub momentum: f64,
    /// Whether the step looks ahead; needs a momentum.
    pub nesterov: bool,
    /// η: how much of its norm a parameter may move by, before the learning rate.
    pub trust_coefficient: f64,
    /// Added to the norms that are divided by.
    pub eps: f64,
    /// Weight decay, inside the scaled gradient.
    pub weight_decay: f64,
}

impl Default for Lars {
    fn default() -> Self {
        Self {
            lr: 1.0,
            momentum: 0.9,
            nesterov: false,
            trust_coefficient: 1e-3,
            eps: 1e-8,
            weight_decay: 1e-4,
        }
    }
}

impl Rule for Lars {
    fn name(&self) -> &'static str {
        "LARS"
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
        check_momentum(self.momentum)?;
        let Self { trust_coefficient, eps, .. } = *self;
        let is_right = trust_coefficient > 0.0 && trust_coefficient.is_finite();
        check_setting("trust_coefficient", trust_coefficient, is_right, "a number > 0")?;
        check_setting("eps", eps, eps >= 0.0 && eps.is_finite(), "a number ≥ 0")?;
        if self.nesterov && self.momentum <= 0.0 {
            let (setting, value) = ("nesterov", "true".to_owned());
            return Err(Error::BadSetting { setting, value, expected: "a momentum above 0" });
        }
        Ok(())
    }

    /// The direction is the gradient: its norm is what counts.
    fn update(&self, now: &Now, runs: &Runs) -> Result<()> {
        for (gradient, direction) in runs.gradients.iter().zip(&runs.directions) {
            direction.shallow_clone().f_copy_(&divided(now, gradient)?)?;
        }
        Ok(())
    }

    fn has_trust_ratio(&self) -> bool {
        true
    }

    fn trust_ratio(&self, now: &Now, norms: Norms) -> f64 {
        let Norms { parameter, direction, .. } = norms;
        let below = direction + now.weight_decay * parameter + self.eps;
        if now.is_scaled && parameter > 0.0 && below > 0.0 {
            self.trust_coefficient * parameter / below
        } else {
            1.0
        }
    }

    fn apply(&self, now: &Now, factor: f64, runs: &Runs) -> Result<()> {
        for (at, parameter) in runs.parameters.iter().enumerate() {
            let mut step = runs.directions[at].shallow_clone();
            if now.weight_decay > 0.0 {
                drop(step.f_add_(&parameter.f_mul_scalar(now.weight_decay)?)?);
            }
            drop(step.f_mul_scalar_(factor)?);
            if let Some(momenta) = runs.states.first() {
                let mut momentum = momenta[at].shallow_clone();
                drop(momentum.f_mul_scalar_(self.momentum)?);
                drop(momentum.f_add_(&step)?);
                match self.nesterov {
                    true => drop(step.f_add_(&momentum.f_mul_scalar(self.momentum)?)?),
                    false => step = momentum,
                }
            }
            let scaled = step.f_mul_scalar(now.lr)?;
            tch::no_grad(|| parameter.shallow_clone().f_sub_(&scaled).map(drop))?;
        }
        Ok(())
    }
}
