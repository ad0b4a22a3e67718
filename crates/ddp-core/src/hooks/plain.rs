//! The plain reduction, as it is without a hook: inside of other hooks, and to put one back.

use phalanx_comm::Work;
use tch::{Kind, Tensor};

use super::{Bucket, Hook, Progress};
use crate::Result;

/// The mean of the gradients as they are: mean = scale · Σ gradients, in rank order, in their place. 2 (P−1)/P · 4n bytes.
///
/// Inside of [`Cast`](super::Cast), between machines, it does not let the group reduce, which sends partial sums in f32 from rank to rank: segments in half precision
/// go to the ranks that add them, in f32 in rank order, and their means to all. The bits are the same, the bytes a third or less.
#[derive(Clone, Copy, Debug, Default)]
pub struct Plain;

/// What is under way of a bucket.
#[derive(Debug)]
pub enum Reducing {
    /// The group reduces.
    Reduction(Work<'static>),
    /// Segments go to the ranks that add them.
    Crossing(Work<'static>),
    /// Means come back.
    Gathering(Work<'static>),
}

impl Hook for Plain {
    type Pending = Reducing;

    fn name(&self) -> String {
        "plain".to_owned()
    }

    fn start(&mut self, bucket: &mut Bucket<'_>) -> Result<Self::Pending> {
        match bucket.cross_in_place()? {
            Some(work) => Ok(Reducing::Crossing(work)),
            None => Ok(Reducing::Reduction(bucket.reduce_in_place(bucket.scale())?)),
        }
    }

    fn finish(
        &mut self,
        bucket: &mut Bucket<'_>,
        pending: Self::Pending,
    ) -> Result<Progress<Self::Pending>> {
        match pending {
            Reducing::Reduction(work) | Reducing::Gathering(work) => bucket.wait(work)?,
            Reducing::Crossing(work) => {
                bucket.wait(work)?;
                sum(bucket)?;
                if let Some(gathering) = bucket.gather_in_place()? {
                    return Ok(Progress::Again(Reducing::Gathering(gathering)));
                }
            }
        }
        Ok(Progress::Done)
    }
}

/// Every rank's segment has arrived: their mean takes the place of this rank's own.
fn sum(bucket: &Bucket<'_>) -> Result<()> {
    let arrived = bucket.gradients()?;
    let of = |rank| -> Result<Tensor> {
        Ok(bucket.part(&arrived, &bucket.segment_of(rank))?.f_to_kind(Kind::Float)?)
    };
    tch::no_grad(|| -> Result<()> {
        let mut sum = of(0)?;
        for rank in 1..bucket.world_size() {
            drop(sum.f_add_(&of(rank)?)?);
        }
        drop(sum.f_mul_scalar_(bucket.scale())?);
        let own = bucket.segment_of(bucket.rank());
        bucket.part(&arrived, &own)?.f_copy_(&sum)?;
        Ok(())
    })
}
