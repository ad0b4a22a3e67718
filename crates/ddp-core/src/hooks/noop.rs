//! No exchange at all: how fast training would be without communication.

use super::{Bucket, Hook, Progress};
use crate::Result;

/// Every rank goes on with its own gradients, as if they were the mean: an upper bound of speed, to measure with. The ranks' models drift apart,
/// and nobody compares them; the log says so.
///
/// # Source
/// `noop_hook` of `torch/distributed/algorithms/ddp_comm_hooks/debugging_hooks.py`.
#[derive(Clone, Copy, Debug, Default)]
pub struct Noop;

impl Hook for Noop {
    type Pending = ();

    fn name(&self) -> String {
        "noop".to_owned()
    }

    fn start(&mut self, bucket: &mut Bucket<'_>) -> Result<()> {
        let factor = bucket.factor();
        if (factor - 1.0).abs() > 0.0 {
            let mut gradients = bucket.gradients()?;
            tch::no_grad(|| gradients.f_mul_scalar_(factor).map(drop))?;
        }
        Ok(())
    }

    fn finish(&mut self, _bucket: &mut Bucket<'_>, (): ()) -> Result<Progress<()>> {
        Ok(Progress::Done)
    }

    fn drifts(&self) -> bool {
        true
    }
}
