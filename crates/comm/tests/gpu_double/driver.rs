//! The driver: contexts, streams, events, memory.
#![expect(unsafe_code, reason = "the other side of the C interfaces")]

use std::cell::Cell;
use std::collections::{HashMap, VecDeque};
use std::ffi::{c_char, c_int, c_uint, c_void};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock};
use std::time::Instant;

use crate::{a_while, lock};

pub(crate) const NO_VALUE: c_int = 1;
pub(crate) const NO_MEMORY: c_int = 2;
pub(crate) const NO_CONTEXT: c_int = 201;
pub(crate) const NOT_READY: c_int = 600;
pub(crate) const OK: c_int = 0;

pub(crate) type Task = Box<dyn FnOnce() + Send>;

/// A stream: a queue and the thread that works on it.
pub(crate) struct Stream {
    tasks: Mutex<(VecDeque<Task>, bool)>,
    came: Condvar,
    ended: AtomicBool,
}

impl Stream {
    pub(crate) fn new() -> Arc<Self> {
        let stream = Arc::new(Self {
            tasks: Mutex::default(),
            came: Condvar::new(),
            ended: AtomicBool::new(false),
        });
        let ours = Arc::clone(&stream);
        std::thread::spawn(move || ours.run());
        stream
    }

    pub(crate) fn run(&self) {
        loop {
            let mut tasks = lock(&self.tasks);
            let task = loop {
                if let Some(task) = tasks.0.pop_front() {
                    tasks.1 = true;
                    break task;
                }
                tasks.1 = false;
                self.came.notify_all();
                if self.ended.load(SeqCst) {
                    return;
                }
                tasks = self.came.wait(tasks).unwrap_or_else(|p| p.into_inner());
            };
            drop(tasks);
            // What is asked of a GPU is done later.
            a_while(300);
            task();
        }
    }

    pub(crate) fn push(&self, task: impl FnOnce() + Send + 'static) {
        lock(&self.tasks).0.push_back(Box::new(task));
        self.came.notify_all();
    }

    pub(crate) fn drain(&self) {
        let mut tasks = lock(&self.tasks);
        while tasks.1 || !tasks.0.is_empty() {
            tasks = self.came.wait(tasks).unwrap_or_else(|p| p.into_inner());
        }
    }
}

#[derive(Default)]
pub(crate) struct Flag(Mutex<Option<Instant>>, Condvar);

impl Flag {
    pub(crate) fn raise(&self) {
        *lock(&self.0) = Some(Instant::now());
        self.1.notify_all();
    }

    pub(crate) fn time(&self) -> Option<Instant> {
        *lock(&self.0)
    }

    pub(crate) fn wait(&self) {
        let mut flag = lock(&self.0);
        while flag.is_none() {
            flag = self.1.wait(flag).unwrap_or_else(|p| p.into_inner());
        }
    }
}

pub(crate) struct Event {
    recorded: Option<Arc<Flag>>,
    timed: bool,
}

#[derive(Default)]
pub(crate) struct Gpu {
    pub(crate) streams: HashMap<usize, Arc<Stream>>,
    events: HashMap<usize, Event>,
    memory: HashMap<u64, usize>,
}

pub(crate) fn gpu() -> MutexGuard<'static, Gpu> {
    static GPU: OnceLock<Mutex<Gpu>> = OnceLock::new();
    lock(GPU.get_or_init(|| {
        let mut gpu = Gpu::default();
        gpu.streams.insert(0, Stream::new());
        Mutex::new(gpu)
    }))
}

pub(crate) fn fresh() -> usize {
    static NEXT: AtomicUsize = AtomicUsize::new(0x1000);
    NEXT.fetch_add(16, SeqCst)
}

thread_local!(pub(crate) static CURRENT: Cell<usize> = const { Cell::new(0) });

pub(crate) const CONTEXT: usize = 0xc0;

pub(crate) fn setting(name: &str) -> Option<String> {
    std::env::var(name).ok()
}

#[no_mangle]
extern "C" fn cuInit(_flags: c_uint) -> c_int {
    OK
}

#[no_mangle]
unsafe extern "C" fn cuDeviceGetCount(count: *mut c_int) -> c_int {
    *count = setting("DOUBLE_GPUS").and_then(|n| n.parse().ok()).unwrap_or(1);
    OK
}

#[no_mangle]
unsafe extern "C" fn cuDeviceGet(device: *mut c_int, ordinal: c_int) -> c_int {
    *device = ordinal;
    OK
}

