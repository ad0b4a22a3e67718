//! How long to watch a word in shared memory before sleeping, and how long to sleep at a time.

use std::time::{Duration, Instant};

/// The longest sleep between two looks at whether the peers live.
pub(crate) const SLEEP_MAX: Duration = Duration::from_millis(10);
/// The first such sleep.
pub(crate) const SLEEP_FIRST: Duration = Duration::from_micros(500);
/// A little more than a futex wake-up takes, so that a peer that is about to come is met awake.
const PATIENCE: Duration = Duration::from_micros(50);
/// With more ranks than cores, watching keeps the peer that is waited for from running: each look
/// gives the core away, which costs less than a sleep and a wake-up as long as peers come soon.
const PATIENCE_CROWDED: Duration = Duration::from_micros(200);
const SPINS_BETWEEN_LOOKS: u32 = 64;

/// How long to watch before sleeping.
pub(crate) const fn patience(crowded: bool) -> Duration {
    if crowded {
        PATIENCE_CROWDED
    } else {
        PATIENCE
    }
}

/// Looks at the word before looking at the clock; none where each look yields.
pub(crate) const fn spins(crowded: bool) -> u32 {
    if crowded {
        0
    } else {
        SPINS_BETWEEN_LOOKS
    }
}

/// Watches for as long as the patience, from `start` on, before somebody sleeps: whether it came.
pub(crate) fn watch(
    start: Instant,
    patience: Duration,
    spins: u32,
    reached: impl Fn() -> bool,
) -> bool {
    while start.elapsed() < patience {
        for _ in 0..spins {
            std::hint::spin_loop();
            if reached() {
                return true;
            }
        }
        if spins == 0 {
            // Whoever is waited for may have no core: it gets this one.
            std::thread::yield_now();
            if reached() {
                return true;
            }
        }
    }
    false
}
