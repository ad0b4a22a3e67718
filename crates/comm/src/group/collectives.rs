//! The collectives, typed: check the arguments, bring the buffers into the in-place form (`call.rs`
//! beside this folder), start.
#![expect(single_use_lifetimes, reason = "an anonymous lifetime in `impl Trait` is unstable")]

use std::sync::Arc;

use super::{CallArguments, Group};
use crate::call::{Call, CallMemory};
use crate::dtype::Element;
use crate::error::{Error, Result};
use crate::fingerprint::Op;
use crate::reduce_op::{ReduceOp, Reduction};
use crate::region::{Buffer, Bytes, Input, InputBytes};
use crate::work::{Work, WorkOutput};

impl Group {
    /// Replaces every rank's buffer by the reduction of all.
    ///
    /// # Errors
    ///
    /// The group is dead, or the region belongs to another group.
    ///
    /// # Example
    ///
    /// ```
    /// # use phalanx_comm::{Avg, Group, GroupOptions};
    /// # let mut group = Group::single(GroupOptions::default())?;
    /// let gradients = group.allocate::<f32>(1000)?;
    /// let work = group.tagged("bucket 0").all_reduce(gradients.full(), Avg)?;
    /// // … other work …
    /// work.wait()?;
    /// # Ok::<(), phalanx_comm::Error>(())
    /// ```
    #[track_caller]
    pub fn all_reduce<'b, T: Element>(
        &mut self,
        buffer: impl Buffer<'b, T>,
        op: impl ReduceOp<T>,
    ) -> Result<Work<'b>> {
        let bytes = buffer.into_bytes();
        let plan = plan::<T>(Op::AllReduce, &bytes, Some(op.reduction()), None);
        self.in_place(&plan, bytes)
    }

    /// Replaces the root's buffer by the reduction of all; the others' stay as they are.
    ///
    /// # Errors
    ///
    /// As [`Group::all_reduce`]; the root is no rank of the group.
    #[track_caller]
    pub fn reduce<'b, T: Element>(
        &mut self,
        buffer: impl Buffer<'b, T>,
        op: impl ReduceOp<T>,
        root: usize,
    ) -> Result<Work<'b>> {
        self.check_rank(Op::Reduce, root)?;
        let bytes = buffer.into_bytes();
        let plan = plan::<T>(Op::Reduce, &bytes, Some(op.reduction()), Some(root));
        self.in_place(&plan, bytes)
    }

    /// Replaces every rank's buffer by the root's.
    ///
    /// # Errors
    ///
    /// As [`Group::reduce`].
    #[track_caller]
    pub fn broadcast<'b, T: Element>(
        &mut self,
        buffer: impl Buffer<'b, T>,
        root: usize,
    ) -> Result<Work<'b>> {
        self.check_rank(Op::Broadcast, root)?;
        let bytes = buffer.into_bytes();
        let plan = plan::<T>(Op::Broadcast, &bytes, None, Some(root));
        self.in_place(&plan, bytes)
    }

    /// Reduces `input`, of `world_size` segments, and writes segment `rank` to `output`.
    ///
    /// # Errors
    ///
    /// As [`Group::all_reduce`]; `input` is not `world_size` times as long as `output`.
    #[track_caller]
    pub fn reduce_scatter<'a, 'b, T: Element>(
        &mut self,
        input: impl Input<'a, 'b, T>,
        output: impl Buffer<'b, T>,
        op: impl ReduceOp<T>,
    ) -> Result<Work<'b>> {
        let (input, output) = (input.source(), output.into_bytes());
        self.check_sides(Op::ReduceScatter, &input, &output)?;
        let segment = output.len();
        self.check_segments::<T>(Op::ReduceScatter, "input", input.len(), segment)?;
        let plan = CallArguments {
            reduction: Some(op.reduction()),
            ..self.whole::<T>(Op::ReduceScatter, segment, None)
        };
        let input = match input {
            InputBytes::CallMemory(input) => return self.device_segments(&plan, input, output),
            InputBytes::Slice(input) => input,
        };
        let skip = self.rank() * segment;
        let call = self.begin(&plan, CallMemory::Nothing, Some(input))?;
        Ok(self.work(&plan, call, Some(WorkOutput { bytes: output, skip })))
    }

    /// Writes every rank's `input`, in rank order, to every rank's `output`.
    ///
    /// # Errors
    ///
    /// As [`Group::all_reduce`]; `output` is not `world_size` times as long as `input`.
    #[track_caller]
    pub fn all_gather<'a, 'b, T: Element>(
        &mut self,
        input: impl Input<'a, 'b, T>,
        output: impl Buffer<'b, T>,
    ) -> Result<Work<'b>> {
        let (input, mut output) = (input.source(), output.into_bytes());
        self.check_sides(Op::AllGather, &input, &output)?;
        let segment = input.len();
        self.check_segments::<T>(Op::AllGather, "output", output.len(), segment)?;
        let plan = self.whole::<T>(Op::AllGather, segment, None);
        let input = match input {
            InputBytes::CallMemory(input) => return self.device_segments(&plan, input, output),
            InputBytes::Slice(input) => input,
        };
        if let Bytes::Region { memory, offset, .. } = &output {
            self.check_region(Op::AllGather, memory)?;
            if let Some(error) = self.core.peers.failure() {
                return Err(error);
            }
            let memory = CallMemory::Region { region: Arc::clone(memory), offset: *offset };
            self.end_all_on(&memory, output.len())?;
            output.write(self.rank() * segment, input);
            return self.in_place(&plan, output);
        }
        self.placed(&plan, input, self.rank() * segment, Some((output, 0)))
    }

    /// Writes every rank's `input`, in rank order, to the root's `output`.
    ///
    /// # Errors
    ///
    /// As [`Group::reduce`]; `output` is not `Some` exactly on the root, or has not `world_size`
    /// times the length of `input`.
    #[track_caller]
    pub fn gather<'a, 'b, T: Element, B: Buffer<'b, T>>(
        &mut self,
        input: impl Input<'a, 'b, T>,
        output: Option<B>,
        root: usize,
    ) -> Result<Work<'b>> {
        self.check_rank(Op::Gather, root)?;
        self.check_root_buffer(Op::Gather, root, output.is_some())?;
        let (input, output) = (input.source(), output.map(B::into_bytes));
        if let Some(output) = &output {
            self.check_sides(Op::Gather, &input, output)?;
        }
        let input = match input {
            InputBytes::CallMemory(input) => return self.device_gather::<T>(input, output, root),
            InputBytes::Slice(input) => input,
        };
        let segment = input.len();
        let plan = self.whole::<T>(Op::Gather, segment, Some(root));
        let Some(output) = output else {
            let call = self.begin(&plan, CallMemory::Nothing, Some(input))?;
            return Ok(self.work(&plan, call, None));
        };
        self.check_segments::<T>(Op::Gather, "output", output.len(), segment)?;
        self.placed(&plan, input, self.rank() * segment, Some((output, 0)))
    }

    /// Writes segment r of the root's `input` to rank r's `output`.
    ///
    /// # Errors
    ///
    /// As [`Group::gather`], with `input` on the root.
    #[track_caller]
    pub fn scatter<'a, 'b, T: Element>(
        &mut self,
        input: Option<impl Input<'a, 'b, T>>,
        output: impl Buffer<'b, T>,
        root: usize,
    ) -> Result<Work<'b>> {
        self.check_rank(Op::Scatter, root)?;
        self.check_root_buffer(Op::Scatter, root, input.is_some())?;
        let output = output.into_bytes();
        let segment = output.len();
        let plan = self.whole::<T>(Op::Scatter, segment, Some(root));
        let input = input.map(Input::source);
        if let Some(input) = &input {
            self.check_sides(Op::Scatter, input, &output)?;
        }
        let input = match input {
            None if output.is_on_device() => return self.device_scatter::<T>(None, output, root),
            None => return self.placed(&plan, &[], 0, Some((output, 0))),
            Some(InputBytes::CallMemory(all)) => {
                return self.device_scatter::<T>(Some(all), output, root)
            }
            Some(InputBytes::Slice(input)) => input,
        };
        self.check_segments::<T>(Op::Scatter, "input", input.len(), segment)?;
        self.placed(&plan, input, 0, Some((output, root * segment)))
    }

    /// Writes segment r of this rank's `input` to segment `rank` of rank r's `output`.
    ///
    /// # Errors
    ///
    /// As [`Group::all_reduce`]; the lengths differ or are not a multiple of `world_size`.
    #[track_caller]
    pub fn all_to_all<'a, 'b, T: Element>(
        &mut self,
        input: impl Input<'a, 'b, T>,
        output: impl Buffer<'b, T>,
    ) -> Result<Work<'b>> {
        let (input, output) = (input.source(), output.into_bytes());
        if input.len() != output.len() {
            let size = T::DTYPE.size_bytes();
            let (expected, actual) = (input.len() / size, output.len() / size);
            let (op, what) = (Op::AllToAll.name(), "output");
            return Err(self.argument(Error::LengthMismatch { op, what, expected, actual }));
        }
        self.check_sides(Op::AllToAll, &input, &output)?;
        let input = match input {
            InputBytes::CallMemory(input) => return self.device_all_to_all::<T>(input, output),
            InputBytes::Slice(input) => input,
        };
        let plan = self.segmented(plan::<T>(Op::AllToAll, &output, None, None))?;
        let call = self.begin(&plan, CallMemory::Nothing, Some(input))?;
        Ok(self.work(&plan, call, Some(WorkOutput { bytes: output, skip: 0 })))
    }

    /// Waits, with [`Work::wait`], until every rank has come here.
    ///
    /// # Errors
    ///
    /// The group is dead.
    #[track_caller]
    pub fn barrier(&mut self) -> Result<Work<'static>> {
        let call = self.begin(&CallArguments::nothing(Op::Barrier), CallMemory::Nothing, None)?;
        Ok(Work::new(self.core(), call, None))
    }

    /// Every rank's bytes, by rank; their lengths may differ. Waits.
    ///
    /// # Errors
    ///
    /// The group is dead or fails.
    #[track_caller]
    pub fn all_gather_bytes(&mut self, mine: &[u8]) -> Result<Vec<Vec<u8>>> {
        let mut lengths = vec![0_i64; self.world_size()];
        let length = i64::try_from(mine.len()).unwrap_or(i64::MAX);
        self.all_gather(&[length], &mut lengths[..])?.wait()?;
        let lengths: Vec<usize> =
            lengths.into_iter().map(|theirs| usize::try_from(theirs).unwrap_or(0)).collect();
        let longest = lengths.iter().copied().max().unwrap_or(0);
        let mut padded = mine.to_vec();
        padded.resize(longest, 0);
        let mut all = vec![0_u8; longest * self.world_size()];
        self.all_gather(&padded, &mut all[..])?.wait()?;
        let part = |(rank, bytes)| all[rank * longest..rank * longest + bytes].to_vec();
        Ok(lengths.into_iter().enumerate().map(part).collect())
    }

    /// Starts a call whose buffer is in in-place form.
    #[track_caller]
    pub(super) fn in_place<'b>(
        &mut self,
        plan: &CallArguments,
        bytes: Bytes<'b>,
    ) -> Result<Work<'b>> {
        if bytes.is_on_device() {
            let memory = self.device_memory(plan.op, bytes, None)?;
            return self.on_lane(plan, memory);
        }
        let (call, output) = match bytes {
            Bytes::Region { memory, offset, .. } => {
                self.check_region(plan.op, &memory)?;
                (self.begin(plan, CallMemory::Region { region: memory, offset }, None)?, None)
            }
            Bytes::Device { .. } => return Err(self.host_only(plan.op)),
            Bytes::Slice(slice) => {
                let call = self.begin(plan, CallMemory::Nothing, Some(slice))?;
                (call, Some(WorkOutput { bytes: Bytes::Slice(slice), skip: 0 }))
            }
        };
        Ok(self.work(plan, call, output))
    }

    fn work<'b>(
        &self,
        plan: &CallArguments,
        call: Arc<Call>,
        output: Option<WorkOutput<'b>>,
    ) -> Work<'b> {
        Work::new(self.core(), call, output).on(self.lane_for(plan, false).as_ref())
    }

    /// Starts a call whose in-place form is made here: `input` at byte `at` of it.
    #[track_caller]
    fn placed<'b>(
        &mut self,
        plan: &CallArguments,
        input: &[u8],
        at: usize,
        output: Option<(Bytes<'b>, usize)>,
    ) -> Result<Work<'b>> {
        let rooted = matches!(plan.op, Op::Gather | Op::Scatter);
        let segments = if rooted && plan.root != Some(self.rank()) { 1 } else { plan.segments };
        let mut form = vec![0; plan.segment * segments];
        form[at..at + input.len()].copy_from_slice(input);
        let call = self.begin(plan, CallMemory::Private(form), None)?;
        let output = output.map(|(bytes, skip)| WorkOutput { bytes, skip });
        Ok(self.work(plan, call, output))
    }

    /// A plan of `world_size` segments.
    pub(super) fn whole<T: Element>(
        &self,
        op: Op,
        segment: usize,
        root: Option<usize>,
    ) -> CallArguments {
        let segments = self.world_size();
        CallArguments {
            dtype: Some(T::DTYPE),
            len: segment * segments / T::DTYPE.size_bytes(),
            root,
            segment,
            segments,
            ..CallArguments::nothing(op)
        }
    }

    /// Cuts a plan's buffer into segments.
    pub(super) fn segmented(&mut self, plan: CallArguments) -> Result<CallArguments> {
        let world_size = self.world_size();
        if !plan.len.is_multiple_of(world_size) {
            let (op, actual) = (plan.op.name(), plan.len);
            return Err(self.argument(Error::NotDivisible { op, actual, world_size }));
        }
        Ok(CallArguments { segment: plan.segment / world_size, segments: world_size, ..plan })
    }

    /// An argument error: the options for the next call were for this one.
    pub(super) fn argument(&mut self, error: Error) -> Error {
        drop(std::mem::take(&mut self.next));
        error
    }

    pub(super) fn check_rank(&mut self, op: Op, rank: usize) -> Result<()> {
        let world_size = self.world_size();
        if rank < world_size {
            return Ok(());
        }
        Err(self.argument(Error::NoSuchRank { op: op.name(), rank, world_size }))
    }

    pub(super) fn check_root_buffer(&mut self, op: Op, root: usize, given: bool) -> Result<()> {
        let rank = self.rank();
        if given == (rank == root) {
            return Ok(());
        }
        Err(self.argument(Error::RootBuffer { op: op.name(), rank, root, given }))
    }

    pub(super) fn check_segments<T: Element>(
        &mut self,
        op: Op,
        what: &'static str,
        bytes: usize,
        segment: usize,
    ) -> Result<()> {
        let expected = segment * self.world_size();
        if bytes == expected {
            return Ok(());
        }
        let size = T::DTYPE.size_bytes();
        let (expected, actual) = (expected / size, bytes / size);
        Err(self.argument(Error::LengthMismatch { op: op.name(), what, expected, actual }))
    }
}

/// A plan of one segment.
pub(super) fn plan<T: Element>(
    op: Op,
    bytes: &Bytes<'_>,
    reduction: Option<Reduction>,
    root: Option<usize>,
) -> CallArguments {
    CallArguments {
        dtype: Some(T::DTYPE),
        len: bytes.len() / T::DTYPE.size_bytes(),
        reduction,
        root,
        segment: bytes.len(),
        ..CallArguments::nothing(op)
    }
}
