//! Adafactor: second moments of matrices as a row and a column.

use tch::{Kind, Tensor};

use super::rule::{check_lr_and_decay, check_setting, divided};
use super::{Norms, Now, Rule, Runs, Whole};
use crate::Result;

/// Adafactor: AdamW without a first moment, whose second moments of a matrix are its means by row and by column; for
/// little state.
///
/// With gradient *g* (n by m), parameter *p*, step *t*, learning rate γ, and ρ = t^`beta2_decay`:
///
/// r ← (1 − ρ) r + ρ mean by row of g²; c ← (1 − ρ) c + ρ mean by column of g²; v = r c / max(mean r, ε₁);
/// u = g / √max(v, ε₁²); p ← (1 − γ λ) p − α u / max(1, rms(u) / d), with α = max(ε₂, rms(p)) min(γ, 1/√t)
///
/// A parameter of one dimension has all of v, updated as r is; one of more than two is a stack of matrices of its last
/// two. Parameters come together whole for that, as in [`Muon`](super::Muon). State: four bytes a row and a
/// column, four an element of what has one dimension.
///
/// # Source
/// Shazeer & Stern 2018, "Adafactor: Adaptive Learning Rates with Sublinear Memory Cost"; in the form, and with the
/// defaults, of `torch.optim.Adafactor`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Adafactor {
    /// The most that the relative step is, and what weight decay is multiplied by.
    pub lr: f64,
    /// Exponent of the step in the decay of second moments: 0 or less.
    pub beta2_decay: f64,
    /// ε₁, below which a mean of squares does not come. `None`: the distance from 1 to the next number of the kind
    /// that the rule works in.
    pub eps1: Option<f64>,
    /// ε₂: as which root mean square a parameter counts at least.
    pub eps2: f64,
    /// d: the root mean square above which a step is scaled down; 1 or more.
    pub clip_threshold: f64,
    /// Weight decay, times the learning rate.
    pub weight_decay: f64,
}

impl Default for Adafactor {
    fn default() -> Self {
        Self {
            lr: 1e-2,
            beta2_decay: -0.8,
            eps1: None,
            eps2: 1e-3,
            clip_threshold: 1.0,
            weight_decay: 0.0,
        }
    }
}

impl Rule for Adafactor {
    fn name(&self) -> &'static str {
        "Adafactor"
    }

    fn lr(&self) -> f64 {
        self.lr
    }

    fn weight_decay(&self) -> f64 {
        self.weight_decay
    }

    fn states(&self) -> &'static [&'static str] {
        &["variance"]
    }

    fn check(&self) -> Result<()> {
        check_lr_and_decay(self.lr, self.weight_decay)?;
        let Self { beta2_decay, eps2, clip_threshold, .. } = *self;
        let is_right = beta2_decay <= 0.0 && beta2_decay.is_finite();
        check_setting("beta2_decay", beta2_decay, is_right, "a number ≤ 0")?;
        let eps1 = self.eps1.unwrap_or(1.0);
        check_setting("eps1", eps1, eps1 > 0.0 && eps1.is_finite(), "a number > 0")?;
        check_setting("eps2", eps2, eps2 >= 0.0 && eps2.is_finite(), "a number ≥ 0")?;
        let is_some = clip_threshold >= 1.0 && clip_threshold.is_finite();
        check_setting("clip_threshold", clip_threshold, is_some, "a number ≥ 1")
    }

    /// The direction: of a matrix its gradient, which is turned whole, else u.
    fn update(&self, now: &Now, runs: &Runs) -> Result<()> {
        for (at, direction) in runs.directions.iter().enumerate() {
            let gradient = divided(now, &runs.gradients[at])?;
            let turned = if now.is_whole {
                gradient
            } else {
                let variance = &runs.states[0][at];
                self.mix(now, variance, &gradient.f_mul(&gradient)?)?;
                self.scaled(variance.f_mul_scalar(1.0)?, &gradient)?
            };
            direction.shallow_clone().f_copy_(&turned)?;
        }
        Ok(())
    }

    fn whole(&self) -> Option<&dyn Whole> {
        Some(self)
    }

    fn has_trust_ratio(&self) -> bool {
        true
    }

    /// α / max(1, rms(u) / d).
    #[expect(clippy::cast_precision_loss, reason = "steps and sizes are far below 2^53")]
    fn trust_ratio(&self, now: &Now, norms: Norms) -> f64 {
        let root = (norms.len.max(1) as f64).sqrt();
        let relative_step = now.lr.min((now.step as f64).sqrt().recip());
        let alpha = (norms.parameter / root).max(self.eps2) * relative_step;
        alpha / (norms.direction / (root * self.clip_threshold)).max(1.0)
    }

    fn apply(&self, now: &Now, factor: f64, runs: &Runs) -> Result<()> {
        for (parameter, direction) in runs.parameters.iter().zip(&runs.directions) {
            let mut parameter = parameter.shallow_clone();
            tch::no_grad(|| -> Result<()> {
                if now.weight_decay > 0.0 {
                    drop(parameter.f_mul_scalar_(1.0 - now.lr * now.weight_decay)?);
                }
                drop(parameter.f_sub_(&direction.f_mul_scalar(factor)?)?);
                Ok(())
            })?;
        }
        Ok(())
    }
}

