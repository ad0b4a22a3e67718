//! Collectives on GPU memory that have no place among the others: two buffers, and messages.

use std::sync::Arc;

use super::collectives::plan;
use super::{Group, Plan};
use crate::backend::host::call::Memory;
use crate::backend::host::region::RegionMemory;
use crate::backend::nccl::memory::DeviceMemory;
use crate::dtype::Element;
use crate::error::{Error, Result};
use crate::fingerprint::Op;
use crate::region::{Buffer, Bytes};
use crate::work::Work;

impl Group {
    /// As [`Group::all_to_all`], between two buffers of the GPU.
    ///
    /// # Errors
    ///
    /// As [`Group::all_to_all`]; a buffer is not on the GPU.
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

    /// As [`Group::send`], of GPU memory, which must stay as it is until the work was waited for.
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
            lane.submit(Arc::clone(&call), None);
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
                        Backend::Nccl";
            return Err(self.argument(Error::DeviceMemory { op: op.name(), what }));
        }
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
