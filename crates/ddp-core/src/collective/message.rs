//! Tensors from one rank to another.
#![expect(unsafe_code, reason = "gate: gives a tensor's GPU memory to a message")]

use std::mem::ManuallyDrop;

use phalanx_comm::{Arriving, DeviceSlice, Group, Work};
use tch::{Device, Kind, Tensor};

use super::TensorGroup;
use crate::store::flat::{dense_bytes, dense_bytes_mut};
use crate::{shim, Result};

/// A message on its way to another rank.
#[derive(Debug)]
#[must_use = "a message that is not waited for has no end, and its error is lost"]
pub struct Sending {
    work: Work<'static>,
    held: Option<Held>,
}

/// GPU memory that a library uses until its message was waited for. If that fails, or nobody waits, it is never given back: the library
/// may still write there.
#[derive(Debug)]
struct Held(ManuallyDrop<Tensor>);

impl Held {
    fn of(tensor: &Tensor) -> Self {
        Self(ManuallyDrop::new(tensor.shallow_clone()))
    }

    fn release(self) {
        drop(ManuallyDrop::into_inner(self.0));
    }
}

impl Sending {
    /// Waits until the memory is read, and on the host until the other rank has the message.
    ///
    /// # Errors
    /// Those of the group.
    pub fn wait(self) -> Result<()> {
        self.work.wait()?;
        self.held.into_iter().for_each(Held::release);
        Ok(())
    }

    /// Whether [`wait`](Self::wait) would return at once.
    #[must_use]
    pub fn is_done(&self) -> bool {
        self.work.is_done()
    }
}

/// A message on its way from another rank.
#[derive(Debug)]
#[must_use = "a message that is not waited for is lost"]
pub struct Receiving {
    tensor: Tensor,
    message: Landing,
}

#[derive(Debug)]
enum Landing {
    OnHost(Arriving),
    OnDevice(Work<'static>, Held),
}

impl Receiving {
    /// Waits for the tensor. On a GPU it orders the caller's stream after it and returns at once.
    ///
    /// # Errors
    /// Those of the group; libtorch's own.
    pub fn wait(self) -> Result<Tensor> {
        let Self { mut tensor, message } = self;
        match message {
            Landing::OnHost(arriving) => {
                arriving.wait_into(dense_bytes_mut("a message", &mut tensor)?)?;
            }
            Landing::OnDevice(work, held) => {
                work.wait()?;
                held.release();
            }
        }
        Ok(tensor)
    }
}

/// A message to be started.
#[derive(Debug)]
pub enum MessageCall<'t> {
    /// As [`TensorGroup::start_send`].
    Send {
        /// What is sent.
        tensor: &'t Tensor,
        /// To whom.
        peer: usize,
        /// What it is.
        tag: &'t str,
    },
    /// As [`TensorGroup::start_receive`].
    Receive {
        /// Of the tensor.
        shape: &'t [i64],
        /// Of the tensor.
        kind: Kind,
        /// Where it is to be.
        device: Device,
        /// From whom.
        peer: usize,
        /// What it is.
        tag: &'t str,
    },
}

/// A message that was started.
#[derive(Debug)]
#[must_use = "a message that is not waited for is lost"]
pub enum StartedMessage {
    /// To another rank.
    Sending(Sending),
    /// From another rank.
    Receiving(Receiving),
}

impl TensorGroup {
    /// Sends a copy of `tensor` to `peer`, a rank of the group, which [receives](Self::start_receive) it. Messages of a pair are matched in the order of
    /// the calls. Returns at once; over NCCL messages are in one order with collectives.
    ///
    /// # Errors
    /// Those of the group; libtorch's own.
    pub fn start_send(&self, tensor: &Tensor, peer: usize, tag: &str) -> Result<Sending> {
        send(&mut self.lock().group, tensor, peer, tag)
    }

    /// Receives a tensor of this shape and kind from `peer`, while the caller computes.
    ///
    /// # Errors
    /// Those of the group; libtorch's own.
    pub fn start_receive(
        &self,
        shape: &[i64],
        of: (Kind, Device),
        peer: usize,
        tag: &str,
    ) -> Result<Receiving> {
        receive(&mut self.lock().group, shape, of, peer, tag)
    }

