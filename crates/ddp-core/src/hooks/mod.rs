//! Communication hooks: how a bucket of gradients becomes its mean, where that is not one plain reduction.
//!
//! A [`Hook`] is given to [`Ddp::set_hook`](crate::Ddp::set_hook). It sees each bucket twice: when its gradients are ready
//! ([`Hook::start`], while backward goes on) and, in the same order, at the end of backward ([`Hook::finish`], as often as it
//! asks for). Between the two its collectives run. What it leaves in the bucket's memory is the mean.
//!
//! n elements of f32 on P ranks; bytes that a rank sends in one exchange, at least:
//!
//! | hook | bytes | what is lost |
//! |---|---|---|
//! | [`Plain`] | 2 (P−1)/P · 4n | nothing |
//! | [`Cast::bf16`], [`Cast::fp16`] | 2 (P−1)/P · 2n | the last 16 (13) bits of each gradient, and of the mean |
//! | [`Int8Blocks`] | 2 (P−1)/P · (1 + 4/block) n | at most 1/254 of the largest value of a block, twice |
//! | [`TopK`] | (P−1) · 8 · fraction · n | all but the largest of each rank's |
//! | [`PowerSgd`] | 2 (P−1)/P · 4 Σ rank · (rows + columns) | what is not of that rank |
//! | [`Noop`] | 0 | the other ranks |
//!
//! [`ErrorFeedback`] around a [`Lossy`] hook adds what was lost to the next step's gradients. With [`Zero::One`](crate::Zero::One) the second half
//! of the first three rows is not sent.
//!
//! # Determinism
//! Every rank comes to the same bits, and the same run has the same bits again: sums are in rank order, and what is decompressed is the same
//! data on every rank. On GPUs both hold as far as they hold for libtorch's kernels.
//!
//! # Source
//! The interface follows `torch/distributed/algorithms/ddp_comm_hooks`; each hook's file names its paper.

mod bucket;
mod cast;
mod driver;
mod error_feedback;
mod int8;
mod noop;
mod plain;
mod power_sgd;
mod residuals;
mod state;
mod top_k;
mod wire;

use std::fmt::Debug;

pub use bucket::{Bucket, Crossing, Placed};
pub use cast::{Cast, Casting};
pub use error_feedback::ErrorFeedback;
pub use int8::{Int8Blocks, Quantised};
pub use noop::Noop;
pub use plain::{Plain, Reducing};
pub use power_sgd::{Factoring, PowerSgd, PowerSgdOptions};
pub use state::{Kept, State};
pub use top_k::TopK;
pub use wire::Wire;

pub(crate) use driver::{Hooked, Start};
use wire::Pool;

use crate::Result;

/// How far [`Hook::finish`] has come with a bucket.
#[derive(Debug)]
pub enum Progress<P> {
    /// The bucket's memory holds the mean.
    Done,
    /// Another collective was started: finish is called again, after that of the buckets behind it.
    Again(P),
}

impl<P> Progress<P> {
    /// The same with another kind of pending.
    pub(crate) fn map<Q>(self, wrap: impl FnOnce(P) -> Q) -> Progress<Q> {
        match self {
            Self::Done => Progress::Done,
            Self::Again(pending) => Progress::Again(wrap(pending)),
        }
    }
}

/// How gradients are exchanged. Every rank has the same hook with the same settings, and starts the same collectives.
///
/// Errors end the training: the group is dead after them.
///
/// # Example
/// Gradients that travel as the sum of their signs (one bit would do; here it is a byte for each):
///
/// ```
/// use phalanx_comm::Work;
/// use phalanx_ddp_core::hooks::{Bucket, Hook, Progress, Wire};
/// use phalanx_ddp_core::Result;
/// use tch::Kind;
///
/// #[derive(Debug)]
/// struct Signs { step: f64 }
///
/// impl Hook for Signs {
///     type Pending = (Wire, Work<'static>);
///
///     fn name(&self) -> String {
///         format!("signs of step {}", self.step)
///     }
///
///     fn start(&mut self, bucket: &mut Bucket<'_>) -> Result<Self::Pending> {
///         let wire = bucket.take(Kind::Half, bucket.len())?;
///         let signs = bucket.gradients()?.f_sign()?;
///         tch::no_grad(|| wire.tensor().shallow_clone().f_copy_(&signs).map(drop))?;
///         let work = bucket.all_reduce("signs", &wire, 1.0)?;
///         Ok((wire, work))
///     }
///
///     fn finish(
///         &mut self,
///         bucket: &mut Bucket<'_>,
///         (wire, work): Self::Pending,
///     ) -> Result<Progress<Self::Pending>> {
///         bucket.wait(work)?;
///         let mean = wire.tensor().f_sign()?.f_mul_scalar(self.step)?;
///         let mut gradients = bucket.gradients()?;
///         tch::no_grad(|| gradients.f_copy_(&mean).map(drop))?;
///         bucket.put_back(wire);
///         Ok(Progress::Done)
///     }
/// }
/// ```
pub trait Hook: Debug + Send + 'static {
    /// What is kept of a bucket from its start to its end.
    type Pending: Debug + Send + 'static;

    /// Its name and settings in one line: what ranks compare.
    fn name(&self) -> String;

    /// An error for settings that cannot be.
    ///
    /// # Errors
    /// [`Error::BadSetting`](crate::Error::BadSetting).
    fn check(&self) -> Result<()> {
        Ok(())
    }

    /// The gradients of a bucket are ready: starts what exchanges them. It does not wait: backward goes on behind it. Until the
    /// end the bucket's memory is the hook's to use.
    ///
    /// # Errors
    /// Those of the group and of libtorch.
    fn start(&mut self, bucket: &mut Bucket<'_>) -> Result<Self::Pending>;

    /// At the end of backward, bucket by bucket in the order of their starts; with [`Zero::Two`](crate::Zero::Two) and more also sooner, and
    /// out of that order, though in one that is the same on every rank: where the bucket's memory is needed for the next. Waits for what was started, and leaves the mean in the bucket's
    /// memory, in [`Bucket::segment`] at least.
    ///
    /// # Errors
    /// Those of the group and of libtorch.
    fn finish(
        &mut self,
        bucket: &mut Bucket<'_>,
        pending: Self::Pending,
    ) -> Result<Progress<Self::Pending>>;

    /// Whether ranks come to different gradients with it, so that nobody compares their parameters.
    fn drifts(&self) -> bool {
        false
    }

    /// The gradients of the last exchange were not finite: what they have left in the hook is forgotten.
    fn reset(&mut self) {}

    /// What it must have to go on in another process.
    ///
    /// # Errors
    /// Those of libtorch.
    fn state(&self) -> Result<State> {
        Ok(State::default())
    }

    /// Goes on from a state.
    ///
    /// # Errors
    /// Those of libtorch; what does not fit.
    fn load(&mut self, _state: &State) -> Result<()> {
        Ok(())
    }
}

/// A hook that loses something of the gradients, and says what: to [`Bucket::lost`] it adds, in `start` and `finish` together, what of this rank's
/// gradients (as they were at the start) is not in the mean, such that the mean over the ranks of gradients − lost is the mean that
/// it comes to. [`ErrorFeedback`] needs that.
pub trait Lossy: Hook {}
