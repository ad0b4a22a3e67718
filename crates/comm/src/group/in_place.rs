//! Collectives of segments that work on one buffer in its place.

use super::collectives::plan;
use super::Group;
use crate::dtype::Element;
use crate::error::Result;
use crate::fingerprint::Op;
use crate::reduce_op::ReduceOp;
use crate::region::Buffer;
use crate::work::Work;

impl Group {
    /// Reduces, leaving segment `rank` of `world_size` equal segments reduced; the rest of the
    /// buffer is unspecified.
    ///
    /// # Errors
    ///
    /// As [`Group::all_reduce`]; the buffer cannot be cut into equal segments.
    #[track_caller]
    pub fn reduce_scatter_in_place<'b, T: Element>(
        &mut self,
        buffer: impl Buffer<'b, T>,
        op: impl ReduceOp<T>,
    ) -> Result<Work<'b>> {
        let bytes = buffer.into_bytes();
        let plan = plan::<T>(Op::ReduceScatter, &bytes, Some(op.reduction()), None);
        let plan = self.segmented(plan)?;
        self.in_place(&plan, bytes)
    }

    /// Fills every segment of every rank's buffer from the rank of that number; segment `rank` is
    /// this rank's input.
    ///
    /// # Errors
    ///
    /// As [`Group::reduce_scatter_in_place`].
    #[track_caller]
    pub fn all_gather_in_place<'b, T: Element>(
        &mut self,
        buffer: impl Buffer<'b, T>,
    ) -> Result<Work<'b>> {
        let bytes = buffer.into_bytes();
        let plan = self.segmented(plan::<T>(Op::AllGather, &bytes, None, None))?;
        self.in_place(&plan, bytes)
    }

    /// As [`Group::all_to_all`] on one buffer: segment r goes to rank r, and what rank r sent takes its place.
    ///
    /// # Errors
    ///
    /// As [`Group::all_to_all`]; the buffer is on a GPU, where it takes two.
    #[track_caller]
    pub fn all_to_all_in_place<'b, T: Element>(
        &mut self,
        buffer: impl Buffer<'b, T>,
    ) -> Result<Work<'b>> {
        let bytes = buffer.into_bytes();
        if bytes.is_on_device() {
            return Err(self.host_only(Op::AllToAll));
        }
        let plan = self.segmented(plan::<T>(Op::AllToAll, &bytes, None, None))?;
        self.in_place(&plan, bytes)
    }
}
