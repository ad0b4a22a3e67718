//! GPU memory that collectives work on: with NCCL from its allocator and registered with the communicator
//! where the version can, so that `NVLink` SHARP and network cards use it without a copy; else the
//! driver's.
#![expect(unsafe_code, reason = "gate: memory of a device")]

use std::ffi::c_void;
use std::sync::mpsc::{channel, Sender};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use super::cuda;
use super::{cuda_error, Gpu, NcclSide};
use crate::backend::nccl::library::SUCCESS;
use crate::error::Result;

/// How long NCCL may be busy with a call before memory goes unregistered.
const REGISTER: Duration = Duration::from_secs(5);

/// Memory of one GPU, freed when dropped.
#[derive(Debug)]
pub(crate) struct DeviceMemory {
    pointer: u64,
    bytes: usize,
    gpu: Arc<Gpu>,
    from_nccl: bool,
    /// NCCL's handle of the registration.
    registration: Option<usize>,
}

impl DeviceMemory {
    /// `bytes` zeroed bytes.
    pub(crate) fn new(gpu: &Arc<Gpu>, rank: usize, bytes: usize) -> Result<Self> {
        let error = |error| cuda_error(rank, error);
        let with_nccl = gpu.nccl.as_ref().and_then(|nccl| from_nccl(gpu, nccl, bytes));
        let (pointer, from_nccl) = match with_nccl {
            Some(pointer) => (pointer, true),
            None => (cuda::allocate(&gpu.device, bytes).map_err(error)?, false),
        };
        let mut memory =
            Self { pointer, bytes, gpu: Arc::clone(gpu), from_nccl, registration: None };
        if bytes > 0 {
            cuda::zero(&gpu.device, pointer, bytes).map_err(error)?;
            memory.registration = memory.register();
        }
        Ok(memory)
    }

    pub(crate) fn pointer(&self) -> u64 {
        self.pointer
    }

    fn at(&self) -> *mut c_void {
        std::ptr::without_provenance_mut(usize::try_from(self.pointer).unwrap_or(0))
    }

    /// Registers with the communicator; memory that cannot be works as well, only slower.
    fn register(&self) -> Option<usize> {
        let NcclSide { library, communicator } = self.gpu.nccl.as_ref()?;
        let register = library.functions.register?;
        let _current = self.gpu.device.current().ok()?;
        let mut handle: *mut c_void = std::ptr::null_mut();
        let deadline = Instant::now() + REGISTER;
        let registered = communicator.when_settled("ncclCommRegister", deadline, |comm| {
            // SAFETY: our own memory of so many bytes; the registration ends before it is freed.
            unsafe { register(comm, self.at(), self.bytes, &raw mut handle) }
        });
        match registered {
            Ok(registered) => registered.map(|()| handle as usize),
            Err(error) => {
                tracing::debug!(what = error.what, "memory is not registered with NCCL");
                None
            }
        }
    }

    pub(crate) fn read(&self, rank: usize, at: usize, to: &mut [u8]) -> Result<()> {
        cuda::read(&self.gpu.device, self.pointer + at as u64, to)
            .map_err(|error| cuda_error(rank, error))
    }

    pub(crate) fn write(&self, rank: usize, at: usize, from: &[u8]) -> Result<()> {
        cuda::write(&self.gpu.device, self.pointer + at as u64, from)
            .map_err(|error| cuda_error(rank, error))
    }
}

fn from_nccl(gpu: &Gpu, nccl: &NcclSide, bytes: usize) -> Option<u64> {
    let allocate = nccl.library.functions.mem_alloc?;
    let _current = gpu.device.current().ok()?;
    let mut pointer: *mut c_void = std::ptr::null_mut();
    // SAFETY: NCCL writes the address; freed with mem_free.
    let code = unsafe { allocate(&raw mut pointer, bytes.max(1)) };
    if code != SUCCESS {
        tracing::debug!(what = nccl.library.explain(code), "ncclMemAlloc: plain memory is used");
        return None;
    }
    Some(pointer as u64)
}

