//! What a lossy hook has lost is added to the next gradients.

use tch::Kind;

use super::residuals::Residuals;
use super::{Bucket, Hook, Lossy, Progress, State};
use crate::Result;

/// The names of saved tensors begin with it.
const RESIDUAL: &str = "residual";
const INNER: &str = "inner";

/// A [`Lossy`] hook whose losses are not lost: each rank keeps them, element by element in f32, and adds them to its next gradients.
///
/// With g a rank's gradient and e its residual (0 at first), the hook inside gets y = P · scale · g + e with the factor 1/P, and e becomes what it
/// loses of y. Over any number of steps the sum of the means differs from what the plain reduction comes to by the mean of the ranks' residuals
/// alone, which does not grow with the number of steps. Costs 4n bytes of memory and one pass.
///
/// Residuals are of the size of a mean, so they fit next to gradients of other weights. With a loss scale that changes
/// ([`LossScaler`](crate::amp::LossScaler)) one step's residual is off by the factor of the change. Residuals of a step that was not finite are
/// forgotten, and so is what was kept of a parameter that no rank has used in a step. They are saved with an axis of ranks in front; on another number of ranks each gets the mean, which keeps their sum's meaning.
///
/// # Source
/// Karimireddy et al. 2019, "Error Feedback Fixes `SignSGD` and other Gradient Compression Schemes".
#[derive(Debug)]
pub struct ErrorFeedback<H> {
    inner: H,
    residuals: Residuals,
}

impl<H: Lossy> ErrorFeedback<H> {
    /// Feeds back what `inner` loses.
    pub fn around(inner: H) -> Self {
        Self { inner, residuals: Residuals::default() }
    }
}

/// 1 over the number of ranks.
#[expect(clippy::cast_precision_loss, reason = "world sizes are far below 2^53")]
fn one_over_ranks(bucket: &Bucket<'_>) -> f64 {
    1.0 / bucket.world_size() as f64
}

impl<H: Lossy> Hook for ErrorFeedback<H> {
    type Pending = H::Pending;

    fn name(&self) -> String {
        format!("{} with error feedback", self.inner.name())
    }

    fn check(&self) -> Result<()> {
        self.inner.check()
    }

    fn start(&mut self, bucket: &mut Bucket<'_>) -> Result<Self::Pending> {
        let mut residual = self.residuals.of(bucket)?;
        let mut gradients = bucket.gradients()?;
        let factor = bucket.factor();
        tch::no_grad(|| -> Result<()> {
            if (factor - 1.0).abs() > 0.0 {
                drop(residual.f_add_(&gradients.f_mul_scalar(factor)?)?);
            } else {
                drop(residual.f_add_(&gradients)?);
            }
            gradients.f_copy_(&residual)?;
            if gradients.kind() == Kind::Float || gradients.kind() == Kind::Double {
                drop(residual.f_zero_()?);
            } else {
                // What the gradients' own kind loses.
                drop(residual.f_sub_(&gradients)?);
            }
            Ok(())
        })?;
        let scale = one_over_ranks(bucket);
        self.inner.start(&mut bucket.losing(&residual, scale))
    }

    fn finish(
        &mut self,
        bucket: &mut Bucket<'_>,
        pending: Self::Pending,
    ) -> Result<Progress<Self::Pending>> {
        let residual = self.residuals.of(bucket)?;
        let scale = one_over_ranks(bucket);
        self.inner.finish(&mut bucket.losing(&residual, scale), pending)
    }

    fn drifts(&self) -> bool {
        self.inner.drifts()
    }

    fn reset(&mut self) {
        self.residuals.reset();
        self.inner.reset();
    }

    fn state(&self) -> Result<State> {
        let mut state = State { tensors: self.residuals.saved(RESIDUAL)?, ..State::default() };
        state.put(INNER, self.inner.state()?);
        Ok(state)
    }

    fn load(&mut self, state: &State) -> Result<()> {
        self.residuals.load(RESIDUAL, &state.tensors);
        self.inner.load(&state.inner(INNER))
    }
}
