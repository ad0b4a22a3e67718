//! A loader in its stride: no allocation, no growth.
#![expect(
    clippy::unwrap_used,
    reason = "a failed unwrap is a failed test, in a function that tests call too"
)]

#[path = "support/counting.rs"]
mod counting;

use std::num::NonZeroUsize;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use phalanx_data::damage::{record_damage, verify};
use phalanx_data::format::{SpecialTokens, TokenStream, TokenWriter, Tokens};
use phalanx_data::progress::Silent;
use phalanx_data::records::{ColumnValue, Field, RecordSamples, RecordWriter, Records};
use phalanx_data::samples::{
    map, Documents, FixedBatches, Mixture, Objective, PaddedText, RawText,
};
use phalanx_data::{
    Access, CausalText, DType, Loader, LoaderOptions, MaskedText, Masking, MicroBatch, OnDamage,
    Order, Samples, Tail,
};
use safetensors::tensor::{Dtype, TensorView};

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

fn write_batches(target: &Path) {
    let (rows, len) = (500, 64);
    let ids: Vec<u8> = (0..rows * len).flat_map(|at: i64| (at % 100).to_le_bytes()).collect();
    let view = || TensorView::new(Dtype::I64, vec![500, 64], &ids).unwrap();
    let tensors = [("input_ids", view()), ("labels", view())];
    std::fs::write(target, safetensors::serialize(tensors, None).unwrap()).unwrap();
}

/// Damages a shard and lists it.
fn damage(folder: &Path) {
    let path = folder.join("tokens-00001.safetensors");
    let mut bytes = std::fs::read(&path).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    std::fs::write(&path, bytes).unwrap();
    let found = verify(folder, None, &Silent).unwrap();
    assert_eq!(found.blocks.len(), 1);
    record_damage(folder, &found).unwrap();
}

/// What a loader reads, and how.
struct Kind {
    name: &'static str,
    samples: Arc<dyn Samples>,
    options: LoaderOptions,
}

/// Every kind of sample, order and tail.
fn kinds(folder: &Path, access: Access) -> phalanx_data::Result<Vec<Kind>> {
    let stream: Arc<dyn Tokens> = Arc::new(TokenStream::open(&folder.join("tokens"), access)?);
    let masked: Arc<dyn Samples> =
        Arc::new(MaskedText::new(Arc::clone(&stream), 64, Masking::default())?);
    let damaged: Arc<dyn Tokens> = Arc::new(TokenStream::open(&folder.join("damaged"), access)?);
    let damaged_documents = PaddedText::new(Arc::clone(&damaged), 128, Objective::Causal)?;
    let damaged = MaskedText::new(damaged, 64, Masking::default())?;
    let causal = CausalText::new(Arc::clone(&stream), 64, Documents::Apart)?;
    let raw = RawText::new(Arc::clone(&stream), 64)?;
    let padded: Arc<dyn Samples> = Arc::new(PaddedText::new(stream, 128, Objective::Causal)?);
    let records: Arc<dyn Samples> =
        Arc::new(RecordSamples::new(Records::open(&folder.join("records"), access)?)?);
    let fixed = FixedBatches::open(&folder.join("batches.safetensors"))?;
    let parts = [0.7, 0.2, 0.1].map(|weight| (Arc::clone(&masked), weight));
    let endless = [1.0, std::f64::consts::PI].map(|weight| (Arc::clone(&masked), weight));
    let mapped = map(Arc::clone(&masked), "v1", |_, _, row| {
        row.column::<i64>(0)?.reverse();
        Ok(())
    });
    let plain = LoaderOptions::default;
    let skips =
        || LoaderOptions { on_damage: OnDamage::Skip, tail: Tail::Exact, ..Default::default() };
    let wraps = || LoaderOptions { tail: Tail::Wrap, ..plain() };
    let order = Order::Blocks { block: 64, window: 10 };
    let blocks = |tail| LoaderOptions { order, tail, ..plain() };
    let mixture: Arc<dyn Samples> = Arc::new(Mixture::new(parts.into())?);
    let kind = |name, samples, options| Kind { name, samples, options };
    Ok(vec![
        kind("masked", Arc::clone(&masked), plain()),
        kind("raw", Arc::new(raw), plain()),
        kind("causal", Arc::new(causal), plain()),
        kind("padded", Arc::clone(&padded), plain()),
        kind("records", Arc::clone(&records), plain()),
        kind("fixed", Arc::new(fixed), LoaderOptions { tail: Tail::Pad, ..plain() }),
        kind("mapped", Arc::new(mapped), plain()),
        kind("blocks", masked, blocks(Tail::Exact)),
        kind("blocks of documents", Arc::clone(&padded), blocks(Tail::Drop)),
        kind("blocks of records", records, blocks(Tail::Drop)),
        kind("blocks of a mixture", Arc::clone(&mixture), blocks(Tail::Wrap)),
        // The queue, a step and what threads have in hand take more than that.
        kind(
            "padded, few bytes",
            Arc::clone(&padded),
            LoaderOptions { queue_bytes: 150_000, ..plain() },
        ),
        kind("buckets", padded, LoaderOptions { bucketing: 8, tail: Tail::Pad, ..plain() }),
        kind("mixture", mixture, wraps()),
        kind("endless mixture", Arc::new(Mixture::new(endless.into())?), wraps()),
        kind("damaged", Arc::new(damaged), skips()),
        kind(
            "buckets of damaged documents",
            Arc::new(damaged_documents),
            LoaderOptions { bucketing: 8, ..skips() },
        ),
    ])
}

