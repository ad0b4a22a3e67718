//! libnccl: ids, communicators, memory.
#![expect(unsafe_code, reason = "the other side of the C interfaces")]

use std::collections::HashMap;
use std::ffi::{c_char, c_int};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU64, Ordering::SeqCst};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock};
use std::time::Duration;

use crate::driver::{fresh, give, is_inside, setting, take, CONTEXT, CURRENT};
use crate::numbers::size_of;
use crate::{a_while, lock, wander};

pub(crate) const SUCCESS: c_int = 0;
pub(crate) const INTERNAL: c_int = 3;
pub(crate) const INVALID_ARGUMENT: c_int = 4;
pub(crate) const INVALID_USAGE: c_int = 5;
pub(crate) const REMOTE: c_int = 6;
pub(crate) const IN_PROGRESS: c_int = 7;

/// `DOUBLE_VERSION`, or 2.28.9.
pub(crate) fn version() -> c_int {
    setting("DOUBLE_VERSION").and_then(|n| n.parse().ok()).unwrap_or(22_809)
}

pub(crate) static LAST_ERROR: Mutex<Vec<u8>> = Mutex::new(Vec::new());

pub(crate) fn failure(code: c_int, what: &str) -> c_int {
    let mut text = what.as_bytes().to_vec();
    text.push(0);
    // Somebody may still read the one before.
    std::mem::forget(std::mem::replace(&mut *lock(&LAST_ERROR), text));
    code
}

/// Whether the test has put a file of this name where the ranks meet.
pub(crate) fn is_wished(name: &str) -> bool {
    setting("DOUBLE_FOLDER").is_some_and(|folder| PathBuf::from(folder).join(name).exists())
}

pub(crate) struct Comm {
    pub(crate) folder: PathBuf,
    pub(crate) rank: usize,
    pub(crate) ranks: usize,
    pub(crate) state: AtomicI32,
    pub(crate) aborted: AtomicBool,
    pub(crate) finalized: AtomicBool,
    pub(crate) collectives: AtomicU64,
    pub(crate) sent: Mutex<HashMap<usize, u64>>,
    pub(crate) received: Mutex<HashMap<usize, u64>>,
    pub(crate) factors: Mutex<Vec<Option<(c_int, Vec<u8>)>>>,
    pub(crate) splits: AtomicU64,
    /// Files of this rank's that others may still read.
    pub(crate) kept: Mutex<Vec<String>>,
}

pub(crate) fn comms() -> MutexGuard<'static, HashMap<usize, Arc<Comm>>> {
    static COMMS: OnceLock<Mutex<HashMap<usize, Arc<Comm>>>> = OnceLock::new();
    lock(COMMS.get_or_init(Mutex::default))
}

pub(crate) fn comm_of(handle: usize) -> Option<Arc<Comm>> {
    comms().get(&handle).cloned()
}

impl Comm {
    pub(crate) fn new(folder: PathBuf, rank: usize, ranks: usize) -> Arc<Self> {
        Arc::new(Self {
            folder,
            rank,
            ranks,
            state: AtomicI32::new(IN_PROGRESS),
            aborted: AtomicBool::new(false),
            finalized: AtomicBool::new(false),
            collectives: AtomicU64::new(0),
            sent: Mutex::default(),
            received: Mutex::default(),
            factors: Mutex::default(),
            splits: AtomicU64::new(0),
            kept: Mutex::default(),
        })
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.folder.join(name)
    }

    /// A file appears whole or not at all.
    pub(crate) fn publish(&self, name: &str, bytes: &[u8]) {
        let hidden = self.path(&format!(".{name}.{}", self.rank));
        if std::fs::write(&hidden, bytes)
            .and_then(|()| std::fs::rename(&hidden, self.path(name)))
            .is_err()
        {
            self.state.store(INTERNAL, SeqCst);
        }
    }

