//! A loader in its stride: no allocation, no growth.
#![expect(unsafe_code, reason = "an allocator that counts")]

use std::alloc::{GlobalAlloc, Layout, System};
use std::num::NonZeroUsize;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::Arc;

use phalanx_data::{
    Access, Loader, LoaderOptions, MaskedText, Masking, MicroBatch, Samples, SpecialTokens,
    TokenStream, TokenWriter,
};

/// Counts what all threads allocate.
struct Counting;

static ALLOCATIONS: AtomicU64 = AtomicU64::new(0);

// SAFETY: every call goes to the system's allocator as it came.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
        // SAFETY: as the caller promised.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: as the caller promised.
        unsafe { System.dealloc(pointer, layout) }
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
        // SAFETY: as the caller promised.
        unsafe { System.realloc(pointer, layout, size) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

const SPECIAL: SpecialTokens = SpecialTokens::bert(0, 1, 2, 3, 4);

fn write(target: &Path) -> phalanx_data::Result<()> {
    let mut writer = TokenWriter::create(target, b"{}", 500, SPECIAL, 200_000)?;
    for document in 0..4000_u32 {
        let tokens: Vec<u32> = (0..99).map(|at| 5 + (document * 31 + at * at) % 495).collect();
        writer.tokens(&tokens)?;
        writer.tokens(&[3])?;
        writer.end_document()?;
    }
    writer.finish(0)?;
    Ok(())
}

fn resident_bytes() -> u64 {
    let statm = std::fs::read_to_string("/proc/self/statm").expect("procfs");
    let pages = statm.split(' ').nth(1).and_then(|pages| pages.parse::<u64>().ok());
    pages.expect("a number of pages") * 4096
}

/// One test: others in this process would be counted as well.
#[test]
fn nothing_is_allocated_and_nothing_grows() {
    let folder = tempfile::tempdir().unwrap();
    let target = folder.path().join("tokens");
    write(&target).unwrap();
    for access in [Access::Read, Access::Map] {
        let stream = Arc::new(TokenStream::open(&target, access).unwrap());
        let samples: Arc<dyn Samples> =
            Arc::new(MaskedText::new(stream, 64, Masking::default()).unwrap());
        for (threads, parts) in [(0, 1), (1, 1), (3, 2), (2, 8)] {
            let micro_batch = MicroBatch::Count(NonZeroUsize::new(parts).unwrap());
            let options =
                LoaderOptions { global_batch: 32, threads, micro_batch, ..Default::default() };
            let mut loader = Loader::new(Arc::clone(&samples), options).unwrap();
            let steps = loader.steps_per_epoch();
            // As many batches as there can be at once: the queue is full, every thread has one, and a step is held.
            let held = [loader.next_step().unwrap(), loader.next_step().unwrap()];
            std::thread::park_timeout(std::time::Duration::from_millis(100));
            drop(held);
            let mut sum = 0_i64;
            let mut epoch = || {
                for _ in 0..steps {
                    let step = loader.next_step().unwrap();
                    sum += step.micro_batches[0].labels()[7];
                }
            };
            epoch();
            epoch();
            let (allocations, resident) = (ALLOCATIONS.load(Ordering::Relaxed), resident_bytes());
            for _ in 0..10 {
                epoch();
            }
            let allocated = ALLOCATIONS.load(Ordering::Relaxed) - allocations;
            // The test's own reading of the resident size allocates some times.
            assert!(
                allocated < 10,
                "{allocated} allocations in {} batches, {threads} threads",
                10 * steps
            );
            let grown = resident_bytes().saturating_sub(resident);
            assert!(grown <= 1 << 20, "{grown} bytes more after 10 epochs, {threads} threads");
            assert_ne!(sum, 0);
        }
    }
}
