//! Copies from the host to a GPU beside everything else: page-locked memory and a stream for copies.
#![expect(unsafe_code, reason = "gate: memory of the driver")]

use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::error::{Error, Result};
use crate::gpu::cuda::{self, CudaError, Device, GpuEvent, OwnStream};
use crate::gpu::Stream;

fn failed(error: CudaError) -> Error {
    let CudaError { call, what } = error;
    Error::Backend { rank: 0, backend: "cuda", call: call.to_owned(), what }
}

/// Page-locked host memory: a GPU reads it by itself, while the processor does something else. It is
/// zero at first, and aligned to pages.
#[derive(Debug)]
pub struct PinnedMemory {
    at: *mut u8,
    bytes: usize,
    device: Arc<Device>,
}

// SAFETY: memory of the process, owned by this value alone.
unsafe impl Send for PinnedMemory {}
// SAFETY: as for Send; it changes through `&mut` only.
unsafe impl Sync for PinnedMemory {}

impl PinnedMemory {
    pub(crate) fn new(device: &Arc<Device>, bytes: usize) -> Result<Self, CudaError> {
        let at = cuda::allocate_host(device, bytes)?;
        Ok(Self { at, bytes, device: Arc::clone(device) })
    }

    /// Its bytes.
    #[must_use]
    pub fn bytes(&self) -> &[u8] {
        // SAFETY: allocated with this size, and set to zero.
        unsafe { std::slice::from_raw_parts(self.at, self.bytes) }
    }

    /// Its bytes, to be written.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above, and borrowed alone.
        unsafe { std::slice::from_raw_parts_mut(self.at, self.bytes) }
    }
}

impl Drop for PinnedMemory {
    fn drop(&mut self) {
        cuda::free_host(&self.device, self.at);
    }
}

/// Copies to one GPU on a stream of its own.
#[derive(Debug)]
pub struct Uploader {
    device: Arc<Device>,
    stream: OwnStream,
}

impl Uploader {
    /// For GPU number `ordinal` of those that this process sees.
    ///
    /// # Errors
    ///
    /// [`Error::Backend`]: there is no driver, no such GPU, or the driver refuses.
    pub fn open(ordinal: usize) -> Result<Self> {
        if !cuda::has_driver() {
            let what = "no NVIDIA driver is installed here: train on the CPU".to_owned();
            let call = "cuInit".to_owned();
            return Err(Error::Backend { rank: 0, backend: "cuda", call, what });
        }
        let device = Device::open(ordinal).map_err(failed)?;
        let stream = OwnStream::new(&device).map_err(failed)?;
        Ok(Self { device, stream })
    }

    /// Page-locked memory for copies to any GPU.
    ///
    /// # Errors
    ///
    /// [`Error::Backend`]: there is too little memory, or more than may be locked.
    pub fn pinned(&self, bytes: usize) -> Result<PinnedMemory> {
        PinnedMemory::new(&self.device, bytes).map_err(failed)
    }

    /// Starts copies to the GPU's memory, each of some bytes to an address, after everything that
    /// `after` (the stream in whose order that memory was allocated) was asked for until now.
    ///
    /// # Errors
    ///
    /// [`Error::Backend`]: the driver refuses. Some of the copies may be under way: wait until the GPU is
    /// idle before the memory goes.
    ///
    /// # Safety
    ///
    /// All bytes stay as they are and where they are, and the addresses belong to so many bytes of this GPU
    /// that nobody else uses, until the upload is done.
    pub unsafe fn copy(&self, copies: &[(&[u8], u64)], after: Stream) -> Result<Upload> {
        let own = self.stream.as_stream();
        let before = GpuEvent::record(&self.device, after).map_err(failed)?;
        before.order(own).map_err(failed)?;
        for &(from, to) in copies {
            // SAFETY: as the caller promises.
            unsafe { cuda::write_later(&self.device, to, from, own) }.map_err(failed)?;
        }
        let event = GpuEvent::record(&self.device, own).map_err(failed)?;
        Ok(Upload { event })
    }
}

/// Copies that are under way.
#[derive(Debug)]
pub struct Upload {
    event: GpuEvent,
}

impl Upload {
    /// Lets `stream` go on only when the copies are done. Does not wait itself.
    ///
    /// # Errors
    ///
    /// [`Error::Backend`]: the driver refuses.
    pub fn order(&self, stream: Stream) -> Result<()> {
        self.event.order(stream).map_err(failed)
    }

    /// Whether the copies are done.
    ///
    /// # Errors
    ///
    /// [`Error::Backend`]: the GPU reports an error.
    pub fn is_done(&self) -> Result<bool> {
        self.event.is_passed().map_err(failed)
    }

    /// Waits until the copies are done, `limit` at most.
    ///
    /// # Errors
    ///
    /// [`Error::Backend`]: the GPU reports an error, or is not done in time.
    pub fn wait(&self, limit: Duration) -> Result<()> {
        let deadline = Instant::now() + limit.min(crate::deadline::LONGEST);
        while !self.is_done()? {
            if Instant::now() >= deadline {
                let what = format!("a copy to the GPU has not ended in {limit:?}");
                let call = "cuMemcpyHtoDAsync".to_owned();
                return Err(Error::Backend { rank: 0, backend: "cuda", call, what });
            }
            std::thread::park_timeout(Duration::from_micros(50));
        }
        Ok(())
    }
}