    /// Waits until `look` finds something; `None` after an abort.
    pub(crate) fn until<T>(&self, mut look: impl FnMut() -> Option<T>) -> Option<T> {
        loop {
            if self.aborted.load(SeqCst) {
                return None;
            }
            if let Some(found) = look() {
                return Some(found);
            }
            std::thread::sleep(Duration::from_micros(100));
        }
    }

    pub(crate) fn read(&self, name: &str) -> Option<Vec<u8>> {
        let path = self.path(name);
        self.until(|| std::fs::read(&path).ok())
    }

    /// All ranks come to a point; ends the call that is in progress.
    pub(crate) fn gather_ranks(&self) {
        self.publish(&format!("rank-{}", self.rank), &[]);
        let here = |rank: usize| self.path(&format!("rank-{rank}")).exists();
        if self.until(|| (0..self.ranks).all(here).then_some(())).is_some() {
            self.state.store(SUCCESS, SeqCst);
        }
    }
}

pub(crate) fn join(folder: PathBuf, rank: usize, ranks: usize) -> usize {
    let comm = Comm::new(folder, rank, ranks);
    let handle = fresh();
    comms().insert(handle, Arc::clone(&comm));
    std::thread::spawn(move || {
        drop(std::fs::create_dir_all(&comm.folder));
        a_while(2000);
        comm.gather_ranks();
    });
    handle
}

#[no_mangle]
unsafe extern "C" fn ncclGetVersion(number: *mut c_int) -> c_int {
    *number = version();
    SUCCESS
}

#[no_mangle]
extern "C" fn ncclGetErrorString(code: c_int) -> *const c_char {
    match code {
        SUCCESS => c"no error",
        INTERNAL => c"internal error - please report this issue to the NCCL developers",
        INVALID_ARGUMENT => c"invalid argument (run with NCCL_DEBUG=WARN for details)",
        INVALID_USAGE => c"invalid usage (run with NCCL_DEBUG=WARN for details)",
        REMOTE => c"remote process exited or there was a network error",
        IN_PROGRESS => c"NCCL operation in progress",
        _ => c"unknown result code",
    }
    .as_ptr()
}

#[no_mangle]
extern "C" fn ncclGetLastError(_comm: usize) -> *const c_char {
    let text = lock(&LAST_ERROR);
    if text.is_empty() {
        c"".as_ptr()
    } else {
        text.as_ptr().cast()
    }
}

/// A fresh folder below `DOUBLE_FOLDER`.
#[no_mangle]
unsafe extern "C" fn ncclGetUniqueId(id: *mut [u8; 128]) -> c_int {
    let Some(base) = setting("DOUBLE_FOLDER") else {
        return failure(2, "DOUBLE_FOLDER is not set");
    };
    let folder = format!("{base}/{}-{:x}", std::process::id(), wander());
    *id = [0; 128];
    (&mut *id)[..folder.len()].copy_from_slice(folder.as_bytes());
    SUCCESS
}

/// The first fields of `ncclConfig_t`.
#[repr(C)]
pub(crate) struct Config {
    size: usize,
    magic: u32,
    version: u32,
    blocking: c_int,
}

pub(crate) unsafe fn check_config(config: *const Config) -> Option<c_int> {
    let Config { size, magic, version: of, blocking } = config.read();
    // A later one has a field where a caller that knows it only to 2.30.0 has nothing.
    let known = version().min(23_000);
    if magic != 0xcafe_beef || of as c_int != known || !(24..=256).contains(&size) {
        return Some(failure(INVALID_ARGUMENT, "a configuration that this version does not know"));
    }
    if blocking != 0 {
        return Some(failure(INVALID_USAGE, "the stand-in has no blocking communicators"));
    }
    None
}

#[repr(C)]
pub(crate) struct Id([u8; 128]);

