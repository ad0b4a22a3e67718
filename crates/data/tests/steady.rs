//! A loader in its stride: no allocation, no growth.
#![expect(unsafe_code, reason = "an allocator that counts")]

use std::alloc::{GlobalAlloc, Layout, System};
use std::num::NonZeroUsize;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::Arc;

use phalanx_data::records::{ColumnValue, Field, RecordSamples, RecordWriter, Records};
use phalanx_data::{
    Access, CausalText, DType, Documents, Loader, LoaderOptions, MaskedText, Masking, MicroBatch,
    Objective, PaddedText, RawText, Samples, SpecialTokens, TokenStream, TokenWriter, Tokens,
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

fn write_records(target: &Path) -> phalanx_data::Result<()> {
    let fields = vec![Field::fixed("image", DType::U8, [16]), Field::variable("boxes", DType::F32)];
    let mut writer = RecordWriter::create(target, fields, 20_000)?;
    for record in 0..4000_u16 {
        let boxes = [f32::from(record); 8];
        let image = [record.to_le_bytes()[0]; 16];
        let boxes = ColumnValue::of(&boxes[..usize::from(record % 9)]);
        writer.push(&[ColumnValue::of(&image), boxes])?;
    }
    writer.finish()?;
    Ok(())
}

/// Every kind of sample, of one folder of tokens and one of records.
fn kinds(
    tokens: &Path,
    records: &Path,
    access: Access,
) -> phalanx_data::Result<Vec<(&'static str, Arc<dyn Samples>)>> {
    let stream: Arc<dyn Tokens> = Arc::new(TokenStream::open(tokens, access)?);
    let masked = MaskedText::new(Arc::clone(&stream), 64, Masking::default())?;
    let causal = CausalText::new(Arc::clone(&stream), 64, Documents::Apart)?;
    let raw = RawText::new(Arc::clone(&stream), 64)?;
    let padded = PaddedText::new(stream, 128, Objective::Causal)?;
    let records = RecordSamples::new(Records::open(records, access)?)?;
    Ok(vec![
        ("masked", Arc::new(masked)),
        ("raw", Arc::new(raw)),
        ("causal", Arc::new(causal)),
        ("padded", Arc::new(padded)),
        ("records", Arc::new(records)),
    ])
}

/// One test: others in this process would be counted as well.
#[test]
fn nothing_is_allocated_and_nothing_grows() {
    let folder = tempfile::tempdir().unwrap();
    let target = folder.path().join("tokens");
    write(&target).unwrap();
    let records = folder.path().join("records");
    write_records(&records).unwrap();
    for access in [Access::Read, Access::Map] {
        let all = kinds(&target, &records, access).unwrap();
        let set_ups = [(0, 1), (1, 1), (3, 2), (2, 8)];
        let cases = all.iter().flat_map(|kind| set_ups.map(|set_up| (kind, set_up)));
        for ((name, samples), (threads, parts)) in cases {
            let micro_batch = MicroBatch::Count(NonZeroUsize::new(parts).unwrap());
            let options =
                LoaderOptions { global_batch: 32, threads, micro_batch, ..Default::default() };
            let mut loader = Loader::new(Arc::clone(samples), options).unwrap();
            let steps = loader.steps_per_epoch();
            // As many batches as there can be at once: the queue is full, every thread has one, and a step is held.
            let held = [loader.next_step().unwrap(), loader.next_step().unwrap()];
            std::thread::park_timeout(std::time::Duration::from_millis(100));
            drop(held);
            let mut sum = 0_u64;
            let mut epoch = || {
                for _ in 0..steps {
                    let step = loader.next_step().unwrap();
                    let bytes = step.micro_batches[0].column_bytes(0);
                    sum += bytes.iter().map(|&byte| u64::from(byte)).sum::<u64>();
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
                "{name}: {allocated} allocations in {} batches, {threads} threads",
                10 * steps
            );
            let grown = resident_bytes().saturating_sub(resident);
            assert!(
                grown <= 1 << 20,
                "{name}: {grown} bytes more after 10 epochs, {threads} threads"
            );
            assert_ne!(sum, 0, "{name}: the batches hold something");
        }
    }
}
