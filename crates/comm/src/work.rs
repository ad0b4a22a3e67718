//! A started collective.

use std::marker::PhantomData;
use std::sync::Arc;

use crate::call::{Call, CallMemory};
use crate::control::point;
use crate::error::{Error, Result};
use crate::fingerprint::Op;
use crate::gpu::Stream;
use crate::lane::Lane;
use crate::order::core::Core;
use crate::region::Bytes;

/// A started collective. It borrows its buffer until it is waited for:
///
/// ```compile_fail,E0499
/// # use phalanx_comm::{Group, GroupOptions, Sum};
/// let mut group = Group::single(GroupOptions::default()).unwrap();
/// let mut values = vec![1.0_f32; 4];
/// let work = group.all_reduce(&mut values[..], Sum).unwrap();
/// values[..].fill(2.0); // still borrowed
/// work.wait().unwrap();
/// ```
///
/// A slice is copied when the collective starts and written by [`Work::wait`] alone, on the caller's
/// thread: a forgotten work leaves it as it was. A work that is dropped is not cancelled.
#[derive(Debug)]
#[must_use = "a collective that is not waited for has no result, and its error is lost"]
pub struct Work<'b> {
    core: Arc<Core>,
    call: Arc<Call>,
    output: Option<WorkOutput<'b>>,
    /// The other side of a message.
    peer: Option<usize>,
    /// Who moves the data, where the host backend does not.
    lane: Option<Arc<Lane>>,
    borrow: PhantomData<&'b mut [u8]>,
}

/// Where the result goes that lies at `skip` in the in-place form.
#[derive(Debug)]
pub(crate) struct WorkOutput<'b> {
    pub(crate) bytes: Bytes<'b>,
    pub(crate) skip: usize,
}

/// A message on its way into memory of its own.
#[derive(Debug)]
#[must_use = "a message that is not waited for is lost"]
pub struct Arriving {
    pub(crate) work: Work<'static>,
}

impl Arriving {
    /// Waits until it is here.
    ///
    /// # Errors
    ///
    /// As [`Work::wait`].
    pub fn wait(self) -> Result<Vec<u8>> {
        let call = Arc::clone(&self.work.call);
        self.work.wait()?;
        let mut state = call.lock();
        Ok(match &mut state.memory {
            CallMemory::Private(bytes) => std::mem::take(bytes),
            _ => Vec::new(),
        })
    }

    /// Waits until it is here, in `into`: from a rank of this machine it is copied once. After an error part of it may be there.
    ///
    /// # Errors
    ///
    /// As [`Work::wait`]; [`Error::LengthMismatch`] where `into` has another length than was asked for. Then the message is lost.
    pub fn wait_into(self, into: &mut [u8]) -> Result<()> {
        let (expected, actual) = (self.work.call.segment, into.len());
        if expected != actual {
            return Err(Error::LengthMismatch {
                op: Op::Receive.name(),
                what: "memory for what was asked for",
                expected,
                actual,
            });
        }
        if let (Some(peer), None) = (self.work.peer, &self.work.lane) {
            return point::wait(&self.work.core.peers, peer, &self.work.call, Some(into));
        }
        into.copy_from_slice(&self.wait()?);
        Ok(())
    }

    /// Whether [`wait`](Self::wait) would return without waiting for another rank.
    #[must_use]
    pub fn is_done(&self) -> bool {
        self.work.is_done()
    }
}

impl<'b> Work<'b> {
    pub(crate) fn new(core: Arc<Core>, call: Arc<Call>, output: Option<WorkOutput<'b>>) -> Self {
        Self { core, call, output, peer: None, lane: None, borrow: PhantomData }
    }

    pub(crate) fn message(
        core: Arc<Core>,
        call: Arc<Call>,
        output: Option<WorkOutput<'b>>,
        peer: usize,
    ) -> Self {
        Self { core, call, output, peer: Some(peer), lane: None, borrow: PhantomData }
    }

