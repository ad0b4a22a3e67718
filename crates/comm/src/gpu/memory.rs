//! GPU memory that collectives work on: with a library that has an allocator from that, and registered where it can,
//! so that `NVLink` SHARP and network cards use it without a copy; else the driver's.

use std::sync::mpsc::{channel, Sender};
use std::sync::{Arc, OnceLock};
use std::time::Instant;

use super::cuda;
use super::{cuda_error, Gpu};
use crate::error::Result;

/// Memory of one GPU, freed when dropped.
#[derive(Debug)]
pub(crate) struct DeviceMemory {
    pointer: u64,
    gpu: Arc<Gpu>,
    from_allocator: bool,
    /// The allocator's handle of the registration.
    registration: Option<usize>,
}

impl DeviceMemory {
    /// `bytes` zeroed bytes.
    pub(crate) fn new(gpu: &Arc<Gpu>, rank: usize, bytes: usize) -> Result<Self> {
        let error = |error| cuda_error(rank, error);
        let _current = gpu.device.current().map_err(error)?;
        let allocator = gpu.allocator.as_ref();
        let (pointer, from_allocator) = match allocator.and_then(|own| own.allocate(bytes)) {
            Some(pointer) => (pointer, true),
            None => (cuda::allocate(&gpu.device, bytes).map_err(error)?, false),
        };
        let mut memory = Self { pointer, gpu: Arc::clone(gpu), from_allocator, registration: None };
        if bytes > 0 {
            cuda::zero(&gpu.device, pointer, bytes).map_err(error)?;
            memory.registration = allocator.and_then(|own| own.register(pointer, bytes));
        }
        Ok(memory)
    }

    pub(crate) fn pointer(&self) -> u64 {
        self.pointer
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

impl Drop for DeviceMemory {
    fn drop(&mut self) {
        let freed = Freed {
            pointer: self.pointer,
            from_allocator: self.from_allocator,
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
    from_allocator: bool,
    registration: Option<usize>,
    gpu: Arc<Gpu>,
}

impl Freed {
    /// Frees it when the device is done with what it was asked for; waits for that.
    fn free(self) {
        let Ok(_current) = self.gpu.device.current() else { return };
        // A library may unmap memory without a look at what still works on it.
        if let Err(error) = cuda::synchronize() {
            return tracing::warn!(what = error.what, "memory of the device is not freed");
        }
        let allocator = self.gpu.allocator.as_ref();
        if let (Some(handle), Some(allocator)) = (self.registration, allocator) {
            if !allocator.deregister(handle) {
                return; // what is registered must stay
            }
        }
        match allocator.filter(|_| self.from_allocator) {
            Some(allocator) => allocator.free(self.pointer),
            None => cuda::free(&self.gpu.device, self.pointer),
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
