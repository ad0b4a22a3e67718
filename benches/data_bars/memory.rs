//! Memory that an open folder takes.
#![expect(unsafe_code, reason = "an allocator that counts")]

use std::alloc::{GlobalAlloc, Layout, System};
use std::path::Path;
use std::sync::atomic::{AtomicI64, Ordering};

use phalanx::data::{Access, MaskedText, Masking, Samples as _};

use super::holes;

/// Counts the bytes that are allocated.
struct Counting;

static LIVE: AtomicI64 = AtomicI64::new(0);

fn count(bytes: usize, sign: i64) {
    LIVE.fetch_add(sign * i64::try_from(bytes).unwrap_or(0), Ordering::Relaxed);
}

// SAFETY: every call goes to the system's allocator as it came.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count(layout.size(), 1);
        // SAFETY: as the caller promised.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        count(layout.size(), -1);
        // SAFETY: as the caller promised.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// MiB that a folder of 10^9 samples takes when it is open.
pub(crate) fn of_a_billion_samples(folder: &Path) -> anyhow::Result<f64> {
    let target = folder.join("billion");
    holes::write(&target)?;
    let before = LIVE.load(Ordering::Relaxed);
    let samples = MaskedText::open(&target, holes::SEQUENCE_LEN, Masking::default(), Access::Map)?;
    anyhow::ensure!(samples.sample_count() >= holes::SAMPLES, "too few samples");
    #[expect(clippy::cast_precision_loss, reason = "some hundred thousand bytes")]
    let bytes = (LIVE.load(Ordering::Relaxed) - before) as f64;
    Ok(bytes / f64::from(1 << 20))
}