/// One test: others in this process would be counted as well.
#[test]
fn nothing_is_allocated_and_nothing_grows() {
    let folder = tempfile::tempdir().unwrap();
    for name in ["tokens", "damaged"] {
        write(&folder.path().join(name)).unwrap();
    }
    damage(&folder.path().join("damaged"));
    write_records(&folder.path().join("records")).unwrap();
    write_batches(&folder.path().join("batches.safetensors"));
    for access in [Access::Read, Access::Map] {
        let all = kinds(folder.path(), access).unwrap();
        let set_ups = [(0, 1), (1, 1), (3, 2), (2, 8)];
        let cases = all.iter().flat_map(|kind| set_ups.map(|set_up| (kind, set_up)));
        for (kind, (threads, parts)) in cases {
            steady(kind, threads, parts);
        }
    }
}

/// Waits until loader threads allocate no more, because the queue is full.
fn wait_until_full() {
    let (mut seen, mut quiet, end) = (0, 0, Instant::now() + Duration::from_secs(60));
    while quiet < 20 && Instant::now() < end {
        std::thread::park_timeout(Duration::from_millis(5));
        let now = counting::allocations();
        quiet = if now == seen { quiet + 1 } else { 0 };
        seen = now;
    }
}

fn steady(kind: &Kind, threads: usize, parts: usize) {
    let Kind { name, samples, options } = kind;
    let micro_batch = MicroBatch::Count(NonZeroUsize::new(parts).unwrap());
    let options = LoaderOptions { global_batch: 32, threads, micro_batch, ..options.clone() };
    let mut loader = Loader::new(Arc::clone(samples), options).unwrap();
    let steps = loader.steps_per_epoch();
    // As many batches as there can be at once, and more: so many steps are held that threads fill the queue again.
    let held: Vec<_> = (0..6).map(|_| loader.next_step().unwrap()).collect();
    wait_until_full();
    drop(held);
    let (mut sum, mut left_out) = (0_u64, 0);
    let mut epoch = || {
        for _ in 0..steps {
            let step = loader.next_step().unwrap();
            let bytes = step.micro_batches[0].column_bytes(0);
            sum += bytes.iter().map(|&byte| u64::from(byte)).sum::<u64>();
            left_out += step.left_out;
        }
    };
    epoch();
    epoch();
    let (allocations, resident) = (counting::allocations(), resident_bytes());
    for _ in 0..10 {
        epoch();
    }
    let allocated = counting::allocations() - allocations;
    // The test's own reading of the resident size allocates some times.
    assert!(
        allocated < 10,
        "{name}: {allocated} allocations in {} batches, {threads} threads, {parts} micro-batches",
        10 * steps
    );
    let grown = resident_bytes().saturating_sub(resident);
    assert!(grown <= 1 << 20, "{name}: {grown} bytes more after 10 epochs, {threads} threads");
    assert_ne!(sum, 0, "{name}: the batches hold something");
    assert_eq!(left_out > 0, name.contains("damaged"), "{name}: {left_out} left out");
}
