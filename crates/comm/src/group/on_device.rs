//! Calls on GPU memory: how those with an input and an output buffer begin, messages, and calls that start as one.

use std::sync::Arc;

use super::collectives::plan;
use super::{CallArguments, Group};
use crate::call::CallMemory;
use crate::dtype::Element;
use crate::error::{Error, Result};
use crate::fingerprint::Op;
use crate::gpu::cuda::GpuEvent;
use crate::gpu::cuda_error;
use crate::gpu::memory::DeviceMemory;
use crate::lane::Lane;
use crate::mark::Mark;
use crate::memory::region::RegionMemory;
use crate::region::{Bytes, InputBytes};
use crate::work::Work;

impl Group {
    #[track_caller]
    pub(super) fn device_all_to_all<'b, T: Element>(
        &mut self,
        input: Bytes<'_>,
        output: Bytes<'_>,
    ) -> Result<Work<'b>> {
        let plan = self.segmented(plan::<T>(Op::AllToAll, &output, None, None))?;
        let memory = self.device_memory(Op::AllToAll, output, Some(input))?;
        self.on_lane(&plan, memory)
    }

    /// An all-gather or a reduce-scatter.
    #[track_caller]
    pub(super) fn device_segments<'b>(
        &mut self,
        plan: &CallArguments,
        input: Bytes<'_>,
        output: Bytes<'_>,
    ) -> Result<Work<'b>> {
        let memory = self.device_memory(plan.op, output, Some(input))?;
        self.on_lane(plan, memory)
    }

    #[track_caller]
    pub(super) fn device_gather<'b, T: Element>(
        &mut self,
        input: Bytes<'_>,
        output: Option<Bytes<'_>>,
        root: usize,
    ) -> Result<Work<'b>> {
        let segment = input.len();
        let plan = self.whole::<T>(Op::Gather, segment, Some(root));
        let memory = match output {
            None => self.device_memory(Op::Gather, input, None)?,
            Some(output) => {
                self.check_segments::<T>(Op::Gather, "output", output.len(), segment)?;
                self.device_memory(Op::Gather, output, Some(input))?
            }
        };
        self.on_lane(&plan, memory)
    }

    #[track_caller]
    pub(super) fn device_scatter<'b, T: Element>(
        &mut self,
        input: Option<Bytes<'_>>,
        output: Bytes<'_>,
        root: usize,
    ) -> Result<Work<'b>> {
        let segment = output.len();
        let plan = self.whole::<T>(Op::Scatter, segment, Some(root));
        if let Some(input) = &input {
            self.check_segments::<T>(Op::Scatter, "input", input.len(), segment)?;
        }
        let memory = self.device_memory(Op::Scatter, output, input)?;
        self.on_lane(&plan, memory)
    }

    /// Input and output are both the host's, or both a GPU's.
    pub(super) fn check_sides(
        &mut self,
        op: Op,
        input: &InputBytes<'_>,
        output: &Bytes<'_>,
    ) -> Result<()> {
        if matches!(input, InputBytes::CallMemory(_)) == output.is_on_device() {
            return Ok(());
        }
        Err(self.host_only(op))
    }

    /// Marks where the caller's stream is now, to measure the GPU's time; `None` without a GPU.
    ///
    /// # Errors
    ///
    /// The driver refuses.
    pub fn mark(&self) -> Result<Option<Mark>> {
        let rank = self.rank();
        let Some(gpu) = self.transport.gpu() else { return Ok(None) };
        let event = GpuEvent::record_timed(&gpu.device, self.stream);
        event.map(|event| Some(Mark { event, rank })).map_err(|error| cuda_error(rank, error))
    }

    /// Makes calls on GPU memory that NCCL carries out as one: cheaper than one by one, and messages
    /// among them need no order (each rank may send before it receives). They start when `calls` ends,
    /// or when it waits for one of them; every rank makes the same. Calls on memory of the host, and
    /// all calls of other backends, start at once.
    ///
    /// # Errors
    ///
    /// What `calls` returns; the calls it made before are carried out all the same.
    ///
    /// # Example
    ///
    /// ```
    /// # use phalanx_comm::{Group, GroupOptions, Sum, Work};
    /// # let mut group = Group::single(GroupOptions::default())?;
    /// let (weights, biases) = (group.allocate::<f32>(1000)?, group.allocate::<f32>(10)?);
    /// let works = group.coalesced(|group| {
    ///     Ok([group.all_reduce(weights.full(), Sum)?, group.all_reduce(biases.full(), Sum)?])
    /// })?;
    /// works.into_iter().try_for_each(Work::wait)?;
    /// # Ok::<(), phalanx_comm::Error>(())
    /// ```
    pub fn coalesced<R>(&mut self, calls: impl FnOnce(&mut Self) -> Result<R>) -> Result<R> {
        /// Lets the calls go, also when the caller's code panics.
        struct Release(Arc<Lane>);
        impl Drop for Release {
            fn drop(&mut self) {
                self.0.release();
            }
        }
        /// The calls that go together end here, also when the caller's code panics.
        struct Together<'a> {
            group: &'a mut Group,
            outermost: bool,
        }
        impl Drop for Together<'_> {
            fn drop(&mut self) {
                if self.outermost {
                    self.group.together = None;
                }
            }
        }
        let lane =
            self.transport.lane(true).filter(|_| self.transport.is_in_stream_order()).cloned();
        let release = lane.map(|lane| {
            lane.hold();
            Release(lane)
        });
        let outermost = self.together.is_none();
        self.together = self.together.or(Some(self.on_gpu));
        let together = Together { group: self, outermost };
        let result = calls(together.group);
        drop(together);
        drop(release);
        result
    }

    /// Starts a call on GPU memory.
    #[track_caller]
    pub(super) fn on_lane<'b>(
        &mut self,
        plan: &CallArguments,
        memory: CallMemory,
    ) -> Result<Work<'b>> {
        let call = self.begin(plan, memory, None)?;
        Ok(Work::new(self.core(), call, None).on(self.lane_for(plan, true).as_ref()))
    }

    /// GPU memory as a call has it; `input` where the operation has two buffers.
    pub(super) fn device_memory(
        &mut self,
        op: Op,
        output: Bytes<'_>,
        input: Option<Bytes<'_>>,
    ) -> Result<CallMemory> {
        if self.transport.gpu().is_none() {
            let what =
                "the buffer is memory of a GPU, but the group has none: make the group with \
                 Backend::Nccl, or with Backend::Mpi and GroupOptions::gpu_memory";
            return Err(self.argument(Error::DeviceMemory { op: op.name(), what }));
        }
        let lengths = (input.as_ref().map_or(0, Bytes::len) as u64, output.len() as u64);
        let mut keep = Vec::new();
        let mut address = |group: &mut Self, bytes| match bytes {
            Bytes::Region { memory, offset, .. } if memory.device.is_some() => {
                group.check_region(op, &memory)?;
                let at = memory.device.as_ref().map_or(0, DeviceMemory::pointer);
                keep.push(memory);
                Ok(at + offset as u64)
            }
            Bytes::Device { at, .. } => Ok(at),
            _ => Err(group.host_only(op)),
        };
        let at = address(self, output)?;
        let from = input.map(|input| address(self, input)).transpose()?;
        if let Some(from) = from.filter(|from| *from < at + lengths.1 && at < *from + lengths.0) {
            // Where the result begins is where NCCL's own in-place forms have the segment.
            let own = self.rank() as u64;
            let in_place = match op {
                Op::AllGather => from == at + own * lengths.0,
                Op::ReduceScatter => at == from + own * lengths.1,
                _ => false,
            };
            if !in_place {
                let what = "input and output overlap: one would be overwritten while it is read; \
                            use two buffers, or the form that works in place";
                return Err(self.argument(Error::DeviceMemory { op: op.name(), what }));
            }
        }
        Ok(CallMemory::Device { at, from, keep })
    }

    pub(super) fn check_region(&mut self, op: Op, memory: &RegionMemory) -> Result<()> {
        if memory.group == self.number {
            return Ok(());
        }
        Err(self.argument(Error::ForeignRegion { op: op.name() }))
    }

    /// GPU memory beside memory of the host.
    pub(super) fn host_only(&mut self, op: Op) -> Error {
        let what = "memory of the host and of a GPU cannot be mixed: use the in-place form, or \
                    buffers that are both on the GPU";
        self.argument(Error::DeviceMemory { op: op.name(), what })
    }
}
