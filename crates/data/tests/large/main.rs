//! Memory of a data set of 10^9 samples. The files have holes: a terabyte takes some megabytes of disk.
#![expect(unsafe_code, reason = "an allocator that counts")]

mod holes;

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicI64, Ordering};
use std::sync::Arc;

use phalanx_data::{Access, Loader, LoaderOptions, MaskedText, Masking, Samples, TokenStream};

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

/// One test: what others allocate would be counted as well.
#[test]
fn a_billion_samples_take_less_than_a_mebibyte() {
    let folder = tempfile::tempdir().unwrap();
    let target = folder.path().join("tokens");
    let shards = holes::write(&target).unwrap();
    for access in [Access::Map, Access::Read] {
        let before = LIVE.load(Ordering::Relaxed);
        let stream = Arc::new(TokenStream::open(&target, access).unwrap());
        let samples = MaskedText::new(stream, holes::SEQUENCE_LEN, Masking::default()).unwrap();
        assert!(samples.sample_count() >= holes::SAMPLES);
        let opened = LIVE.load(Ordering::Relaxed) - before;
        println!("{} samples, {shards} shards, {access:?}: {opened} bytes", samples.sample_count());
        assert!(opened < 1 << 20, "{access:?}: {opened} bytes");
        // An order of 10^9 samples takes no memory either, and a place in it is found at once.
        let samples: Arc<dyn Samples> = Arc::new(samples);
        let options = LoaderOptions { global_batch: 8, threads: 0, ..Default::default() };
        let mut loader = Loader::new(samples, options).unwrap();
        let step = loader.next_step().unwrap();
        let with_a_batch = LIVE.load(Ordering::Relaxed) - before;
        // A batch of 8 × 512 × 2 × 8 bytes, and a block that is verified, where it is read.
        assert!(with_a_batch < (1 << 20) + (3 << 20) / 2, "{access:?}: {with_a_batch} bytes");
        drop(step);
    }
}
