//! Collectives on GPU memory: each call is ordered after the caller's stream by one event, runs on the
//! group's own stream, and leaves another event that the caller's stream is ordered after.

use std::collections::VecDeque;
use std::ffi::{c_int, c_void};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::Duration;

use smallvec::SmallVec;

use super::communicator::{abort_all, Communicator, NcclError};
use super::cuda::{CudaError, Device, Event, OwnStream};
use super::library::Nccl;
use crate::backend::host::call::{Call, Memory};
use crate::backend::lane::{Submitted, Transport};
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::fingerprint::Op;
use crate::reduce_op::{Finish, Fold, Reduction};
use crate::region::Stream;

/// How long a caller sleeps between two looks whether its call has been launched.
const LOOK: Duration = Duration::from_millis(1);

/// Where a call stands between streams.
#[derive(Debug)]
pub(crate) struct OnDevice {
    /// The caller's stream.
    stream: Stream,
    /// The point of that stream at which the call was made.
    ready: Event,
    /// The end of the call on the group's stream, once it is launched.
    done: Mutex<Option<Arc<Event>>>,
    launched: Condvar,
}

impl OnDevice {
    pub(crate) fn after(device: &Arc<Device>, stream: Stream) -> Result<Self, CudaError> {
        let ready = Event::record(device, stream)?;
        Ok(Self { stream, ready, done: Mutex::new(None), launched: Condvar::new() })
    }

    fn launch(&self, done: Arc<Event>) {
        *self.done.lock().unwrap_or_else(PoisonError::into_inner) = Some(done);
        self.launched.notify_all();
    }

