//! A futex in shared memory: one side announces that a word of its has changed, others sleep until then.

use std::sync::atomic::{fence, AtomicU32, AtomicU64, Ordering};
use std::time::Duration;

use rustix::thread::futex;

/// The two words of a signal, each on a line of its own.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Signal<'m> {
    /// The futex: how often there was a wake-up.
    pub(crate) events: &'m AtomicU32,
    /// How many sleep on it.
    pub(crate) waiters: &'m AtomicU32,
}

impl Signal<'_> {
    /// Stores `value` and wakes those who sleep. For the one who owns the word.
    pub(crate) fn announce(&self, word: &AtomicU64, value: u64) {
        word.store(value, Ordering::Release);
        // Dekker's pattern with `sleep`: either we see the waiter or it sees the value.
        fence(Ordering::SeqCst);
        if self.waiters.load(Ordering::Relaxed) != 0 {
            self.wake();
        }
    }

    /// As [`Signal::announce`] without the fence: who goes to sleep at this moment is not woken.
    pub(crate) fn announce_lazily(&self, word: &AtomicU64, value: u64) {
        word.store(value, Ordering::Release);
        if self.waiters.load(Ordering::Relaxed) != 0 {
            self.wake();
        }
    }

    /// Wakes everybody who sleeps.
    pub(crate) fn wake(&self) {
        self.events.fetch_add(1, Ordering::SeqCst);
        if let Err(error) = futex::wake(self.events, futex::Flags::empty(), i32::MAX as u32) {
            tracing::warn!(%error, "futex wake failed");
        }
    }

    /// Sleeps until something is announced, at most `limit`, unless `word` has reached `at_least` already. May return early.
    pub(crate) fn sleep(&self, word: &AtomicU64, at_least: u64, limit: Duration) {
        self.waiters.fetch_add(1, Ordering::SeqCst);
        let seen = self.events.load(Ordering::SeqCst);
        fence(Ordering::SeqCst);
        if word.load(Ordering::Acquire) < at_least {
            let timeout = futex::Timespec {
                tv_sec: i64::try_from(limit.as_secs()).unwrap_or(i64::MAX),
                tv_nsec: limit.subsec_nanos().into(),
            };
            // A time-out, a signal or a changed word all mean: look again.
            futex::wait(self.events, futex::Flags::empty(), seen, Some(&timeout)).ok();
        }
        self.waiters.fetch_sub(1, Ordering::SeqCst);
    }
}