impl Whole for Adafactor {
    fn takes(&self, _name: &str, shape: &[i64]) -> bool {
        shape.len() > 1
    }

    fn states(&self) -> &'static [&'static str] {
        &[]
    }

    fn kept(&self, shape: &[i64]) -> Vec<(&'static str, Vec<i64>)> {
        let (mut row, mut column) = (shape.to_vec(), shape.to_vec());
        row[shape.len() - 1] = 1;
        column[shape.len() - 2] = 1;
        vec![("row_var", row), ("col_var", column)]
    }

    fn others(&self) -> (f64, f64) {
        (self.lr, self.weight_decay)
    }

    fn turn(&self, now: &Now, direction: &Tensor, kept: &[Tensor]) -> Result<Tensor> {
        // Memory of its own, so that it lies alike wherever it comes from.
        let mut gradient =
            Tensor::f_empty(direction.size(), (direction.kind(), direction.device()))?;
        gradient.f_copy_(direction)?;
        if direction.numel() == 0 {
            return Ok(gradient);
        }
        let squares = gradient.f_mul(&gradient)?;
        let (row, column) = (&kept[0], &kept[1]);
        for (factor, dim) in [(row, -1_i64), (column, -2)] {
            self.mix(now, factor, &squares.f_mean_dim([dim].as_slice(), true, None::<Kind>)?)?;
        }
        let mut mean = row.f_mean_dim([-2_i64].as_slice(), true, None::<Kind>)?;
        drop(mean.f_clamp_min_(self.eps1(row.kind()))?);
        // One product an element: no sum whose order could differ.
        let mut variance = row.f_mul(column)?;
        drop(variance.f_div_(&mean)?);
        self.scaled(variance, &gradient)
    }
}

impl Adafactor {
    fn eps1(&self, kind: Kind) -> f64 {
        self.eps1.unwrap_or(match kind {
            Kind::Double => f64::EPSILON,
            _ => f64::from(f32::EPSILON),
        })
    }

    /// (1 − ρ) of what there was and ρ of what is new.
    #[expect(clippy::cast_precision_loss, reason = "steps are far below 2^53")]
    fn mix(&self, now: &Now, kept: &Tensor, new: &Tensor) -> Result<()> {
        let share = (now.step as f64).powf(self.beta2_decay);
        let mut kept = kept.shallow_clone();
        drop(kept.f_mul_scalar_(1.0 - share)?);
        drop(kept.f_add_(&new.f_mul_scalar(share)?)?);
        Ok(())
    }

    /// u of a second moment, which is used up.
    fn scaled(&self, mut variance: Tensor, gradient: &Tensor) -> Result<Tensor> {
        let least = self.eps1(variance.kind());
        drop(variance.f_clamp_min_(least * least)?);
        drop(variance.f_sqrt_()?);
        Ok(gradient.f_div(&variance)?)
    }
}