    /// Orders `stream`, or the one that the call was made on, after the call. Waits on the host only until it is launched, or has
    /// failed.
    pub(crate) fn order(&self, call: &Call, stream: Option<Stream>) -> Result<(), CudaError> {
        let mut done = self.done.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            if let Some(done) = &*done {
                return done.order(stream.unwrap_or(self.stream));
            }
            if call.is_done() {
                return Ok(()); // failed before it was launched
            }
            let waited = self.launched.wait_timeout(done, LOOK);
            done = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

/// Moves a group's data with NCCL.
#[derive(Debug)]
pub(crate) struct NcclTransport {
    pub(crate) rank: usize,
    pub(crate) world_size: usize,
    pub(crate) nccl: &'static Nccl,
    pub(crate) device: Arc<Device>,
    pub(crate) communicator: Arc<Communicator>,
    pub(crate) stream: OwnStream,
    pub(crate) moving: VecDeque<Arc<Event>>,
    /// The scaled sum made last: steps use one factor over and over.
    pub(crate) scaled: Option<(u64, DType, c_int)>,
}

impl NcclTransport {
    fn nccl_error(&self, error: NcclError) -> Error {
        self.error(error.call, error.what)
    }

    fn cuda_error(&self, error: CudaError) -> Error {
        self.error(error.call, error.what)
    }

    fn error(&self, call: &str, what: String) -> Error {
        Error::Backend { rank: self.rank, backend: "nccl", call: call.to_owned(), what }
    }

    /// NCCL's operation for a reduction.
    fn operation(&mut self, reduction: Reduction, dtype: DType) -> Result<c_int, NcclError> {
        const SUM: c_int = 0;
        const PRODUCT: c_int = 1;
        const MAX: c_int = 2;
        const MIN: c_int = 3;
        const AVG: c_int = 4;
        match (reduction.fold, reduction.finish) {
            (Fold::Sum, Finish::Keep) => Ok(SUM),
            (Fold::Sum, Finish::Divide) => Ok(AVG),
            (Fold::Product, _) => Ok(PRODUCT),
            (Fold::Max, _) => Ok(MAX),
            (Fold::Min, _) => Ok(MIN),
            (Fold::Sum, Finish::Scale(factor)) => {
                let key = (factor.to_bits(), dtype);
                if let Some((bits, of, op)) = self.scaled {
                    if (bits, of) == key {
                        return Ok(op);
                    }
                }
                // The one before stays: calls that use it may be under way. NCCL frees all with the
                // communicator.
                let op = self.communicator.scaled_sum(&factor_bytes(factor, dtype), dtype)?;
                self.scaled = Some((key.0, key.1, op));
                Ok(op)
            }
        }
    }

    /// Asks NCCL for one call on memory `at`, or from `from` to `at`; `op` is its reduction.
    fn launch(&self, call: &Call, at: u64, from: Option<u64>, op: c_int) -> Result<(), NcclError> {
        let (dtype, stream) = (call.dtype, self.stream.raw().cast());
        let count = call.segment / dtype.size_bytes();
        let to = |index: usize| pointer(at, index * call.segment);
        let input = |index: usize| pointer(from.unwrap_or(at), index * call.segment);
        let (communicator, rank) = (&self.communicator, self.rank);
        // What is already where it belongs does not travel.
        let peers = || (0..self.world_size).filter(|peer| *peer != rank || from.is_some());
        match call.op() {
            Op::AllReduce => communicator.all_reduce(to(0), count, dtype, op, stream),
            Op::Reduce => communicator.reduce(to(0), count, dtype, (op, call.root), stream),
            Op::ReduceScatter => {
                let output = if from.is_some() { to(0) } else { to(rank) };
                communicator.reduce_scatter((input(0), output), count, dtype, op, stream)
            }
            Op::AllGather => {
                let input = if from.is_some() { input(0) } else { to(rank) };
                communicator.all_gather((input, to(0)), count, dtype, stream)
            }
            Op::Broadcast => communicator.broadcast(to(0), count, dtype, call.root, stream),
            Op::Send => communicator.send(to(0), count, dtype, call.root, stream),
            Op::Receive => communicator.receive(to(0), count, dtype, call.root, stream),
            Op::Gather => communicator.grouped(|| {
                if rank != call.root || from.is_some() {
                    communicator.send(input(0), count, dtype, call.root, stream)?;
                }
                let mut senders = peers().filter(|_| rank == call.root);
                senders
                    .try_for_each(|peer| communicator.receive(to(peer), count, dtype, peer, stream))
            }),
            Op::Scatter => communicator.grouped(|| {
                if rank != call.root || from.is_some() {
                    communicator.receive(to(0), count, dtype, call.root, stream)?;
                }
                let mut receivers = peers().filter(|_| rank == call.root);
                receivers
                    .try_for_each(|peer| communicator.send(input(peer), count, dtype, peer, stream))
            }),
            Op::AllToAll => communicator.grouped(|| {
                peers().try_for_each(|peer| {
                    communicator.send(input(peer), count, dtype, peer, stream)?;
                    communicator.receive(to(peer), count, dtype, peer, stream)
                })
            }),
            Op::Barrier | Op::Allocate | Op::Split => Ok(()),
        }
    }

    /// Starts calls, of which NCCL is to make one.
    fn start_all(&mut self, calls: &[(&Call, &OnDevice, u64, Option<u64>)]) -> Result<()> {
        let device = Arc::clone(&self.device);
        let _current = device.current().map_err(|error| self.cuda_error(error))?;
        let stream = self.stream.as_stream();
        let mut ops = SmallVec::<[c_int; 1]>::new();
        for (call, on_device, ..) in calls {
            on_device.ready.order(stream).map_err(|error| self.cuda_error(error))?;
            let op =
                call.reduction.map_or(Ok(0), |reduction| self.operation(reduction, call.dtype));
            ops.push(op.map_err(|error| self.nccl_error(error))?);
        }
        let launch_each = || {
            let mut all = calls.iter().zip(&ops);
            all.try_for_each(|((call, _, at, from), op)| self.launch(call, *at, *from, *op))
        };
        let launched = match calls {
            [_] => launch_each(),
            _ => self.communicator.grouped(launch_each),
        };
        launched
            .and_then(|()| self.communicator.settle(calls[0].0.op().name()))
            .map_err(|error| self.nccl_error(error))?;
        let done = Event::record(&device, stream).map_err(|error| self.cuda_error(error))?;
        let done = Arc::new(done);
        for (_, on_device, ..) in calls {
            self.moving.push_back(Arc::clone(&done));
            on_device.launch(Arc::clone(&done));
        }
        Ok(())
    }
}

impl Transport for NcclTransport {
    fn start(&mut self, call: &Call, memory: &mut Memory) -> Result<()> {
        let (Memory::Device { at, from, .. }, Some(on_device)) = (memory, &call.on_device) else {
            return Err(self.error(call.op().name(), "memory of the host".to_owned()));
        };
        self.start_all(&[(call, on_device, *at, *from)])
    }

    fn start_together(&mut self, calls: &[Submitted]) -> Result<()> {
        let mut all = Vec::new();
        for Submitted { call, .. } in calls {
            let (Memory::Device { at, from, .. }, Some(on_device)) =
                (&call.lock().memory, &call.on_device)
            else {
                return Err(self.error(call.op().name(), "memory of the host".to_owned()));
            };
            all.push((&**call, on_device, *at, *from));
        }
        self.start_all(&all)
    }

    fn poll(&mut self, ended: &mut Vec<usize>) -> Result<bool> {
        self.communicator.state("ncclCommGetAsyncError").map_err(|error| self.nccl_error(error))?;
        while let Some(front) = self.moving.front() {
            if !front.is_passed().map_err(|error| self.cuda_error(error))? {
                break;
            }
            self.moving.pop_front();
            ended.push(ended.len());
        }
        Ok(!ended.is_empty())
    }

    fn abandon(&mut self, cause: &Error) {
        abort_all(self.nccl, &cause.to_string());
        self.moving.clear();
    }

    fn close(&mut self) {
        if let Ok(_current) = self.device.current() {
            self.communicator.end();
        }
    }
}

impl Drop for NcclTransport {
    fn drop(&mut self) {
        // Nothing is left to end after an orderly close or an abort.
        self.close();
    }
}

fn pointer(base: u64, offset: usize) -> *mut c_void {
    // A number for the device: nothing on the host reads through it.
    std::ptr::without_provenance_mut(usize::try_from(base).unwrap_or(0) + offset)
}

/// A factor as one element of `dtype`, as GPUs have it: little-endian.
fn factor_bytes(factor: f64, dtype: DType) -> Vec<u8> {
    #[expect(clippy::cast_possible_truncation, reason = "the factor in the element's own type")]
    match dtype {
        DType::F64 => factor.to_le_bytes().to_vec(),
        DType::F16 => half::f16::from_f64(factor).to_le_bytes().to_vec(),
        DType::BF16 => half::bf16::from_f64(factor).to_le_bytes().to_vec(),
        _ => (factor as f32).to_le_bytes().to_vec(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_factor_has_the_size_of_an_element() {
        for dtype in [DType::F64, DType::F32, DType::F16, DType::BF16] {
            assert_eq!(factor_bytes(0.25, dtype).len(), dtype.size_bytes(), "{dtype}");
        }
        assert_eq!(factor_bytes(0.25, DType::F32), 0.25_f32.to_le_bytes());
    }
}
