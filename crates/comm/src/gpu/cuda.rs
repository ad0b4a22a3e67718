//! The few calls of the CUDA driver that collectives need, checked, over cudarc's `driver` layers.
#![expect(unsafe_code, reason = "gate: calls of the CUDA driver")]

use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use cudarc::driver::{result, sys};

use crate::gpu::Stream;

/// What the driver said to a call, with the call's name.
#[derive(Debug)]
pub(crate) struct CudaError {
    pub(crate) call: &'static str,
    pub(crate) what: String,
}

type Result<T> = std::result::Result<T, CudaError>;

fn failed(call: &'static str) -> impl FnOnce(result::DriverError) -> CudaError {
    move |error| {
        let code = error.0;
        let text = error.error_string().ok().map(|text| text.to_string_lossy().into_owned());
        CudaError { call, what: format!("{code:?}: {}", text.unwrap_or_default()) }
    }
}

/// Whether a driver is installed.
pub(crate) fn has_driver() -> bool {
    // cudarc tries three dozen names; the driver has had this one since it began.
    // SAFETY: the driver's initialiser does nothing that is seen here.
    let driver = unsafe { libloading::Library::new("libcuda.so.1") };
    // SAFETY: looks for the library by name.
    driver.is_ok() && unsafe { sys::is_culib_present() }
}

/// GPUs that this process sees. Only where [`has_driver`].
pub(crate) fn device_count() -> Result<usize> {
    result::init().map_err(failed("cuInit"))?;
    let count = result::device::get_count().map_err(failed("cuDeviceGetCount"))?;
    Ok(usize::try_from(count).unwrap_or(0))
}

/// A GPU with its primary context, the one that libtorch uses too.
#[derive(Debug)]
pub(crate) struct Device {
    pub(crate) ordinal: usize,
    device: sys::CUdevice,
    context: sys::CUcontext,
}

// SAFETY: a primary context may be used from every thread.
unsafe impl Send for Device {}
// SAFETY: as for Send.
unsafe impl Sync for Device {}

/// The device is current on this thread while it lives; then the one before is again.
#[derive(Debug)]
pub(crate) struct Current {
    before: Option<sys::CUcontext>,
}

impl Drop for Current {
    fn drop(&mut self) {
        let before = self.before.unwrap_or(std::ptr::null_mut());
        // SAFETY: the context was current here before, or there was none.
        if let Err(error) = unsafe { result::ctx::set_current(before) } {
            tracing::warn!(?error, "the CUDA context before could not be restored");
        }
    }
}

impl Device {
    /// Opens a GPU by its number. Only where [`has_driver`].
    pub(crate) fn open(ordinal: usize) -> Result<Arc<Self>> {
        result::init().map_err(failed("cuInit"))?;
        let number = i32::try_from(ordinal).unwrap_or(i32::MAX);
        let device = result::device::get(number).map_err(failed("cuDeviceGet"))?;
        // SAFETY: a device of this driver; released in drop.
        let context = unsafe { result::primary_ctx::retain(device) };
        let context = context.map_err(failed("cuDevicePrimaryCtxRetain"))?;
        Ok(Arc::new(Self { ordinal, device, context }))
    }

    /// The UUID: the same GPU has the same in every process.
    pub(crate) fn uuid(&self) -> Result<[u8; 16]> {
        let uuid = result::device::get_uuid(self.device).map_err(failed("cuDeviceGetUuid"))?;
        Ok(uuid.bytes.map(i8::cast_unsigned))
    }

    pub(crate) fn name(&self) -> String {
        result::device::get_name(self.device).unwrap_or_else(|_unnamed| "GPU".to_owned())
    }

