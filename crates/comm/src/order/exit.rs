//! Groups that live when the process exits, because they are in a static, were forgotten, or
//! `std::process::exit` was called: what they have started is finished and the others are told, as if
//! they had been dropped. A death by a signal and `abort` do not come by here.
#![expect(unsafe_code, reason = "atexit")]

use std::ffi::c_int;
use std::sync::{Arc, Mutex, OnceLock, PoisonError, Weak};
use std::time::{Duration, Instant};

use rustix::event::{poll, Timespec};

use super::core::Core;
use crate::control::peers::Peers;

/// How long exiting waits for collectives that were started.
const EXIT_MAX: Duration = Duration::from_secs(10);

/// A group. A thread may be letting go of its core, and be telling its peers.
struct Live {
    core: Weak<Core>,
    peers: Weak<Peers>,
}

/// This process's groups.
static LIVE: Mutex<Vec<Live>> = Mutex::new(Vec::new());
/// What libraries do before groups leave.
static FIRST: Mutex<Vec<fn(Duration)>> = Mutex::new(Vec::new());
/// The process that `at_exit` is registered in: a fork of it has nothing to say to the peers.
static OWNER: OnceLock<u32> = OnceLock::new();

unsafe extern "C" {
    fn atexit(callback: extern "C" fn()) -> c_int;
}

/// Looks after a group until it is gone.
pub(crate) fn look_after(core: &Arc<Core>) {
    OWNER.get_or_init(|| {
        // SAFETY: a function that lives as long as the process.
        if unsafe { atexit(at_exit) } != 0 {
            tracing::warn!("atexit has no room: drop groups before the process exits");
        }
        std::process::id()
    });
    let mut live = LIVE.lock().unwrap_or_else(PoisonError::into_inner);
    live.retain(|other| other.peers.strong_count() > 0);
    live.push(Live { core: Arc::downgrade(core), peers: Arc::downgrade(&core.peers) });
}

/// Has `close` called, with a limit, when the process exits with groups that live.
#[cfg_attr(not(feature = "mpi"), expect(dead_code, reason = "of MPI"))]
pub(crate) fn before(close: fn(Duration)) {
    let mut first = FIRST.lock().unwrap_or_else(PoisonError::into_inner);
    if !first.iter().any(|other| std::ptr::fn_addr_eq(*other, close)) {
        first.push(close);
    }
}

extern "C" fn at_exit() {
    if OWNER.get() == Some(&std::process::id()) {
        // Nobody is left to hear of a panic.
        drop(std::panic::catch_unwind(leave));
    }
}

fn leave() {
    let first = std::mem::take(&mut *FIRST.lock().unwrap_or_else(PoisonError::into_inner));
    first.iter().for_each(|close| close(EXIT_MAX));
    let live = std::mem::take(&mut *LIVE.lock().unwrap_or_else(PoisonError::into_inner));
    let cores: Vec<Arc<Core>> = live.iter().filter_map(|live| live.core.upgrade()).collect();
    for core in &cores {
        core.close();
    }
    let deadline = Instant::now() + EXIT_MAX;
    for peers in live.iter().filter_map(|live| live.peers.upgrade()) {
        // After a failure nothing is left to finish, but another thread may be about to say so.
        let is_busy = || peers.failure().is_none() || peers.is_leaving();
        while !peers.is_closed() && is_busy() && Instant::now() < deadline {
            // Thread-local storage is gone by now: nothing of std that parks.
            poll(&mut [], Some(&Timespec { tv_sec: 0, tv_nsec: 1_000_000 })).ok();
        }
        peers.close();
    }
}
