//! Memory of a GPU from NCCL's allocator, registered with the communicator where the version can.
#![expect(unsafe_code, reason = "gate: NCCL's memory")]

use std::ffi::c_void;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::communicator::Communicator;
use super::library::{Nccl, SUCCESS};
use crate::gpu::DeviceAllocator;

/// How long NCCL may be busy with a call before memory goes unregistered.
const REGISTER: Duration = Duration::from_secs(5);

/// A group's side of NCCL.
#[derive(Debug, Clone)]
pub(super) struct NcclSide {
    pub(super) library: &'static Nccl,
    pub(super) communicator: Arc<Communicator>,
}

fn pointer(at: u64) -> *mut c_void {
    std::ptr::without_provenance_mut(usize::try_from(at).unwrap_or(0))
}

impl DeviceAllocator for NcclSide {
    fn allocate(&self, bytes: usize) -> Option<u64> {
        let allocate = self.library.functions.mem_alloc?;
        let mut memory: *mut c_void = std::ptr::null_mut();
        // SAFETY: NCCL writes the address; freed with mem_free.
        let code = unsafe { allocate(&raw mut memory, bytes.max(1)) };
        if code != SUCCESS {
            let what = self.library.explain(code);
            tracing::debug!(what, "ncclMemAlloc: plain memory is used");
            return None;
        }
        Some(memory as u64)
    }

    fn register(&self, at: u64, bytes: usize) -> Option<usize> {
        let register = self.library.functions.register?;
        let mut handle: *mut c_void = std::ptr::null_mut();
        let deadline = Instant::now() + REGISTER;
        let registered = self.communicator.when_settled("ncclCommRegister", deadline, |comm| {
            // SAFETY: our own memory of so many bytes; the registration ends before it is freed.
            unsafe { register(comm, pointer(at), bytes, &raw mut handle) }
        });
        match registered {
            Ok(registered) => registered.map(|()| handle as usize),
            Err(error) => {
                tracing::debug!(what = error.what, "memory is not registered with NCCL");
                None
            }
        }
    }

    fn deregister(&self, handle: usize) -> bool {
        let Some(deregister) = self.library.functions.deregister else { return true };
        let deadline = Instant::now() + REGISTER;
        let ended = self.communicator.when_settled("ncclCommDeregister", deadline, |comm| {
            // SAFETY: the handle is from register, of the same communicator.
            unsafe { deregister(comm, std::ptr::without_provenance_mut(handle)) }
        });
        match ended {
            Ok(Some(())) => true,
            Ok(None) => {
                tracing::warn!("NCCL is busy: memory is not freed");
                false
            }
            // Fails where the communicator has ended, and the registration with it.
            Err(error) => {
                tracing::debug!(what = error.what, "ncclCommDeregister");
                true
            }
        }
    }

    fn free(&self, at: u64) {
        let Some(free) = self.library.functions.mem_free else { return };
        // SAFETY: from ncclMemAlloc, and nobody uses it any more.
        let code = unsafe { free(pointer(at)) };
        if code != SUCCESS {
            tracing::warn!(what = self.library.describe(code), "ncclMemFree");
        }
    }
}
