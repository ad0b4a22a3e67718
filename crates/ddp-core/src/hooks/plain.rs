//! The plain reduction, as it is without a hook: inside of other hooks, and to put one back.

use phalanx_comm::Work;

use super::{Bucket, Hook, Progress};
use crate::Result;

/// The mean of the gradients as they are: mean = scale · Σ gradients, in rank order, in their place. 2 (P−1)/P · 4n bytes.
#[derive(Clone, Copy, Debug, Default)]
pub struct Plain;

impl Hook for Plain {
    type Pending = Work<'static>;

    fn name(&self) -> String {
        "plain".to_owned()
    }

    fn start(&mut self, bucket: &mut Bucket<'_>) -> Result<Self::Pending> {
        bucket.reduce_in_place(bucket.scale())
    }

    fn finish(
        &mut self,
        bucket: &mut Bucket<'_>,
        work: Self::Pending,
    ) -> Result<Progress<Self::Pending>> {
        bucket.wait(work)?;
        Ok(Progress::Done)
    }
}
