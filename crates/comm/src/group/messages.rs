//! Messages between two ranks.
#![expect(single_use_lifetimes, reason = "an anonymous lifetime in `impl Trait` is unstable")]

use std::sync::Arc;

use super::Group;
use crate::call::{Call, CallMemory};
use crate::control::point;
use crate::dtype::Element;
use crate::error::{Error, Result};
use crate::fingerprint::{CallRecord, Op};
use crate::lane::Check;
use crate::region::{Buffer, Bytes, Input, InputBytes};
use crate::work::{Arriving, Work, WorkOutput};

impl Group {
    /// Sends `message` to `peer`, which receives it. Messages of a pair are matched in the order of the calls,
    /// independently of collectives. Of a slice a copy is sent; GPU memory must stay as it is until the work was waited for.
    ///
    /// NCCL's messages are in order with collectives on GPU memory, on both sides: sender and receiver must have started
    /// the same number of those before (or before the [`Group::coalesced`] that a message is part of). Errors show that number
    /// as the message's.
    ///
    /// # Errors
    ///
    /// The group is dead, or `peer` is this rank or no rank.
    #[track_caller]
    pub fn send<'a, 'b, T: Element>(
        &mut self,
        message: impl Input<'a, 'b, T>,
        peer: usize,
    ) -> Result<Work<'b>> {
        let bytes = match message.source() {
            InputBytes::CallMemory(memory) if memory.is_on_device() => {
                return self.device_message::<T>(Op::Send, memory, peer);
            }
            InputBytes::CallMemory(_) => return Err(self.host_only(Op::Send)),
            InputBytes::Slice(bytes) => bytes,
        };
        let call = self.message::<T>(Op::Send, peer, bytes.len(), CallMemory::Nothing)?;
        if let Some(lane) = self.transport.lane(false) {
            call.lock().memory = CallMemory::Private(bytes.to_vec());
            lane.submit(Arc::clone(&call), Check::None);
            return Ok(Work::new(self.core(), call, None).on(Some(lane)));
        }
        point::start_send(&self.core.peers, peer, Arc::clone(&call), bytes)?;
        Ok(Work::message(self.core(), call, None, peer))
    }

    /// Receives a message of exactly this length from `peer`.
    ///
    /// # Errors
    ///
    /// As [`Group::send`].
    #[track_caller]
    pub fn receive<'b, T: Element>(
        &mut self,
        message: impl Buffer<'b, T>,
        peer: usize,
    ) -> Result<Work<'b>> {
        let bytes = message.into_bytes();
        if bytes.is_on_device() {
            return self.device_message::<T>(Op::Receive, bytes, peer);
        }
        self.receive_into::<T>(bytes.len(), Some(WorkOutput { bytes, skip: 0 }), peer)
    }

    /// Receives a message of exactly so many bytes from `peer` into memory of its own, which nothing needs to be kept borrowed for:
    /// the counterpart of a [`send`](Group::send) of bytes.
    ///
    /// # Errors
    ///
    /// As [`Group::send`].
    #[track_caller]
    pub fn receive_bytes(&mut self, len: usize, peer: usize) -> Result<Arriving> {
        Ok(Arriving { work: self.receive_into::<u8>(len, None, peer)? })
    }

    #[track_caller]
    fn receive_into<'b, T: Element>(
        &mut self,
        byte_len: usize,
        output: Option<WorkOutput<'b>>,
        peer: usize,
    ) -> Result<Work<'b>> {
        let call = self.message::<T>(Op::Receive, peer, byte_len, CallMemory::Nothing)?;
        if let Some(lane) = self.transport.lane(false) {
            call.lock().memory = CallMemory::Private(vec![0; byte_len]);
            lane.submit(Arc::clone(&call), Check::None);
            return Ok(Work::new(self.core(), call, output).on(Some(lane)));
        }
        point::start_receive(&self.core.peers, peer, Arc::clone(&call))?;
        Ok(Work::message(self.core(), call, output, peer))
    }

    #[track_caller]
    fn device_message<'b, T: Element>(
        &mut self,
        op: Op,
        bytes: Bytes<'_>,
        peer: usize,
    ) -> Result<Work<'b>> {
        let length = bytes.len();
        let memory = self.device_memory(op, bytes, None)?;
        let call = self.message::<T>(op, peer, length, memory)?;
        let lane = self.transport.lane(true).cloned();
        if let Some(lane) = &lane {
            let check = match self.transport.is_in_stream_order() {
                true => Check::Message(point::announce(&self.core.peers, peer, &call.record)?),
                false => Check::None,
            };
            lane.submit(Arc::clone(&call), check);
        }
        Ok(Work::new(self.core(), call, None).on(lane.as_ref()))
    }

    #[track_caller]
    fn message<T: Element>(
        &mut self,
        op: Op,
        peer: usize,
        bytes: usize,
        memory: CallMemory,
    ) -> Result<Arc<Call>> {
        self.check_rank(op, peer)?;
        let rank = self.rank();
        if peer == rank {
            return Err(self.argument(Error::SelfMessage { op: op.name(), rank }));
        }
        let next = std::mem::take(&mut self.next);
        if let Some(error) = self.core.peers.failure() {
            return Err(error);
        }
        let is_on_device = matches!(memory, CallMemory::Device { .. });
        let record = CallRecord {
            op,
            // Messages that are in order with collectives: their place among them is compared.
            seq: if is_on_device && self.transport.is_in_stream_order() {
                self.together.unwrap_or(self.on_gpu)
            } else {
                self.core.peers.points.next_index(peer, op == Op::Send)
            },
            dtype: Some(T::DTYPE),
            len: (bytes / T::DTYPE.size_bytes()) as u64,
            reduction: "",
            root: Some(peer),
            tag: next.tag,
        };
        let timeout = next.timeout.unwrap_or(self.options.timeout);
        let mut call = Call::new(record, T::DTYPE, None, bytes, 1, false, timeout, memory);
        call.entry = self.recorded(&call);
        let on_device = self.on_device(&call)?;
        Ok(Arc::new(call.on_device(on_device)))
    }
}