#[no_mangle]
unsafe extern "C" fn ncclCommInitRankConfig(
    comm: *mut usize,
    ranks: c_int,
    id: Id,
    rank: c_int,
    config: *const Config,
) -> c_int {
    if CURRENT.get() != CONTEXT {
        return failure(1, "no current device");
    }
    if let Some(code) = check_config(config) {
        return code;
    }
    if setting("DOUBLE_SHOWS_VARIABLES").is_some() {
        for (name, value) in std::env::vars().filter(|(name, _)| name.starts_with("NCCL_")) {
            println!("the library sees {name}={value}");
        }
    }
    let end = id.0.iter().position(|byte| *byte == 0).unwrap_or(128);
    let folder = PathBuf::from(String::from_utf8_lossy(&id.0[..end]).into_owned());
    if rank < 0 || rank >= ranks || end == 0 {
        return failure(INVALID_ARGUMENT, "a rank outside of the world, or no id");
    }
    if setting("DOUBLE_INIT").as_deref() == Some("fails") {
        return failure(INTERNAL, "as the test wants it");
    }
    *comm = join(folder, rank as usize, ranks as usize);
    IN_PROGRESS
}

/// Color −1 joins none; ranks in the order of `key`, then of the parent.
#[no_mangle]
unsafe extern "C" fn ncclCommSplit(
    parent: usize,
    color: c_int,
    key: c_int,
    comm: *mut usize,
    config: *const Config,
) -> c_int {
    let parent = match ready(parent) {
        Ok(parent) => parent,
        Err(code) => return code,
    };
    if let Some(code) = (!config.is_null()).then(|| check_config(config)).flatten() {
        return code;
    }
    let split = parent.splits.fetch_add(1, SeqCst);
    let mut mine = color.to_le_bytes().to_vec();
    mine.extend(key.to_le_bytes());
    parent.publish(&format!("split-{split}-{}", parent.rank), &mine);
    parent.state.store(IN_PROGRESS, SeqCst);
    // The handle is written when the parent is ready again, as the real one does it.
    let place = comm as usize;
    std::thread::spawn(move || {
        a_while(2000);
        let mut members = Vec::new();
        for rank in 0..parent.ranks {
            let Some(theirs) = parent.read(&format!("split-{split}-{rank}")) else { return };
            let number =
                |at: usize| c_int::from_le_bytes(theirs[at..at + 4].try_into().unwrap_or_default());
            if number(0) == color {
                members.push((number(4), rank));
            }
        }
        members.sort_unstable();
        if color >= 0 {
            let rank = members.iter().position(|(_, rank)| *rank == parent.rank).unwrap_or(0);
            let part = join(parent.path(&format!("part-{split}-{color}")), rank, members.len());
            // SAFETY: the caller keeps the place until the parent is ready.
            unsafe { *(place as *mut usize) = part };
        }
        let _ = parent.state.compare_exchange(IN_PROGRESS, SUCCESS, SeqCst, SeqCst);
    });
    IN_PROGRESS
}

/// A communicator that may take a call.
pub(crate) fn ready(handle: usize) -> Result<Arc<Comm>, c_int> {
    let Some(comm) = comm_of(handle) else {
        return Err(failure(INVALID_ARGUMENT, "no such communicator"));
    };
    match comm.state.load(SeqCst) {
        SUCCESS if comm.finalized.load(SeqCst) => {
            Err(failure(INVALID_USAGE, "a call after ncclCommFinalize"))
        }
        SUCCESS => Ok(comm),
        IN_PROGRESS => Err(failure(
            INVALID_ARGUMENT,
            "Attempt to use communicator before the previous operation returned ncclSuccess",
        )),
        code => Err(code),
    }
}

#[no_mangle]
unsafe extern "C" fn ncclCommGetAsyncError(comm: usize, state: *mut c_int) -> c_int {
    let Some(comm) = comm_of(comm) else {
        return failure(INVALID_ARGUMENT, "no such communicator");
    };
    *state = if is_wished("dies") { REMOTE } else { comm.state.load(SeqCst) };
    SUCCESS
}