#[no_mangle]
unsafe extern "C" fn cuDeviceGetName(name: *mut c_char, length: c_int, _device: c_int) -> c_int {
    let text = b"stand-in\0";
    std::ptr::copy_nonoverlapping(text.as_ptr().cast(), name, text.len().min(length as usize));
    OK
}

/// The GPU's number, or `DOUBLE_UUID`: processes say with it whether they have the same GPU.
#[no_mangle]
unsafe extern "C" fn cuDeviceGetUuid_v2(uuid: *mut [u8; 16], device: c_int) -> c_int {
    let number = setting("DOUBLE_UUID").and_then(|n| n.parse().ok()).unwrap_or(device as u8);
    *uuid = [number; 16];
    OK
}

#[no_mangle]
unsafe extern "C" fn cuDevicePrimaryCtxRetain(context: *mut *mut c_void, _device: c_int) -> c_int {
    *context = CONTEXT as *mut c_void;
    OK
}

#[no_mangle]
extern "C" fn cuDevicePrimaryCtxRelease_v2(_device: c_int) -> c_int {
    OK
}

#[no_mangle]
extern "C" fn cuCtxSetCurrent(context: *mut c_void) -> c_int {
    CURRENT.set(context as usize);
    OK
}

#[no_mangle]
unsafe extern "C" fn cuCtxGetCurrent(context: *mut *mut c_void) -> c_int {
    *context = CURRENT.get() as *mut c_void;
    OK
}

#[no_mangle]
pub(crate) extern "C" fn cuCtxSynchronize() -> c_int {
    in_context!();
    let streams: Vec<_> = gpu().streams.values().cloned().collect();
    streams.iter().for_each(|stream| stream.drain());
    OK
}

#[no_mangle]
unsafe extern "C" fn cuCtxGetStreamPriorityRange(least: *mut c_int, greatest: *mut c_int) -> c_int {
    in_context!();
    (*least, *greatest) = (0, -5);
    OK
}

#[no_mangle]
unsafe extern "C" fn cuStreamCreateWithPriority(
    stream: *mut usize,
    flags: c_uint,
    priority: c_int,
) -> c_int {
    in_context!();
    if flags > 1 || !(-5..=0).contains(&priority) {
        return NO_VALUE;
    }
    *stream = fresh();
    gpu().streams.insert(*stream, Stream::new());
    OK
}

#[no_mangle]
unsafe extern "C" fn cuStreamCreate(stream: *mut usize, flags: c_uint) -> c_int {
    cuStreamCreateWithPriority(stream, flags, 0)
}

#[no_mangle]
extern "C" fn cuStreamDestroy_v2(stream: usize) -> c_int {
    in_context!();
    let Some(stream) = gpu().streams.remove(&stream) else { return NO_VALUE };
    stream.ended.store(true, SeqCst);
    stream.came.notify_all();
    OK
}

#[no_mangle]
extern "C" fn cuStreamSynchronize(stream: usize) -> c_int {
    in_context!();
    let found = gpu().streams.get(&stream).cloned();
    found.map_or(NO_VALUE, |stream| {
        stream.drain();
        OK
    })
}

#[no_mangle]
unsafe extern "C" fn cuEventCreate(event: *mut usize, flags: c_uint) -> c_int {
    in_context!();
    *event = fresh();
    gpu().events.insert(*event, Event { recorded: None, timed: flags & 2 == 0 });
    OK
}

#[no_mangle]
extern "C" fn cuEventDestroy_v2(event: usize) -> c_int {
    in_context!();
    gpu().events.remove(&event).map_or(NO_VALUE, |_| OK)
}

#[no_mangle]
extern "C" fn cuEventRecord(event: usize, stream: usize) -> c_int {
    in_context!();
    let mut gpu = gpu();
    let Some(stream) = gpu.streams.get(&stream).cloned() else { return NO_VALUE };
    let Some(event) = gpu.events.get_mut(&event) else { return NO_VALUE };
    let flag = Arc::new(Flag::default());
    event.recorded = Some(Arc::clone(&flag));
    stream.push(move || flag.raise());
    OK
}

#[no_mangle]
extern "C" fn cuStreamWaitEvent(stream: usize, event: usize, _flags: c_uint) -> c_int {
    in_context!();
    let gpu = gpu();
    let Some(stream) = gpu.streams.get(&stream).cloned() else { return NO_VALUE };
    let Some(event) = gpu.events.get(&event) else { return NO_VALUE };
    if let Some(flag) = event.recorded.clone() {
        stream.push(move || flag.wait());
    }
    OK
}

