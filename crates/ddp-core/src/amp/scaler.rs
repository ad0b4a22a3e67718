//! Dynamic loss scaling, for gradients in f16: the loss is multiplied, so that small gradients do not vanish, by as
//! much as large ones can bear. Pure but for one multiplication.

use tch::Tensor;

use crate::{Error, Result};

/// Scales losses, and finds the scale by itself: twice as much after 2 000 steps that went well, half as much after
/// one whose gradients were not finite, which is skipped on every rank.
///
/// # Example
/// ```
/// # use phalanx_comm::{Group, GroupOptions};
/// # use phalanx_ddp_core::optim::{AdamW, Optimizer, ParameterGroups};
/// # use phalanx_ddp_core::{amp::LossScaler, Ddp, DdpOptions, NonFinite, Sync};
/// # use tch::{nn, nn::Module, Device, Kind, Tensor};
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// # let mut group = Group::single(GroupOptions::default())?;
/// # let vs = nn::VarStore::new(Device::Cpu);
/// # let net = nn::linear(vs.root() / "fc", 4, 1, Default::default());
/// let options = DdpOptions { non_finite: NonFinite::SkipStep, ..DdpOptions::default() };
/// let ddp = Ddp::new(&vs, &mut group, options)?;
/// let mut optimizer = Optimizer::new(&ddp, AdamW::default(), ParameterGroups::default())?;
/// let mut scaler = LossScaler::default();
/// let loss_sum = net.forward(&Tensor::ones([8, 4], (Kind::Float, Device::Cpu))).square().sum(Kind::Float);
/// ddp.backward(&scaler.scale(&loss_sum)?, 8.0, Sync::Reduce)?;
/// let step = optimizer.step_scaled(Some(1.0), &mut scaler)?;
/// assert!(!step.skipped);
/// # Ok(())
/// # }
/// ```
///
/// # Source
/// Micikevicius et al. 2018, "Mixed Precision Training"; the constants are those of `torch.amp.GradScaler`.
#[derive(Clone, Debug, PartialEq)]
pub struct LossScaler {
    scale: f64,
    growth: f64,
    backoff: f64,
    interval: u32,
    good_steps: u32,
}

impl Default for LossScaler {
    fn default() -> Self {
        Self { scale: 65536.0, growth: 2.0, backoff: 0.5, interval: 2000, good_steps: 0 }
    }
}

impl LossScaler {
    /// From `scale` on; `growth` is applied after `interval` good steps, `backoff` after a skipped one.
    ///
    /// # Errors
    /// [`Error::BadSetting`] unless `scale` > 0, `growth` ≥ 1, 0 < `backoff` ≤ 1 and `interval` > 0.
    pub fn new(scale: f64, growth: f64, backoff: f64, interval: u32) -> Result<Self> {
        let bad =
            |setting, value: String, expected| Err(Error::BadSetting { setting, value, expected });
        if !(scale > 0.0 && scale.is_finite()) {
            return bad("scale", scale.to_string(), "a number > 0");
        }
        if !(growth >= 1.0 && growth.is_finite()) {
            return bad("growth", growth.to_string(), "a number ≥ 1");
        }
        if !(backoff > 0.0 && backoff <= 1.0) {
            return bad("backoff", backoff.to_string(), "a number above 0 and at most 1");
        }
        if interval == 0 {
            return bad("interval", interval.to_string(), "at least 1");
        }
        Ok(Self { scale, growth, backoff, interval, good_steps: 0 })
    }

    /// The loss times the scale.
    ///
    /// # Errors
    /// libtorch's own.
    pub fn scale(&self, loss: &Tensor) -> Result<Tensor> {
        Ok(loss.f_mul_scalar(self.scale)?)
    }

    /// The scale.
    #[must_use]
    pub fn value(&self) -> f64 {
        self.scale
    }

    /// Steps that went well since the scale changed; with [`value`](Self::value) it is the scaler's state.
    #[must_use]
    pub fn good_steps(&self) -> u32 {
        self.good_steps
    }

    /// With the state of an earlier run.
    #[must_use]
    pub fn resumed(self, scale: f64, good_steps: u32) -> Self {
        Self { scale, good_steps, ..self }
    }

    /// A step was made, or skipped.
    pub(crate) fn update(&mut self, skipped: bool) {
        if skipped {
            self.scale *= self.backoff;
            self.good_steps = 0;
            return;
        }
        self.good_steps += 1;
        if self.good_steps >= self.interval {
            let grown = self.scale * self.growth;
            // Beyond f32 every loss would be infinite.
            self.scale = if grown <= f64::from(f32::MAX) { grown } else { self.scale };
            self.good_steps = 0;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_scale_grows_after_good_steps_and_halves_after_a_skipped_one() {
        let mut scaler = LossScaler::new(8.0, 2.0, 0.5, 3).unwrap();
        let scales: Vec<f64> = [false, false, false, false, true, false, false, false]
            .into_iter()
            .map(|skipped| {
                scaler.update(skipped);
                scaler.value()
            })
            .collect();
        assert_eq!(scales, [8.0, 8.0, 16.0, 16.0, 8.0, 8.0, 8.0, 16.0]);
    }

    #[test]
    fn settings_that_cannot_be_are_refused() {
        assert!(LossScaler::new(0.0, 2.0, 0.5, 1).is_err());
        assert!(LossScaler::new(1.0, 0.5, 0.5, 1).is_err());
        assert!(LossScaler::new(1.0, 2.0, 0.0, 1).is_err());
        assert!(LossScaler::new(1.0, 2.0, 0.5, 0).is_err());
        assert!(LossScaler::new(f64::NAN, 2.0, 0.5, 1).is_err());
    }
}
