//! Tensors from one rank to another.
#![expect(unsafe_code, reason = "gate: gives a tensor's GPU memory to a message")]

use phalanx_comm::{Arriving, DeviceSlice, Group, Work};
use tch::{Device, Kind, Tensor};

use super::TensorGroup;
use crate::store::flat::{dense_bytes, dense_bytes_mut};
use crate::{shim, Error, Result};

/// A message on its way to another rank.
#[derive(Debug)]
#[must_use = "a message that is not waited for has no end, and its error is lost"]
pub struct Sending {
    work: Work<'static>,
    /// GPU memory that is read until then.
    _held: Option<Tensor>,
}

impl Sending {
    /// Waits until the memory is read, and on the host until the other rank has the message.
    ///
    /// # Errors
    /// Those of the group.
    pub fn wait(self) -> Result<()> {
        Ok(self.work.wait()?)
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
    message: Message,
}

#[derive(Debug)]
enum Message {
    OnHost(Arriving),
    OnDevice(Work<'static>),
}

impl Receiving {
    /// Waits for the tensor. On a GPU it orders the caller's stream after it and returns at once.
    ///
    /// # Errors
    /// Those of the group; libtorch's own.
    pub fn wait(self) -> Result<Tensor> {
        let Self { mut tensor, message } = self;
        match message {
            Message::OnHost(arriving) => {
                let bytes = arriving.wait()?;
                dense_bytes_mut("a message", &mut tensor)?.copy_from_slice(&bytes);
            }
            Message::OnDevice(work) => work.wait()?,
        }
        Ok(tensor)
    }
}

impl TensorGroup {
    /// Sends a copy of `tensor` to `peer`, a rank of the group, which [receives](Self::start_receive) it. Messages of a pair are matched in the order of
    /// the calls. Returns at once; over NCCL messages are in one order with collectives.
    ///
    /// # Errors
    /// Those of the group; libtorch's own.
    pub fn start_send(&self, tensor: &Tensor, peer: usize, tag: &str) -> Result<Sending> {
        let tensor = tensor.f_detach()?.f_contiguous()?;
        let stream = shim::current_stream(tensor.device())?;
        let group = &mut self.lock().group;
        group.set_stream(stream);
        send(group, &tensor, peer, tag)
    }

    /// Receives a tensor of this shape and kind from `peer`, while the caller computes.
    ///
    /// # Errors
    /// Those of the group; libtorch's own.
    pub fn start_receive(
        &self,
        shape: &[i64],
        (kind, device): (Kind, Device),
        peer: usize,
        tag: &str,
    ) -> Result<Receiving> {
        let tensor = Tensor::f_empty(shape, (kind, device))?;
        let stream = shim::current_stream(device)?;
        let group = &mut self.lock().group;
        group.set_stream(stream);
        receive(group, tensor, peer, tag)
    }

    /// Starts sends and receives that belong together: ranks that exchange messages need no order among them, over NCCL either.
    ///
    /// `sends` are tensors with the ranks that [receive](Self::start_receive) them, `receives` shapes with the ranks that send them, all of one kind on one device.
    /// No rank may be this one. Results are in these orders.
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
        let dense = |(tensor, peer): &(&Tensor, usize)| {
            Ok::<_, Error>((tensor.f_detach()?.f_contiguous()?, *peer))
        };
        let empty = |(shape, peer): &(&[i64], usize)| {
            Ok::<_, Error>((Tensor::f_empty(*shape, (kind, device))?, *peer))
        };
        let sends: Vec<_> = sends.iter().map(dense).collect::<Result<_>>()?;
        let receives: Vec<_> = receives.iter().map(empty).collect::<Result<_>>()?;
        let stream = shim::current_stream(device)?;
        let group = &mut self.lock().group;
        group.set_stream(stream);
        let start = |group: &mut Group| {
            let receives = receives.into_iter().map(|(into, peer)| receive(group, into, peer, tag));
            let receives: Vec<Receiving> = receives.collect::<Result<_>>()?;
            let sends = sends.iter().map(|(tensor, peer)| send(group, tensor, *peer, tag));
            Ok((sends.collect::<Result<_>>()?, receives))
        };
        // The closure's errors are the group's own.
        let mut outcome = None;
        group.coalesced(|group| {
            outcome = Some(start(group));
            Ok(())
        })?;
        outcome.unwrap_or(Err(Error::BackwardAbandoned))
    }
}

/// Sends a dense tensor.
fn send(group: &mut Group, tensor: &Tensor, peer: usize, tag: &str) -> Result<Sending> {
    group.tagged(tag);
    if tensor.device() == Device::Cpu {
        let work = group.send(dense_bytes("a message", tensor)?, peer)?;
        return Ok(Sending { work, _held: None });
    }
    let work = group.send_from_device(memory_of(tensor), peer)?;
    Ok(Sending { work, _held: Some(tensor.shallow_clone()) })
}

/// Receives into a dense tensor.
fn receive(group: &mut Group, tensor: Tensor, peer: usize, tag: &str) -> Result<Receiving> {
    group.tagged(tag);
    let message = match tensor.device() {
        Device::Cpu => {
            let bytes = tensor.numel() * tensor.kind().elt_size_in_bytes();
            Message::OnHost(group.receive_bytes(bytes, peer)?)
        }
        _ => Message::OnDevice(group.receive(memory_of(&tensor), peer)?),
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