    /// Makes it this thread's current device for a while.
    pub(crate) fn current(&self) -> Result<Current> {
        let before = result::ctx::get_current().map_err(failed("cuCtxGetCurrent"))?;
        // SAFETY: the context is retained while self lives.
        unsafe { result::ctx::set_current(self.context) }.map_err(failed("cuCtxSetCurrent"))?;
        Ok(Current { before })
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        // SAFETY: retained in open.
        if let Err(error) = unsafe { result::primary_ctx::release(self.device) } {
            tracing::debug!(?error, "cuDevicePrimaryCtxRelease");
        }
    }
}

/// A stream of our own, of the highest priority: collectives go before the rest of the step.
#[derive(Debug)]
pub(crate) struct OwnStream {
    raw: sys::CUstream,
    device: Arc<Device>,
}

// SAFETY: streams may be used from every thread.
unsafe impl Send for OwnStream {}
// SAFETY: as for Send.
unsafe impl Sync for OwnStream {}

impl OwnStream {
    pub(crate) fn new(device: &Arc<Device>) -> Result<Self> {
        let _current = device.current()?;
        let (_, greatest) =
            result::stream::get_priority_range().map_err(failed("cuCtxGetStreamPriorityRange"))?;
        let kind = result::stream::StreamKind::NonBlocking;
        let raw = result::stream::create_with_priority(kind, greatest)
            .map_err(failed("cuStreamCreateWithPriority"))?;
        Ok(Self { raw, device: Arc::clone(device) })
    }

    pub(crate) fn raw(&self) -> sys::CUstream {
        self.raw
    }

    pub(crate) fn as_stream(&self) -> Stream {
        Stream(self.raw as usize)
    }
}

impl Drop for OwnStream {
    fn drop(&mut self) {
        let Ok(_current) = self.device.current() else { return };
        // SAFETY: made in new; nothing uses it any more.
        if let Err(error) = unsafe { result::stream::destroy(self.raw) } {
            tracing::debug!(?error, "cuStreamDestroy");
        }
    }
}

/// A point in a stream.
#[derive(Debug)]
pub(crate) struct GpuEvent {
    raw: sys::CUevent,
    device: Arc<Device>,
}

// SAFETY: events may be used from every thread.
unsafe impl Send for GpuEvent {}
// SAFETY: as for Send.
unsafe impl Sync for GpuEvent {}

impl GpuEvent {
    /// The point where `stream` is now.
    pub(crate) fn record(device: &Arc<Device>, stream: Stream) -> Result<Self> {
        Self::record_with(device, stream, sys::CUevent_flags::CU_EVENT_DISABLE_TIMING)
    }

    /// As [`GpuEvent::record`], and the GPU notes when it passes the point.
    pub(crate) fn record_timed(device: &Arc<Device>, stream: Stream) -> Result<Self> {
        Self::record_with(device, stream, sys::CUevent_flags::CU_EVENT_DEFAULT)
    }

    fn record_with(
        device: &Arc<Device>,
        stream: Stream,
        flags: sys::CUevent_flags,
    ) -> Result<Self> {
        let _current = device.current()?;
        let raw = result::event::create(flags).map_err(failed("cuEventCreate"))?;
        let event = Self { raw, device: Arc::clone(device) };
        // SAFETY: the stream is the caller's, which lives while it makes calls on it.
        unsafe { result::event::record(raw, stream.0 as sys::CUstream) }
            .map_err(failed("cuEventRecord"))?;
        Ok(event)
    }

    /// Lets `stream` go on only after this point. Does not wait itself.
    pub(crate) fn order(&self, stream: Stream) -> Result<()> {
        let _current = self.device.current()?;
        let flags = sys::CUevent_wait_flags::CU_EVENT_WAIT_DEFAULT;
        // SAFETY: the event lives; the stream as in record.
        unsafe { result::stream::wait_event(stream.0 as sys::CUstream, self.raw, flags) }
            .map_err(failed("cuStreamWaitEvent"))
    }

