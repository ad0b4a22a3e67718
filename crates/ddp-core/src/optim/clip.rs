//! How gradients are clipped: by their norm, or each element by itself.
//!
//! Norms are summed cell by cell ([`store::norm`](crate::store::norm)), so that they do not depend on the sharding.

use phalanx_comm::recorder;

use super::rule::check_setting;
use super::together::Locked;
use crate::hooks::Hooked;
use crate::store::norm::Power;
use crate::{Error, NonFinite, Result};

/// What an [`Optimizer`](super::Optimizer) does to gradients before a step.
///
/// A plain `Option<f64>` is one, too: `Some(max)` is [`Clip::norm`]`(max)`, `None` is [`Clip::none`].
///
/// ```
/// use phalanx_ddp_core::optim::Clip;
/// assert_eq!(Clip::from(Some(1.0)), Clip::norm(1.0));
/// assert_eq!(Clip::p_norm(1.0, 2.0), Clip::norm(1.0));
/// let _largest_element = Clip::p_norm(0.1, f64::INFINITY);
/// let _strict = Clip::norm(1.0).error_if_nonfinite();
/// ```
///
/// # Source
/// `torch.nn.utils.clip_grad_norm_` and `clip_grad_value_`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Clip {
    pub(super) to: Limit,
    pub(super) is_strict: bool,
}

/// To what gradients are clipped.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Limit {
    Nothing,
    /// The norm of all gradients together: (Σ |g|^p)^(1/p).
    Norm {
        max: f64,
        p: f64,
    },
    /// Each element, to −max … max.
    Value {
        max: f64,
    },
}

impl Clip {
    /// Gradients stay as they are, and nobody asks for their norm.
    #[must_use]
    pub fn none() -> Self {
        Self::to(Limit::Nothing)
    }

    /// Where the 2-norm of all gradients is above `max`, they are all divided by norm / `max`. With
    /// `f64::INFINITY` it is only computed.
    #[must_use]
    pub fn norm(max: f64) -> Self {
        Self::p_norm(max, 2.0)
    }

    /// As [`Clip::norm`] with another norm: `p` is 1 or more, or `f64::INFINITY`, which is the largest element's.
    #[must_use]
    pub fn p_norm(max: f64, p: f64) -> Self {
        Self::to(Limit::Norm { max, p })
    }

    /// Each element of the gradients is clamped to −`max` … `max`, on its own. One that is no number stays so.
    #[must_use]
    pub fn value(max: f64) -> Self {
        Self::to(Limit::Value { max })
    }

    /// A norm that is not finite is [`Error::NonFiniteNorm`](crate::Error::NonFiniteNorm) on every rank, whatever the `Ddp` does about gradients
    /// that are not finite; without this it is what [`NonFinite`](crate::NonFinite) says.
    #[must_use]
    pub fn error_if_nonfinite(self) -> Self {
        Self { is_strict: true, ..self }
    }

    fn to(to: Limit) -> Self {
        Self { to, is_strict: false }
    }

    /// An error for what cannot be.
    pub(super) fn check(self) -> Result<()> {
        match self.to {
            Limit::Nothing => Ok(()),
            Limit::Norm { max, p } => {
                check_setting("norm_max", max, max > 0.0, "a number > 0")?;
                check_setting("p of a norm", p, p >= 1.0, "1 or more, or infinity")
            }
            Limit::Value { max } => check_setting("value_max", max, max > 0.0, "a number > 0"),
        }
    }

    /// Which norm is wanted, if any.
    pub(super) fn power(self) -> Option<Power> {
        match self.to {
            Limit::Norm { p, .. } => Some(Power::of(p)),
            Limit::Nothing | Limit::Value { .. } => None,
        }
    }

    /// What gradients of this norm are divided by.
    pub(super) fn divisor(self, norm: Option<f64>) -> f64 {
        match (self.to, norm) {
            (Limit::Norm { max, .. }, Some(norm)) => ((norm + 1e-6) / max).max(1.0),
            _ => 1.0,
        }
    }

    /// Whether a step whose norm is not finite is left out; an error if it is to be one. The same on every rank.
    pub(super) fn skips(
        self,
        reducers: &mut Locked<'_>,
        (is_scaled, norm): (bool, Option<f64>),
    ) -> Result<bool> {
        let norm = norm.unwrap_or(f64::NAN);
        let Some((policy, rank, trains_locally)) = reducers.first().map(|first| {
            (first.options.non_finite, first.store.rank_of_all(), first.trains_locally())
        }) else {
            return Ok(false);
        };
        let is_error = self.is_strict || (policy == NonFinite::Error && !is_scaled);
        if is_error || is_scaled || policy == NonFinite::SkipStep {
            let hooked = reducers.iter_mut().filter_map(|reducer| reducer.hooked.as_mut());
            hooked.for_each(Hooked::reset);
        }
        if is_error {
            reducers.iter_mut().try_for_each(|reducer| reducer.release_gradients())?;
            let error = Error::NonFiniteNorm { norm };
            if !trains_locally {
                recorder::tell_shared_error(&error.to_string());
            }
            return Err(error);
        }
        if !is_scaled && policy != NonFinite::Ignore && rank == 0 {
            tracing::warn!(norm, "the norm of all gradients is not finite");
        }
        Ok(is_scaled || policy == NonFinite::SkipStep)
    }

    /// What each element is clamped to.
    pub(super) fn value_max(self) -> Option<f64> {
        match self.to {
            Limit::Value { max } => Some(max),
            Limit::Nothing | Limit::Norm { .. } => None,
        }
    }

    /// What ranks must agree on.
    pub(super) fn bytes(self) -> Vec<u8> {
        let (kind, max, p) = match self.to {
            Limit::Nothing => (0.0, -1.0, 0.0),
            Limit::Norm { max, p } => (1.0, max, p),
            Limit::Value { max } => (2.0, max, 0.0),
        };
        [kind, max, p].map(f64::to_le_bytes).concat()
    }
}

impl From<Option<f64>> for Clip {
    fn from(norm_max: Option<f64>) -> Self {
        norm_max.map_or_else(Self::none, Self::norm)
    }
}
