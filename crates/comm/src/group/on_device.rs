//! Calls on GPU memory that have no twin in place: with an input and an output buffer, and
//! messages.

use std::sync::Arc;

use super::collectives::plan;
use super::{Group, Plan};
use crate::backend::gpu::cuda::Event;
use crate::backend::gpu::cuda_error;
use crate::backend::gpu::memory::DeviceMemory;
use crate::backend::host::call::Memory;
use crate::backend::host::point;
use crate::backend::host::region::RegionMemory;
use crate::backend::lane::{Check, Lane};
use crate::dtype::Element;
use crate::error::{Error, Result};
use crate::fingerprint::Op;
use crate::mark::Mark;
use crate::reduce_op::ReduceOp;
use crate::region::{Buffer, Bytes};
use crate::work::Work;

impl Group {
    /// As [`Group::all_to_all`], between two buffers of the GPU.
    ///
    /// # Errors
    ///
    /// As [`Group::all_to_all`]; a buffer is not on the GPU; they overlap.
    #[track_caller]
    pub fn all_to_all_on_device<'b, T: Element>(
        &mut self,
        input: impl Buffer<'b, T>,
        output: impl Buffer<'b, T>,
    ) -> Result<Work<'b>> {
        let (input, output) = (input.into_bytes(), output.into_bytes());
        if input.len() != output.len() {
            let size = T::DTYPE.size_bytes();
            let (expected, actual) = (input.len() / size, output.len() / size);
            let op = Op::AllToAll.name();
            let what = "output";
            return Err(self.argument(Error::LengthMismatch { op, what, expected, actual }));
        }
        let plan = self.segmented(plan::<T>(Op::AllToAll, &output, None, None))?;
        let memory = self.device_memory(Op::AllToAll, output, Some(input))?;
        self.on_lane(&plan, memory)
    }

    /// As [`Group::all_gather`], between two buffers of the GPU.
    ///
    /// # Errors
    ///
    /// As [`Group::all_gather`]; a buffer is not on the GPU.
    #[track_caller]
    pub fn all_gather_on_device<'b, T: Element>(
        &mut self,
        input: impl Buffer<'b, T>,
        output: impl Buffer<'b, T>,
    ) -> Result<Work<'b>> {
        let (input, output) = (input.into_bytes(), output.into_bytes());
        let segment = input.len();
        self.check_segments::<T>(Op::AllGather, "output", output.len(), segment)?;
        let plan = self.whole::<T>(Op::AllGather, segment, None);
        let memory = self.device_memory(Op::AllGather, output, Some(input))?;
        self.on_lane(&plan, memory)
    }

    /// As [`Group::reduce_scatter`], between two buffers of the GPU.
    ///
    /// # Errors
    ///
    /// As [`Group::reduce_scatter`]; a buffer is not on the GPU.
    #[track_caller]
    pub fn reduce_scatter_on_device<'b, T: Element>(
        &mut self,
        input: impl Buffer<'b, T>,
        output: impl Buffer<'b, T>,
        op: impl ReduceOp<T>,
    ) -> Result<Work<'b>> {
        let (input, output) = (input.into_bytes(), output.into_bytes());
        let segment = output.len();
        self.check_segments::<T>(Op::ReduceScatter, "input", input.len(), segment)?;
        let reduction = Some(op.reduction());
        let plan = Plan { reduction, ..self.whole::<T>(Op::ReduceScatter, segment, None) };
        let memory = self.device_memory(Op::ReduceScatter, output, Some(input))?;
        self.on_lane(&plan, memory)
    }

    /// As [`Group::gather`], between buffers of the GPU.
    ///
    /// # Errors
    ///
    /// As [`Group::gather`]; a buffer is not on the GPU.
    #[track_caller]
    pub fn gather_on_device<'b, T: Element, B: Buffer<'b, T>>(
        &mut self,
        input: B,
        output: Option<B>,
        root: usize,
    ) -> Result<Work<'b>> {
        self.check_rank(Op::Gather, root)?;
        self.check_root_buffer(Op::Gather, root, output.is_some())?;
        let input = input.into_bytes();
        let segment = input.len();
        let plan = self.whole::<T>(Op::Gather, segment, Some(root));
        let memory = match output.map(B::into_bytes) {
            None => self.device_memory(Op::Gather, input, None)?,
            Some(output) => {
                self.check_segments::<T>(Op::Gather, "output", output.len(), segment)?;
                self.device_memory(Op::Gather, output, Some(input))?
            }
        };
        self.on_lane(&plan, memory)
    }

    /// As [`Group::scatter`], between buffers of the GPU.
    ///
    /// # Errors
    ///
    /// As [`Group::scatter`]; a buffer is not on the GPU.
    #[track_caller]
    pub fn scatter_on_device<'b, T: Element, B: Buffer<'b, T>>(
        &mut self,
        input: Option<B>,
        output: B,
        root: usize,
    ) -> Result<Work<'b>> {
        self.check_rank(Op::Scatter, root)?;
        self.check_root_buffer(Op::Scatter, root, input.is_some())?;
        let output = output.into_bytes();
        let segment = output.len();
        let plan = self.whole::<T>(Op::Scatter, segment, Some(root));
        let input = input.map(B::into_bytes);
        if let Some(input) = &input {
            self.check_segments::<T>(Op::Scatter, "input", input.len(), segment)?;
        }
        let memory = self.device_memory(Op::Scatter, output, input)?;
        self.on_lane(&plan, memory)
    }

    /// Marks where the caller's stream is now, to measure the GPU's time; `None` without a GPU.
    ///
    /// # Errors
    ///
    /// The driver refuses.
    pub fn mark(&self) -> Result<Option<Mark>> {
        let rank = self.rank();
        let Some(gpu) = &self.gpu else { return Ok(None) };
        let event = Event::record_timed(&gpu.device, self.stream);
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
        let lane = self.lane.clone().filter(|_| self.has_nccl());
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

    /// As [`Group::send`], of GPU memory, which must stay as it is until the work was waited for.
    ///
    /// Over MPI it is as a message of the host's. NCCL's messages are in order with collectives on GPU memory, on
    /// both sides: sender and receiver must have started the same number of those before (or before the
    /// [`Group::coalesced`] that a message is part of). Errors show that number as the message's.
    ///
    /// # Errors
    ///
    /// As [`Group::send`]; the memory is not on the GPU.
    #[track_caller]
    pub fn send_from_device<'b, T: Element>(
        &mut self,
        message: impl Buffer<'b, T>,
        peer: usize,
    ) -> Result<Work<'b>> {
        let bytes = message.into_bytes();
        if !bytes.is_on_device() {
            return Err(self.host_only(Op::Send));
        }
        self.device_message::<T>(Op::Send, bytes, peer)
    }

    #[track_caller]
    pub(super) fn device_message<'b, T: Element>(
        &mut self,
        op: Op,
        bytes: Bytes<'_>,
        peer: usize,
    ) -> Result<Work<'b>> {
        let length = bytes.len();
        let memory = self.device_memory(op, bytes, None)?;
        let call = self.message::<T>(op, peer, length, memory)?;
        if let Some(lane) = &self.lane {
            let check = match self.has_nccl() {
                true => Check::Message(point::announce(&self.core.peers, peer, &call.record)?),
                false => Check::None,
            };
            lane.submit(Arc::clone(&call), check);
        }
        Ok(Work::new(self.core(), call, None).on(self.lane.as_ref()))
    }

    /// Starts a call on GPU memory.
    #[track_caller]
    pub(super) fn on_lane<'b>(&mut self, plan: &Plan, memory: Memory) -> Result<Work<'b>> {
        let call = self.begin(plan, memory, None)?;
        Ok(Work::new(self.core(), call, None).on(self.lane_for(plan, true).as_ref()))
    }

    /// GPU memory as a call has it; `input` where the operation has two buffers.
    pub(super) fn device_memory(
        &mut self,
        op: Op,
        output: Bytes<'_>,
        input: Option<Bytes<'_>>,
    ) -> Result<Memory> {
        if self.gpu.is_none() {
            let what =
                "the buffer is memory of a GPU, but the group has none: make the group with \
                 Backend::Nccl, or with Backend::Mpi and GroupOptions::with_gpu_memory";
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
        Ok(Memory::Device { at, from, keep })
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
