//! The communicators of this process. Whoever calls NCCL on one of them holds the list meanwhile,
//! so that no other thread aborts it.
#![expect(unsafe_code, reason = "gate: handles of libnccl")]

use std::sync::{Mutex, MutexGuard, PoisonError, TryLockError};
use std::time::{Duration, Instant};

use cudarc::nccl::sys::ncclComm_t;

/// How long a caller waits for the list: a call that holds it for longer hangs in NCCL.
const LOCK_MAX: Duration = Duration::from_secs(20);
/// Between two looks.
const PAUSE: Duration = Duration::from_micros(100);

static ALIVE: Mutex<Vec<Handle>> = Mutex::new(Vec::new());

/// Why all communicators were aborted last.
static CAUSE: Mutex<String> = Mutex::new(String::new());

/// A communicator, as NCCL names it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Handle(pub(super) ncclComm_t);

// SAFETY: NCCL allows the calls that are made with it here from every thread, one at a time.
unsafe impl Send for Handle {}
// SAFETY: as for Send; the list of live communicators makes the calls one at a time.
unsafe impl Sync for Handle {}

pub(super) type Alive = MutexGuard<'static, Vec<Handle>>;

/// The list; `None` when a call of NCCL that holds it hangs.
pub(super) fn lock() -> Option<Alive> {
    lock_for(LOCK_MAX)
}

/// The same, for so long.
pub(super) fn lock_for(limit: Duration) -> Option<Alive> {
    let start = Instant::now();
    loop {
        match ALIVE.try_lock() {
            Ok(list) => return Some(list),
            // The list is valid after every statement.
            Err(TryLockError::Poisoned(poisoned)) => return Some(poisoned.into_inner()),
            Err(TryLockError::WouldBlock) if start.elapsed() >= limit => return None,
            Err(TryLockError::WouldBlock) => std::thread::park_timeout(PAUSE),
        }
    }
}

/// Takes a handle off the list; whether it was there, and so is the caller's to end.
pub(super) fn remove(handle: Handle) -> bool {
    let Some(mut alive) = lock() else {
        tracing::error!("a call of NCCL hangs; a communicator is left as it is");
        return false;
    };
    let before = alive.len();
    alive.retain(|other| *other != handle);
    alive.len() < before
}

/// Why all were aborted last.
pub(super) fn cause() -> String {
    CAUSE.lock().unwrap_or_else(PoisonError::into_inner).clone()
}

pub(super) fn set_cause(cause: &str) {
    cause.clone_into(&mut CAUSE.lock().unwrap_or_else(PoisonError::into_inner));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_call_that_hangs_keeps_nobody_for_ever() {
        let (sender, receiver) = std::sync::mpsc::channel();
        let (release, released) = std::sync::mpsc::channel::<()>();
        let held = std::thread::spawn(move || {
            let list = lock().unwrap();
            sender.send(()).unwrap();
            released.recv_timeout(Duration::from_secs(10)).unwrap();
            drop(list);
        });
        receiver.recv_timeout(Duration::from_secs(10)).unwrap();
        assert!(lock_for(Duration::from_millis(50)).is_none());
        release.send(()).unwrap();
        held.join().unwrap();
        assert!(lock_for(Duration::from_secs(10)).is_some());
    }
}