#[no_mangle]
extern "C" fn cuEventQuery(event: usize) -> c_int {
    let gpu = gpu();
    let Some(event) = gpu.events.get(&event) else { return NO_VALUE };
    match &event.recorded {
        Some(flag) if flag.time().is_none() => NOT_READY,
        _ => OK,
    }
}

#[no_mangle]
extern "C" fn cuEventSynchronize(event: usize) -> c_int {
    let flag = {
        let gpu = gpu();
        let Some(event) = gpu.events.get(&event) else { return NO_VALUE };
        event.recorded.clone()
    };
    if let Some(flag) = flag {
        flag.wait();
    }
    OK
}

pub(crate) unsafe fn elapsed(millis: *mut f32, start: usize, end: usize) -> c_int {
    let gpu = gpu();
    let (Some(start), Some(end)) = (gpu.events.get(&start), gpu.events.get(&end)) else {
        return NO_VALUE;
    };
    if !start.timed || !end.timed {
        return NO_VALUE;
    }
    let time = |event: &Event| event.recorded.as_ref().and_then(|flag| flag.time());
    let (Some(start), Some(end)) = (time(start), time(end)) else { return NOT_READY };
    *millis = end.duration_since(start).as_secs_f32() * 1e3;
    OK
}

#[no_mangle]
unsafe extern "C" fn cuEventElapsedTime(millis: *mut f32, start: usize, end: usize) -> c_int {
    elapsed(millis, start, end)
}

#[no_mangle]
unsafe extern "C" fn cuEventElapsedTime_v2(millis: *mut f32, start: usize, end: usize) -> c_int {
    elapsed(millis, start, end)
}

/// Memory of the device, of which there are `DOUBLE_MEMORY` bytes.
pub(crate) fn take(bytes: usize) -> Option<u64> {
    let limit = setting("DOUBLE_MEMORY").and_then(|n| n.parse().ok()).unwrap_or(usize::MAX);
    if gpu().memory.values().sum::<usize>().saturating_add(bytes) > limit {
        return None;
    }
    // Full of nonsense, as fresh memory is.
    let memory = vec![0xa5_u8; bytes].into_boxed_slice();
    let at = Box::into_raw(memory).cast::<u8>() as u64;
    gpu().memory.insert(at, bytes);
    Some(at)
}

pub(crate) unsafe fn give(at: u64) -> bool {
    let Some(bytes) = gpu().memory.remove(&at) else { return false };
    drop(Box::from_raw(std::ptr::slice_from_raw_parts_mut(at as *mut u8, bytes)));
    true
}

pub(crate) fn is_inside(at: u64, bytes: usize) -> bool {
    let end = at + bytes as u64;
    bytes == 0
        || gpu().memory.iter().any(|(start, size)| *start <= at && end <= start + *size as u64)
}

/// An access of the GPU's to memory that was freed ends the process, as it ends the real one's context.
pub(crate) fn must_be_inside(at: u64, bytes: usize) {
    if !is_inside(at, bytes) {
        eprintln!("an illegal memory access was encountered");
        std::process::abort();
    }
}

#[no_mangle]
unsafe extern "C" fn cuMemAlloc_v2(at: *mut u64, bytes: usize) -> c_int {
    in_context!();
    let Some(taken) = take(bytes) else { return NO_MEMORY };
    *at = taken;
    OK
}

#[no_mangle]
unsafe extern "C" fn cuMemFree_v2(at: u64) -> c_int {
    in_context!();
    // As the driver's own: not before all is done.
    cuCtxSynchronize();
    if give(at) {
        OK
    } else {
        NO_VALUE
    }
}

#[no_mangle]
unsafe extern "C" fn cuMemsetD8_v2(at: u64, value: u8, bytes: usize) -> c_int {
    in_context!();
    if !is_inside(at, bytes) {
        return NO_VALUE;
    }
    // As the driver's own: it returns before, in the order of the default stream alone.
    memset(at, value, bytes, 0)
}

unsafe fn memset(at: u64, value: u8, bytes: usize, stream: usize) -> c_int {
    let found = gpu().streams.get(&stream).cloned();
    let Some(stream) = found.filter(|_| is_inside(at, bytes)) else { return NO_VALUE };
    stream.push(move || {
        a_while(3000);
        must_be_inside(at, bytes);
        std::ptr::write_bytes(at as *mut u8, value, bytes);
    });
    OK
}

#[no_mangle]
unsafe extern "C" fn cuMemsetD8Async(at: u64, value: u8, bytes: usize, stream: usize) -> c_int {
    in_context!();
    memset(at, value, bytes, stream)
}
