//! [`Rule`]: how one optimizer updates elements. What is around it (sharding, groups, clipping, masters, the gathering of
//! parameters) is [`Optimizer`](super::Optimizer)'s, so that another rule is a page.

use tch::Tensor;

use crate::{Error, Result};

/// How an optimizer updates parameters, element by element; see [`AdamW`](super::AdamW) for one.
///
/// An element's update may depend on nothing but that element, its state and [`Now`]: a rank sees its
/// segments alone, cut anywhere at a multiple of 64 elements. Where a whole parameter's norm decides, return a
/// [`trust_ratio`](Self::trust_ratio).
pub trait Rule: std::fmt::Debug + Send {
    /// The rule's name, for errors.
    fn name(&self) -> &'static str;

    /// The learning rate to begin with.
    fn lr(&self) -> f64;

    /// The weight decay of parameters whose group has none of its own.
    fn weight_decay(&self) -> f64;

    /// Names of what is kept for each element, all zero at first.
    fn states(&self) -> &'static [&'static str];

    /// An error for settings that cannot be.
    ///
    /// # Errors
    /// [`Error::BadSetting`].
    fn check(&self) -> Result<()>;

    /// Updates the elements of `runs`, and their state.
    ///
    /// # Errors
    /// libtorch's own.
    fn update(&self, now: &Now, runs: &Runs) -> Result<()>;

    /// If a step is scaled by norms of the whole parameter: the factor, of the norm of the parameter and that of
    /// its direction. [`update`](Self::update) then leaves parameters alone and writes
    /// [`Runs::directions`]; parameters become `parameter − lr × factor × direction`.
    fn trust_ratio(&self) -> Option<fn(parameter: f64, direction: f64) -> f64> {
        None
    }
}

impl Rule for Box<dyn Rule> {
    fn name(&self) -> &'static str {
        (**self).name()
    }
    fn lr(&self) -> f64 {
        (**self).lr()
    }
    fn weight_decay(&self) -> f64 {
        (**self).weight_decay()
    }
    fn states(&self) -> &'static [&'static str] {
        (**self).states()
    }
    fn check(&self) -> Result<()> {
        (**self).check()
    }
    fn update(&self, now: &Now, runs: &Runs) -> Result<()> {
        (**self).update(now, runs)
    }
    fn trust_ratio(&self) -> Option<fn(f64, f64) -> f64> {
        (**self).trust_ratio()
    }
}

/// The numbers of one update.
#[derive(Debug)]
pub struct Now {
    /// How often these elements are updated, this time included: from 1.
    pub step: u64,
    /// The same as an f32 scalar on the parameters' device.
    pub step_tensor: Tensor,
    /// Learning rate of the group.
    pub lr: f64,
    /// Weight decay of the group.
    pub weight_decay: f64,
    /// What gradients are divided by first: clipping and loss scaling in one.
    pub divisor: f64,
    /// The same as an f32 scalar on the parameters' device; `None` where it is 1.
    pub divisor_tensor: Option<Tensor>,
}

/// Stretches of flat memory with the same [`Now`]. All lists are equally long, and so are the tensors at one place.
#[derive(Debug, Default)]
pub struct Runs {
    /// Parameters, or their f32 masters.
    pub parameters: Vec<Tensor>,
    /// Gradients; may be overwritten.
    pub gradients: Vec<Tensor>,
    /// By state of [`Rule::states`].
    pub states: Vec<Vec<Tensor>>,
    /// Where directions go, with a [`Rule::trust_ratio`]; else empty.
    pub directions: Vec<Tensor>,
}

/// An error unless `value` is in a range.
pub(super) fn check_setting(
    setting: &'static str,
    value: f64,
    is_right: bool,
    expected: &'static str,
) -> Result<()> {
    if is_right {
        return Ok(());
    }
    Err(Error::BadSetting { setting, value: value.to_string(), expected })
}

/// What every rule checks.
pub(super) fn check_lr_and_decay(lr: f64, weight_decay: f64) -> Result<()> {
    check_setting("lr", lr, lr >= 0.0 && lr.is_finite(), "a number ≥ 0")?;
    let is_right = weight_decay >= 0.0 && weight_decay.is_finite();
    check_setting("weight_decay", weight_decay, is_right, "a number ≥ 0")
}

/// What the rules of Adam's family check.
pub(super) fn check_betas(beta1: f64, beta2: f64, eps: f64) -> Result<()> {
    for (setting, beta) in [("beta1", beta1), ("beta2", beta2)] {
        check_setting(setting, beta, (0.0..1.0).contains(&beta), "a number in [0, 1)")?;
    }
    check_setting("eps", eps, eps > 0.0 && eps.is_finite(), "a number > 0")
}
