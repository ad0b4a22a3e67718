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
use super::host::core::Core;
use super::nccl::communicator::Communicator;
use super::nccl::library::Nccl;
use crate::error::{Error, Result};

/// This rank's GPU in a group.
#[derive(Debug)]
pub(crate) struct Gpu {
    pub(crate) device: Arc<Device>,
    /// Where NCCL moves its data.
    pub(crate) nccl: Option<NcclSide>,
}

/// A group's side of NCCL.
#[derive(Debug)]
pub(crate) struct NcclSide {
    pub(crate) library: &'static Nccl,
    pub(crate) communicator: Arc<Communicator>,
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

/// This rank's GPU. Ranks of one machine take its GPUs in turn; a launcher that shows each its own shows
/// one.
pub(crate) fn device_of(core: &Core, backend: &'static str) -> Result<Arc<Device>> {
    let available = device_count(backend)?;
    let rank = core.rank;
    let host_of = |of: usize| &core.peers.identities[of].host;
    let place = (0..rank).filter(|peer| host_of(*peer) == host_of(rank)).count();
    Device::open(place % available).map_err(|error| cuda_error(rank, error))
}
