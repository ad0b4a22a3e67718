//! A stand-in for the CUDA driver and for libnccl, for machines without a GPU: a library of its own
//! that the tests build with `rustc` and load under both names.
//!
//! It keeps the rules that our code has to keep, and breaks what breaks them: streams are queues that
//! run on threads of their own, later than the calls; calls need a current context; a communicator
//! does not block, and refuses a call while the one before is in progress; a collective ends when
//! every rank has come, in the order of the stream; a send ends when it is received; an abort ends all.
//! Ranks are processes, which exchange files in the folder that the unique id names. "Memory of the
//! GPU" is memory of the host.
#![warn(unsafe_code)]
#![allow(non_snake_case)]

/// What needs a current context fails without one.
macro_rules! in_context {
    () => {
        if crate::driver::CURRENT.get() != crate::driver::CONTEXT {
            return crate::driver::NO_CONTEXT;
        }
    };
}

mod calls;
mod copies;
mod driver;
mod errors;
mod library;
mod numbers;

use std::sync::atomic::{AtomicU64, Ordering::SeqCst};
use std::sync::{Mutex, MutexGuard};
use std::time::Duration;

pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}

/// A number that wanders, for delays.
pub(crate) fn wander() -> u64 {
    static STATE: AtomicU64 = AtomicU64::new(0x9e37_79b9_7f4a_7c15);
    let mut x =
        STATE.fetch_add(0x9e37_79b9_7f4a_7c15, SeqCst) ^ u64::from(std::process::id()) << 32;
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

pub(crate) fn a_while(micros: u64) {
    std::thread::sleep(Duration::from_micros(wander() % micros.max(1)));
}
