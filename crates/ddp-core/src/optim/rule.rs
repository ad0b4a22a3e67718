//! [`Rule`]: how one optimizer updates elements. What is around it (sharding, groups, clipping, masters, the gathering of
//! parameters) is [`Optimizer`](super::Optimizer)'s, so that another rule is a page.

use tch::Tensor;

use crate::{Error, Result};

/// How an optimizer updates parameters, element by element; see [`AdamW`](super::AdamW) for one.
///
/// An element's update may depend on nothing but that element, its state and [`Now`]: a rank sees its
/// segments alone, cut anywhere at a multiple of 64 elements. Where a whole parameter's norm decides, there is
/// [`trust_ratio`](Self::trust_ratio), where all of a parameter's elements do, [`whole`](Self::whole).
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

    /// Whether steps are scaled by norms of whole parameters. [`update`](Self::update) then leaves parameters alone and
    /// writes [`Runs::directions`], and [`apply`](Self::apply) follows.
    fn has_trust_ratio(&self) -> bool {
        false
    }

    /// The factor of a parameter's step, with a [trust ratio](Self::has_trust_ratio).
    fn trust_ratio(&self, _now: &Now, _norms: Norms) -> f64 {
        1.0
    }

    /// What the rule does with parameters that it needs whole; `None` for a rule that needs none.
    fn whole(&self) -> Option<&dyn Whole> {
        None
    }

    /// Moves elements of one parameter along their directions, by the `factor` that
    /// [`trust_ratio`](Self::trust_ratio) gave, if this rule has one: `parameter − lr × factor × direction`, where the
    /// rule says no other.
    ///
    /// # Errors
    /// libtorch's own.
    fn apply(&self, now: &Now, factor: f64, runs: &Runs) -> Result<()> {
        for (parameter, direction) in runs.parameters.iter().zip(&runs.directions) {
            let scaled = direction.f_mul_scalar(now.lr * factor)?;
            tch::no_grad(|| parameter.shallow_clone().f_sub_(&scaled).map(drop))?;
        }
        Ok(())
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
    fn has_trust_ratio(&self) -> bool {
        (**self).has_trust_ratio()
    }
    fn trust_ratio(&self, now: &Now, norms: Norms) -> f64 {
        (**self).trust_ratio(now, norms)
    }
    fn whole(&self) -> Option<&dyn Whole> {
        (**self).whole()
    }
    fn apply(&self, now: &Now, factor: f64, runs: &Runs) -> Result<()> {
        (**self).apply(now, factor, runs)
    }
}

/// The part of a [`Rule`] that needs parameters whole: matrices that are orthogonalised or factored.
///
/// Of such parameters (`is_whole` of [`Now`]) [`Rule::update`] leaves the elements alone and writes
/// [`Runs::directions`]. Their pieces come together on one rank, the matrix's owner, which [turns](Self::turn) the
/// direction; its pieces go back to their holders, and [`Rule::apply`] follows.
pub trait Whole {
    /// Whether it takes the parameter of this name and shape.
    fn takes(&self, name: &str, shape: &[i64]) -> bool;

    /// Names of what is kept for each of their elements, in the place of [`Rule::states`], all zero at first.
    fn states(&self) -> &'static [&'static str];

    /// What a parameter's owner keeps of it beside: names and shapes, all zero at first, in the direction's kind.
    fn kept(&self, _shape: &[i64]) -> Vec<(&'static str, Vec<i64>)> {
        Vec::new()
    }

    /// Makes what the step goes along of a parameter's whole direction, in the same shape. It must come out the
    /// same whichever rank computes it.
    ///
    /// # Errors
    /// libtorch's own.
    fn turn(&self, now: &Now, direction: &Tensor, kept: &[Tensor]) -> Result<Tensor>;

    /// Learning rate and weight decay of the parameters that it does not take, where their group has none.
    fn others(&self) -> (f64, f64);
}

/// What a [`Rule::trust_ratio`] is made of.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Norms {
    /// 2-norm of the whole parameter.
    pub parameter: f64,
    /// 2-norm of its whole direction.
    pub direction: f64,
    /// Elements of the parameter.
    pub len: usize,
}

/// A run's gradient, clipped and unscaled: divided by what the step divides gradients by.
pub(super) fn divided(now: &Now, gradient: &Tensor) -> Result<Tensor> {
    Ok(match now.divisor_tensor {
        Some(_) => gradient.f_div_scalar(now.divisor)?,
        None => gradient.shallow_clone(),
    })
}

/// The numbers of one update.
#[derive(Debug)]
#[expect(clippy::struct_excessive_bools, reason = "of the group, and of the parameters")]
pub struct Now {
    /// How often these elements are updated, this time included: from 1.
    pub step: u64,
    /// The same as an f32 scalar on the parameters' device.
    pub step_tensor: Tensor,
    /// Learning rate of the group.
    pub lr: f64,
    /// Weight decay of the group.
    pub weight_decay: f64,
    /// Whether the group's steps are scaled by norms, where the rule does that.
    pub is_scaled: bool,
    /// Whether these are parameters that the rule takes [whole](Rule::whole).
    pub is_whole: bool,
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
    /// Where directions go, with a [trust ratio](Rule::has_trust_ratio) and for parameters that are taken
    /// [whole](Rule::whole); else empty. It may be the memory of `gradients`.
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

/// What rules with a momentum check.
pub(super) fn check_momentum(momentum: f64) -> Result<()> {
    check_setting("momentum", momentum, (0.0..1.0).contains(&momentum), "a number in [0, 1)")
}

/// What the rules of Adam's family check.
pub(super) fn check_betas(beta1: f64, beta2: f64, eps: f64) -> Result<()> {
    for (setting, beta) in [("beta1", beta1), ("beta2", beta2)] {
        check_setting(setting, beta, (0.0..1.0).contains(&beta), "a number in [0, 1)")?;
    }
    check_setting("eps", eps, eps > 0.0 && eps.is_finite(), "a number > 0")
}