    pub(crate) fn on(self, lane: Option<&Arc<Lane>>) -> Self {
        Self { lane: lane.map(Arc::clone), ..self }
    }

    /// Waits until the collective has ended and the buffer holds its result.
    ///
    /// The time limit (the group's, or that of [`Group::within`](crate::Group::within)) runs from
    /// when it is this collective's turn: at the earliest from its start.
    ///
    /// Of GPU memory it does not wait: it orders the stream on which the call was made
    /// ([`Group::set_stream`]) after the collective, so that what the caller asks of that stream afterwards sees the result. An error
    /// that NCCL reports later ends the group, and the next call returns it.
    ///
    /// [`Group::set_stream`]: crate::Group::set_stream
    ///
    /// # Errors
    ///
    /// What made it fail: a peer that is gone, late or out of step, or an abort. A borrowed slice is
    /// unchanged then; a region's content is unspecified, unless the ranks were out of step.
    pub fn wait(self) -> Result<()> {
        self.finish(None)
    }

    /// As [`Work::wait`], but of GPU memory another stream is ordered after the collective: the one on
    /// which its result is used, where that is not the one on which it was started.
    ///
    /// # Errors
    ///
    /// As [`Work::wait`].
    pub fn wait_on(self, stream: Stream) -> Result<()> {
        self.finish(Some(stream))
    }

    fn finish(self, stream: Option<Stream>) -> Result<()> {
        let Self { core, call, output, peer, lane, .. } = self;
        if let Some(lane) = lane {
            lane.flush();
            match &call.on_device {
                Some(on_device) => lane.order(&call, on_device, stream)?,
                None => lane.wait(&call)?,
            }
        } else if let Some(peer) = peer {
            point::wait(&core.peers, peer, &call, None)?;
        } else if core.finishes_in_place(&call) {
            if let Some(WorkOutput { bytes: Bytes::Slice(slice), skip: 0 }) = output {
                return wait_inline(&core, &call, slice);
            }
            core.finish_inline(&call, None)?;
        } else {
            core.drive(&call);
        }
        let state = call.lock();
        if let Some(Err(error)) = &state.result {
            return Err(error.clone());
        }
        if let (Some(mut output), CallMemory::Private(memory)) = (output, &state.memory) {
            let bytes = output.bytes.len();
            output.bytes.write(0, &memory[output.skip..output.skip + bytes]);
        }
        Ok(())
    }

    /// As [`Work::wait`], but of GPU memory too the host waits until the data is there.
    ///
    /// # Errors
    ///
    /// As [`Work::wait`].
    pub fn synchronize(self) -> Result<()> {
        if let Some(lane) = &self.lane {
            lane.flush();
            lane.wait(&self.call)?;
        }
        self.wait()
    }

    /// Whether [`Work::wait`] would return without waiting.
    #[must_use]
    pub fn is_done(&self) -> bool {
        self.call.is_done()
            || self.core.peers.failure().is_some()
            || self.peer.is_some_and(|peer| point::is_done(&self.core.peers, peer, &self.call))
            || (self.peer.is_none()
                && self.lane.is_none()
                && self.core.finishes_in_place(&self.call)
                && self.core.inline_is_ready(&self.call))
    }
}

/// Finishes straight into the caller's slice where it is the whole in-place form.
fn wait_inline(core: &Core, call: &Call, slice: &mut [u8]) -> Result<()> {
    if slice.len() == call.bytes_on(core.rank) {
        if core.finish_inline(call, Some(&mut *slice))? {
            return Ok(());
        }
    } else {
        core.finish_inline(call, None)?;
    }
    // Finished into its own memory: because its slot was needed, or because this is a part of it.
    if let CallMemory::Private(memory) = &call.lock().memory {
        let bytes = slice.len();
        slice.copy_from_slice(&memory[..bytes]);
    }
    Ok(())
}