    /// Whether the point is passed.
    pub(crate) fn is_passed(&self) -> Result<bool> {
        // SAFETY: the event lives.
        match unsafe { result::event::query(self.raw) } {
            Ok(()) => Ok(true),
            Err(result::DriverError(sys::CUresult::CUDA_ERROR_NOT_READY)) => Ok(false),
            Err(error) => Err(failed("cuEventQuery")(error)),
        }
    }
}

/// Milliseconds between two timed events that are passed.
type ElapsedTime = unsafe extern "C" fn(*mut f32, sys::CUevent, sys::CUevent) -> sys::CUresult;

/// Drivers older than CUDA 12.8 lack the function that cudarc calls for this, and it would panic.
fn elapsed_time() -> Option<ElapsedTime> {
    // Kept loaded beside its function.
    static FUNCTION: OnceLock<Option<(ElapsedTime, libloading::Library)>> = OnceLock::new();
    let loaded = FUNCTION.get_or_init(|| {
        // SAFETY: the driver's initialiser does nothing that is seen here.
        let driver = unsafe { libloading::Library::new("libcuda.so.1") }.ok()?;
        // SAFETY: the type is that of cuda.h, in every version.
        let function = *unsafe { driver.get::<ElapsedTime>(b"cuEventElapsedTime\0") }.ok()?;
        Some((function, driver))
    });
    loaded.as_ref().map(|(function, _)| *function)
}

impl GpuEvent {
    /// The GPU's time from this timed event to `end`, both of which are passed.
    pub(crate) fn time_until(&self, end: &Self) -> Result<Duration> {
        const CALL: &str = "cuEventElapsedTime";
        let _current = self.device.current()?;
        let Some(elapsed) = elapsed_time() else {
            return Err(CudaError {
                call: CALL,
                what: "the driver has no such function".to_owned(),
            });
        };
        let mut millis = 0.0_f32;
        // SAFETY: both events live; writes one number.
        let code = unsafe { elapsed(&raw mut millis, self.raw, end.raw) };
        code.result().map_err(failed(CALL))?;
        // Of two streams the end may come first.
        Ok(Duration::from_secs_f64(f64::from(millis.max(0.0)) / 1e3))
    }
}

impl Drop for GpuEvent {
    fn drop(&mut self) {
        let Ok(_current) = self.device.current() else { return };
        // SAFETY: made in record; the driver keeps it until the point is passed.
        if let Err(error) = unsafe { result::event::destroy(self.raw) } {
            tracing::debug!(?error, "cuEventDestroy");
        }
    }
}

/// Zeroed memory of a device, from the driver.
pub(crate) fn allocate(device: &Device, bytes: usize) -> Result<u64> {
    let _current = device.current()?;
    // SAFETY: freed with free.
    unsafe { result::malloc_sync(bytes.max(1)) }.map_err(failed("cuMemAlloc"))
}

/// Sets memory of a device to zero, and waits for it, as long as that may take: the driver's call returns
/// before, and streams that do not block are in no order with it.
pub(crate) fn zero(device: &Arc<Device>, pointer: u64, bytes: usize) -> Result<()> {
    const LIMIT: Duration = Duration::from_secs(60);
    const CALL: &str = "cuMemsetD8";
    let _current = device.current()?;
    // SAFETY: the caller allocated so many bytes there.
    unsafe { result::memset_d8_sync(pointer, 0, bytes) }.map_err(failed(CALL))?;
    let done = GpuEvent::record(device, Stream::default())?;
    let deadline = Instant::now() + LIMIT;
    while !done.is_passed()? {
        if Instant::now() >= deadline {
            let what = format!(
                "the GPU's default stream has not come to it in {LIMIT:?}: something before it hangs"
            );
            return Err(CudaError { call: CALL, what });
        }
        std::thread::park_timeout(Duration::from_micros(20));
    }
    Ok(())
}

/// Waits for all that the current device was asked for.
pub(crate) fn synchronize() -> Result<()> {
    result::ctx::synchronize().map_err(failed("cuCtxSynchronize"))
}