impl Drop for DeviceMemory {
    fn drop(&mut self) {
        let freed = Freed {
            pointer: self.pointer,
            from_nccl: self.from_nccl,
            registration: self.registration,
            gpu: Arc::clone(&self.gpu),
        };
        later(move || freed.free());
    }
}

/// Memory whose owner has let it go; the device may still work on it.
#[derive(Debug)]
struct Freed {
    pointer: u64,
    from_nccl: bool,
    registration: Option<usize>,
    gpu: Arc<Gpu>,
}

impl Freed {
    /// Frees it when the device is done with what it was asked for; waits for that.
    fn free(self) {
        let Ok(_current) = self.gpu.device.current() else { return };
        // NCCL unmaps memory without a look at what still works on it.
        if let Err(error) = cuda::synchronize() {
            return tracing::warn!(what = error.what, "memory of the device is not freed");
        }
        match &self.gpu.nccl {
            Some(nccl) => self.give_back(nccl),
            None => cuda::free(&self.gpu.device, self.pointer),
        }
    }

    fn give_back(&self, nccl: &NcclSide) {
        let functions = &nccl.library.functions;
        if let (Some(handle), Some(deregister)) = (self.registration, functions.deregister) {
            let deadline = Instant::now() + REGISTER;
            let call = "ncclCommDeregister";
            let ended = nccl.communicator.when_settled(call, deadline, |comm| {
                // SAFETY: the handle is from register, of the same communicator.
                unsafe { deregister(comm, std::ptr::without_provenance_mut(handle)) }
            });
            match ended {
                Ok(Some(())) => {}
                // What is registered must stay.
                Ok(None) => return tracing::warn!("NCCL is busy: memory is not freed"),
                // Fails where the communicator has ended, and the registration with it.
                Err(error) => tracing::debug!(what = error.what, "ncclCommDeregister"),
            }
        }
        match functions.mem_free {
            Some(free) if self.from_nccl => {
                let at = usize::try_from(self.pointer).unwrap_or(0);
                // SAFETY: from ncclMemAlloc, and nobody uses it any more.
                let code = unsafe { free(std::ptr::without_provenance_mut(at)) };
                if code != SUCCESS {
                    tracing::warn!(what = nccl.library.describe(code), "ncclMemFree");
                }
            }
            _ => cuda::free(&self.gpu.device, self.pointer),
        }
    }
}

type Job = Box<dyn FnOnce() + Send>;

/// The thread that waits for the device; `None` where it could not be started.
fn freeing() -> Option<&'static Sender<Job>> {
    static TO: OnceLock<Option<Sender<Job>>> = OnceLock::new();
    let to = TO.get_or_init(|| {
        let (to, from) = channel::<Job>();
        let named = std::thread::Builder::new().name("phalanx-gpu-free".to_owned());
        // Not joined: what it has not freed goes with the process.
        named.spawn(move || from.into_iter().for_each(|job| job())).ok().map(|_thread| to)
    });
    to.as_ref()
}

/// Does what may wait for the device, on a thread of its own: the last owner of memory is often a thread that
/// must never wait. Where the device never gets there the memory stays.
pub(crate) fn later(free: impl FnOnce() + Send + 'static) {
    // Without the thread the memory stays: to free it here could wait for ever.
    let job: Job = Box::new(free);
    let kept = match freeing() {
        Some(to) => to.send(job).err().map(|error| error.0),
        None => Some(job),
    };
    _ = std::mem::ManuallyDrop::new(kept);
}

/// Waits until what was let go so far is free; whether that came before the deadline.
pub(crate) fn await_freed(deadline: Instant) -> bool {
    let (done, is_done) = channel();
    // Nobody listens where the time was over.
    let mark: Job = Box::new(move || done.send(()).unwrap_or(()));
    let left = deadline.saturating_duration_since(Instant::now());
    freeing().is_some_and(|to| to.send(mark).is_ok() && is_done.recv_timeout(left).is_ok())
}
