//! GPUs, whatever moves their data.
//!
//! | file | what |
//! |---|---|
//! | `cuda` | contexts, streams, events, memory: the driver's calls |
//! | `memory` | memory of a GPU that a group has allocated |
//! | `on_device` | a call's order with the caller's stream |

pub(crate) mod cuda;
pub(crate) mod memory;
pub(crate) mod on_device;

use std::sync::Arc;

use self::cuda::{CudaError, Device};
use crate::error::{Error, Result};

/// A stream of the CUDA device, by its handle (`cudaStream_t` as a number); 0 is the default stream.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Stream(pub usize);

/// This rank's GPU in a group.
#[derive(Debug)]
pub(crate) struct Gpu {
    pub(crate) device: Arc<Device>,
    /// Who makes memory that is better than the driver's.
    pub(crate) allocator: Option<Arc<dyn DeviceAllocator>>,
}

/// Memory of a GPU that a library makes or registers. The device is the thread's current one.
pub(crate) trait DeviceAllocator: Send + Sync + std::fmt::Debug {
    /// Memory of the library's own; `None`: the driver's is used.
    fn allocate(&self, bytes: usize) -> Option<u64>;
    /// Registers memory, which gives a handle; what cannot be registered works as well, only slower.
    fn register(&self, at: u64, bytes: usize) -> Option<usize>;
    /// Ends a registration; whether the memory may be freed.
    fn deregister(&self, handle: usize) -> bool;
    /// Frees what `allocate` gave.
    fn free(&self, at: u64);
}

pub(crate) fn cuda_error(rank: usize, error: CudaError) -> Error {
    Error::Backend { rank, backend: "cuda", call: error.call.to_owned(), what: error.what }
}

/// GPUs that this process sees; an error says what is missing for `backend`.
pub(crate) fn device_count(backend: &'static str) -> Result<usize> {
    let unavailable = |what: String| Error::NoBackend { backend, what };
    if !cuda::has_driver() {
        return Err(unavailable(
            "there is no NVIDIA driver on this machine (libcuda.so.1): install it, or use memory of the \
             host"
                .to_owned(),
        ));
    }
    match cuda::device_count() {
        Ok(0) => Err(unavailable(
            "the NVIDIA driver shows this process no GPU: see nvidia-smi and CUDA_VISIBLE_DEVICES"
                .to_owned(),
        )),
        Ok(count) => Ok(count),
        Err(error) => Err(unavailable(format!("{}: {}", error.call, error.what))),
    }
}

/// The GPU of a rank that is the `place`th of its machine. Ranks take its GPUs in turn; a launcher that shows each its own
/// shows one.
pub(crate) fn device_at(rank: usize, place: usize, backend: &'static str) -> Result<Arc<Device>> {
    let available = device_count(backend)?;
    Device::open(place % available).map_err(|error| cuda_error(rank, error))
}
