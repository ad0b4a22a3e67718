//! The numbers of an update: hyper-parameters of the step, of the parameter group and of the
//! parameter.

use tch::{Device, Kind, Tensor};

use super::groups::GroupSettings;
use super::piece::Treatment;
use super::{Now, Runs};
use crate::Result;

/// What becomes of gradients before a rule sees them.
#[derive(Clone, Copy, Debug)]
pub(super) struct Changes {
    /// What they are divided by: clipping and loss scaling in one.
    pub(super) divisor: f64,
    /// What each element is clamped to before that.
    pub(super) value_max: Option<f64>,
}

/// What all updates of a step have in common.
#[derive(Debug)]
pub(super) struct Numbers<'a> {
    pub(super) changes: Changes,
    pub(super) device: Device,
    pub(super) lr: f64,
    pub(super) settings: &'a [[GroupSettings; 2]],
}

impl Numbers<'_> {
    /// Clips each element of the gradients by itself.
    pub(super) fn clamp(&self, runs: &Runs) -> Result<()> {
        let Some(max) = self.changes.value_max else { return Ok(()) };
        for gradient in &runs.gradients {
            drop(gradient.shallow_clone().f_clamp_(-max, max)?);
        }
        Ok(())
    }

    /// Those of parameters that are treated so.
    #[expect(
        clippy::cast_precision_loss,
        reason = "steps are far below 2^24; PyTorch counts in f32 too"
    )]
    #[expect(clippy::cast_possible_truncation, reason = "the kernels divide in f32")]
    pub(super) fn now(&self, treatment: Treatment) -> Result<Now> {
        let Treatment { group, step, is_whole } = treatment;
        let settings = self.settings[group][usize::from(is_whole)];
        let divisor = self.changes.divisor;
        let is_divided = (divisor - 1.0).abs() > 0.0;
        let scalar = |value: f32| Tensor::from(value).f_to_device(self.device);
        let step_tensor = Tensor::f_zeros([] as [i64; 0], (Kind::Float, self.device))?;
        drop(step_tensor.shallow_clone().f_fill_(step as f64)?);
        Ok(Now {
            step,
            step_tensor,
            lr: self.lr * settings.lr_factor,
            weight_decay: settings.weight_decay,
            is_scaled: settings.is_scaled,
            is_whole,
            divisor,
            divisor_tensor: is_divided.then(|| scalar(divisor as f32)).transpose()?,
        })
    }
}

/// The numbers of a first step of nothing in particular.
#[cfg(test)]
pub(super) fn tests_now() -> Now {
    let settings = [[GroupSettings { lr_factor: 1.0, weight_decay: 0.0, is_scaled: true }; 2]];
    let changes = Changes { divisor: 1.0, value_max: None };
    let numbers = Numbers { changes, device: Device::Cpu, lr: 1.0, settings: &settings };
    numbers.now(Treatment { group: 0, step: 1, is_whole: true }).expect("a small tensor")
}