    /// Starts messages that are under way together: over NCCL, where a message waits for those before it, none of these waits for another one.
    /// On the host and over MPI it is as if each was started by itself.
    ///
    /// # Errors
    /// Those of the group; libtorch's own.
    pub fn start_together(&self, calls: &[MessageCall<'_>]) -> Result<Vec<StartedMessage>> {
        let group = &mut self.lock().group;
        group.coalesced(|group| {
            let started = calls.iter().map(|call| match *call {
                MessageCall::Send { tensor, peer, tag } => {
                    send(group, tensor, peer, tag).map(StartedMessage::Sending)
                }
                MessageCall::Receive { shape, kind, device, peer, tag } => {
                    receive(group, shape, (kind, device), peer, tag).map(StartedMessage::Receiving)
                }
            });
            Ok(started.collect::<Result<Vec<_>>>())
        })?
    }

    /// [`start_together`](Self::start_together) of tensors with the ranks that receive them, and of shapes, all of one kind on one device, with the ranks that
    /// send them. Results are in these orders.
    ///
    /// # Errors
    /// Those of the group; libtorch's own.
    pub fn start_messages(
        &self,
        sends: &[(&Tensor, usize)],
        receives: &[(&[i64], usize)],
        (kind, device): (Kind, Device),
        tag: &str,
    ) -> Result<(Vec<Sending>, Vec<Receiving>)> {
        let received = receives.iter();
        let received =
            received.map(|&(shape, peer)| MessageCall::Receive { shape, kind, device, peer, tag });
        let sent = sends.iter().map(|&(tensor, peer)| MessageCall::Send { tensor, peer, tag });
        let calls: Vec<MessageCall<'_>> = received.chain(sent).collect();
        let (mut sending, mut receiving) = (Vec::new(), Vec::new());
        for started in self.start_together(&calls)? {
            match started {
                StartedMessage::Sending(one) => sending.push(one),
                StartedMessage::Receiving(one) => receiving.push(one),
            }
        }
        Ok((sending, receiving))
    }
}

fn send(group: &mut Group, tensor: &Tensor, peer: usize, tag: &str) -> Result<Sending> {
    let tensor = tensor.f_detach()?.f_contiguous()?;
    group.set_stream(shim::current_stream(tensor.device())?);
    group.tagged(tag);
    if tensor.device() == Device::Cpu {
        let work = group.send(dense_bytes("a message", &tensor)?, peer)?;
        return Ok(Sending { work, held: None });
    }
    let held = Some(Held::of(&tensor));
    let work = group.send(memory_of(&tensor), peer)?;
    Ok(Sending { work, held })
}

fn receive(
    group: &mut Group,
    shape: &[i64],
    (kind, device): (Kind, Device),
    peer: usize,
    tag: &str,
) -> Result<Receiving> {
    let tensor = Tensor::f_empty(shape, (kind, device))?;
    group.set_stream(shim::current_stream(device)?);
    group.tagged(tag);
    let message = match device {
        Device::Cpu => {
            let bytes = tensor.numel() * kind.elt_size_in_bytes();
            Landing::OnHost(group.receive_bytes(bytes, peer)?)
        }
        _ => {
            let held = Held::of(&tensor);
            Landing::OnDevice(group.receive(memory_of(&tensor), peer)?, held)
        }
    };
    Ok(Receiving { tensor, message })
}

/// A dense tensor's memory on a GPU.
fn memory_of(tensor: &Tensor) -> DeviceSlice<'static, u8> {
    let bytes = tensor.numel() * tensor.kind().elt_size_in_bytes();
    // SAFETY: dense memory of the tensor, which its message keeps until it was waited for; libtorch reuses what is freed after
    // that in the order of the stream, which waits for the message.
    unsafe { DeviceSlice::from_raw(tensor.data_ptr() as usize as u64, bytes) }
}