#[no_mangle]
extern "C" fn ncclCommFinalize(comm: usize) -> c_int {
    let comm = match ready(comm) {
        Ok(comm) => comm,
        Err(code) => return code,
    };
    comm.state.store(IN_PROGRESS, SeqCst);
    std::thread::spawn(move || {
        a_while(1000);
        comm.finalized.store(true, SeqCst);
        let _ = comm.state.compare_exchange(IN_PROGRESS, SUCCESS, SeqCst, SeqCst);
    });
    IN_PROGRESS
}

#[no_mangle]
extern "C" fn ncclCommDestroy(comm: usize) -> c_int {
    let Some(comm) = comms().remove(&comm) else {
        return failure(INVALID_ARGUMENT, "destroyed twice");
    };
    if !comm.finalized.load(SeqCst) {
        return failure(INVALID_USAGE, "destroyed before it was finalized");
    }
    SUCCESS
}

#[no_mangle]
extern "C" fn ncclCommAbort(comm: usize) -> c_int {
    if CURRENT.get() != CONTEXT {
        return failure(1, "no current device");
    }
    // It waits for what is under way.
    let waits = setting("DOUBLE_ABORT_MS").and_then(|n| n.parse().ok()).unwrap_or(0);
    std::thread::sleep(Duration::from_millis(waits));
    let Some(comm) = comms().remove(&comm) else {
        return failure(INVALID_ARGUMENT, "aborted twice");
    };
    comm.aborted.store(true, SeqCst);
    SUCCESS
}

#[no_mangle]
unsafe extern "C" fn ncclRedOpCreatePreMulSum(
    op: *mut c_int,
    factor: *const u8,
    dtype: c_int,
    residence: c_int,
    comm: usize,
) -> c_int {
    let comm = match ready(comm) {
        Ok(comm) => comm,
        Err(code) => return code,
    };
    if residence != 1 {
        return failure(INVALID_ARGUMENT, "the factor is on the host");
    }
    let mut factors = lock(&comm.factors);
    if factors.iter().flatten().count() >= 8 {
        return failure(INVALID_USAGE, "so many operations that nobody destroys");
    }
    factors.push(Some((dtype, std::slice::from_raw_parts(factor, size_of(dtype)).to_vec())));
    *op = 100 + factors.len() as c_int - 1;
    SUCCESS
}

#[no_mangle]
extern "C" fn ncclRedOpDestroy(op: c_int, comm: usize) -> c_int {
    let comm = match ready(comm) {
        Ok(comm) => comm,
        Err(code) => return code,
    };
    let known = lock(&comm.factors).get_mut(op.wrapping_sub(100) as usize).and_then(Option::take);
    known.map_or_else(|| failure(INVALID_ARGUMENT, "no such operation"), |_| SUCCESS)
}

#[no_mangle]
unsafe extern "C" fn ncclMemAlloc(at: *mut u64, bytes: usize) -> c_int {
    if CURRENT.get() != CONTEXT {
        return failure(1, "no current device");
    }
    let Some(taken) = take(bytes) else { return failure(1, "no memory left") };
    *at = taken;
    SUCCESS
}

#[no_mangle]
unsafe extern "C" fn ncclMemFree(at: u64) -> c_int {
    // As the real one, which unmaps at once, whatever still works on the memory.
    if give(at) {
        SUCCESS
    } else {
        failure(INVALID_ARGUMENT, "not from ncclMemAlloc")
    }
}

#[no_mangle]
unsafe extern "C" fn ncclCommRegister(
    comm: usize,
    at: u64,
    bytes: usize,
    handle: *mut usize,
) -> c_int {
    if let Err(code) = ready(comm) {
        return code;
    }
    if !is_inside(at, bytes) {
        return failure(INVALID_ARGUMENT, "memory of nobody");
    }
    *handle = fresh();
    SUCCESS
}

#[no_mangle]
extern "C" fn ncclCommDeregister(comm: usize, _handle: usize) -> c_int {
    comm_of(comm).map_or_else(|| failure(INVALID_ARGUMENT, "no such communicator"), |_| SUCCESS)
}