pub(crate) fn free(device: &Device, pointer: u64) {
    let Ok(_current) = device.current() else { return };
    // SAFETY: from allocate, and nobody uses it any more.
    if let Err(error) = unsafe { result::free_sync(pointer) } {
        tracing::warn!(?error, "cuMemFree");
    }
}

/// Copies to the host, after everything on the device that was asked for before.
pub(crate) fn read(device: &Device, from: u64, to: &mut [u8]) -> Result<()> {
    let _current = device.current()?;
    result::ctx::synchronize().map_err(failed("cuCtxSynchronize"))?;
    // SAFETY: the caller has checked the range.
    unsafe { result::memcpy_dtoh_sync(to, from) }.map_err(failed("cuMemcpyDtoH"))
}

/// Copies to the device.
pub(crate) fn write(device: &Device, to: u64, from: &[u8]) -> Result<()> {
    let _current = device.current()?;
    // SAFETY: the caller has checked the range.
    unsafe { result::memcpy_htod_sync(to, from) }.map_err(failed("cuMemcpyHtoD"))?;
    result::ctx::synchronize().map_err(failed("cuCtxSynchronize"))
}

/// Zeroed page-locked memory of the host, for all contexts.
pub(crate) fn allocate_host(device: &Device, bytes: usize) -> Result<*mut u8> {
    let _current = device.current()?;
    // SAFETY: freed with free_host.
    let memory = unsafe { result::malloc_host(bytes.max(1), sys::CU_MEMHOSTALLOC_PORTABLE) };
    let at = memory.map_err(failed("cuMemHostAlloc"))?.cast::<u8>();
    // SAFETY: of so many bytes, and nobody else's.
    unsafe { at.write_bytes(0, bytes) };
    Ok(at)
}

pub(crate) fn free_host(device: &Device, at: *mut u8) {
    let Ok(_current) = device.current() else { return };
    // SAFETY: from allocate_host, and nobody uses it any more.
    if let Err(error) = unsafe { result::free_host(at.cast()) } {
        tracing::warn!(?error, "cuMemFreeHost");
    }
}

/// Copies to the device, in `stream`'s order.
///
/// # Safety
///
/// The bytes stay, and the address belongs to as many bytes of the device, until the copy is done.
pub(crate) unsafe fn write_later(
    device: &Device,
    to: u64,
    from: &[u8],
    stream: Stream,
) -> Result<()> {
    let _current = device.current()?;
    // SAFETY: as the caller promises.
    unsafe { result::memcpy_htod_async(to, from, stream.0 as sys::CUstream) }
        .map_err(failed("cuMemcpyHtoDAsync"))
}

/// Copies to the host, in `stream`'s order.
///
/// # Safety
///
/// The address belongs to as many bytes of the device, and the host's bytes are page-locked and nobody
/// else's, until the copy is done.
#[cfg(feature = "mpi")]
pub(crate) unsafe fn read_later(
    device: &Device,
    from: u64,
    to: &mut [u8],
    stream: Stream,
) -> Result<()> {
    let _current = device.current()?;
    // SAFETY: as the caller promises.
    unsafe { result::memcpy_dtoh_async(to, from, stream.0 as sys::CUstream) }
        .map_err(failed("cuMemcpyDtoHAsync"))
}

/// Copies within the device, in `stream`'s order.
///
/// # Safety
///
/// Both addresses belong to so many bytes of the device until the copy is done.
#[cfg(feature = "mpi")]
pub(crate) unsafe fn copy_later(
    device: &Device,
    from: u64,
    to: u64,
    bytes: usize,
    stream: Stream,
) -> Result<()> {
    let _current = device.current()?;
    // SAFETY: as the caller promises.
    unsafe { result::memcpy_dtod_async(to, from, bytes, stream.0 as sys::CUstream) }
        .map_err(failed("cuMemcpyDtoDAsync"))
}
