//! Collectives on GPU memory: each call is ordered after the caller's stream by one event, runs on the
//! group's own stream, and leaves another event that the caller's stream is ordered after.

use std::collections::VecDeque;
use std::ffi::{c_int, c_void};
use std::sync::Arc;
use std::time::Instant;

use smallvec::SmallVec;

use super::communicator::{abort_all, Communicator, NcclError};
use super::library::Nccl;
use crate::call::{Call, CallMemory};
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::fingerprint::Op;
use crate::gpu::cuda::{CudaError, Device, GpuEvent, OwnStream};
use crate::gpu::on_device::OnDevice;
use crate::lane::{Mover, Submitted};
use crate::order::core::Core;
use crate::reduce_op::{Finish, Fold, Reduction};

/// Moves a group's data with NCCL.
#[derive(Debug)]
pub(crate) struct NcclMover {
    pub(crate) core: Arc<Core>,
    pub(crate) rank: usize,
    pub(crate) world_size: usize,
    pub(crate) nccl: &'static Nccl,
    pub(crate) device: Arc<Device>,
    pub(crate) communicator: Arc<Communicator>,
    pub(crate) stream: OwnStream,
    pub(crate) moving: VecDeque<Arc<GpuEvent>>,
    /// The scaled sums of the calls made last: their factors' bits, types and operations.
    pub(crate) scaled: Vec<(u64, DType, c_int)>,
}

impl NcclMover {
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
            (Fold::Bf16Sum, _) => {
                Err(NcclError::new("ncclRedOpCreatePreMulSum", "NCCL has no Bf16Sum: reduce bf16"))
            }
            (Fold::Sum, Finish::Scale(factor)) => {
                let key = (factor.to_bits(), dtype);
                if let Some(known) = self.scaled.iter().find(|(bits, of, _)| (*bits, *of) == key) {
                    return Ok(known.2);
                }
                let op = self.communicator.scaled_sum(&factor_bytes(factor, dtype), dtype)?;
                self.scaled.push((key.0, key.1, op));
                Ok(op)
            }
        }
    }

    /// Lets go of the scaled sums that none of `calls` uses: a step may have a factor of its own. NCCL has
    /// taken the calls before, and a call keeps what it needs of its operation.
    fn forget_scaled(&mut self, calls: &[(&Call, &OnDevice, u64, Option<u64>)]) {
        let factor = |call: &Call| match call.reduction?.finish {
            Finish::Scale(factor) => Some((factor.to_bits(), call.dtype)),
            _ => None,
        };
        let used: SmallVec<[_; 1]> = calls.iter().filter_map(|(call, ..)| factor(call)).collect();
        if used.is_empty() {
            return; // the factor of the step may return with the next call
        }
        let communicator = &self.communicator;
        self.scaled.retain(|(bits, dtype, op)| {
            let kept = used.contains(&(*bits, *dtype));
            if !kept {
                if let Err(error) = communicator.forget_sum(*op) {
                    tracing::debug!(what = error.what, "ncclRedOpDestroy");
                }
            }
            kept
        });
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

    /// Waits until NCCL has taken the call: no longer than the call may last, nor than the group lives.
    fn settle(&self, call: &Call) -> Result<(), NcclError> {
        let deadline = Instant::now() + call.timeout;
        let gives_up = || self.core.peers.failure().is_some();
        self.communicator.settle_until(call.op().name(), deadline, &gives_up)
    }

    /// Starts calls, of which NCCL is to make one.
    fn start_all(&mut self, calls: &[(&Call, &OnDevice, u64, Option<u64>)]) -> Result<()> {
        let device = Arc::clone(&self.device);
        let _current = device.current().map_err(|error| self.cuda_error(error))?;
        let stream = self.stream.as_stream();
        self.forget_scaled(calls);
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
        launched.map_err(|error| self.nccl_error(error))?;
        self.settle(calls[0].0).map_err(|error| match error.late {
            true => Error::Stalled {
                rank: self.rank,
                backend: "nccl",
                call: Box::new(calls[0].0.record.clone()),
                timeout: calls[0].0.timeout,
                said: self.last_words(),
            },
            false => self.nccl_error(error),
        })?;
        let done = GpuEvent::record(&device, stream).map_err(|error| self.cuda_error(error))?;
        let done = Arc::new(done);
        for (_, on_device, ..) in calls {
            self.moving.push_back(Arc::clone(&done));
            on_device.launch(Arc::clone(&done));
        }
        Ok(())
    }
}

impl Mover for NcclMover {
    fn start(&mut self, call: &Arc<Call>, memory: &mut CallMemory) -> Result<()> {
        let (CallMemory::Device { at, from, .. }, Some(on_device)) = (memory, &call.on_device)
        else {
            return Err(self.error(call.op().name(), "memory of the host".to_owned()));
        };
        self.start_all(&[(call, on_device, *at, *from)])
    }

    fn start_together(&mut self, calls: &[Submitted]) -> Result<()> {
        let mut all = Vec::new();
        for Submitted { call, .. } in calls {
            let (CallMemory::Device { at, from, .. }, Some(on_device)) =
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
        // NCCL frees memory of the device when it aborts.
        let current = self.device.current();
        if let Err(error) = &current {
            tracing::warn!(what = error.what, "the device of an abort");
        }
        abort_all(self.nccl, &cause.to_string());
        self.moving.clear();
    }

    fn last_words(&self) -> Option<String> {
        self.nccl.last_error()
    }

    fn close(&mut self) {
        if let Ok(_current) = self.device.current() {
            self.communicator.end();
        }
    }
}

impl Drop for NcclMover {
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
