//! A feed in its stride: a few small allocations for the tensors of a batch, whatever its size, and no growth.
#![expect(
    clippy::unwrap_used,
    reason = "a failed unwrap is a failed test, in a function that tests call too"
)]

#[path = "../../data/tests/support/counting.rs"]
mod counting;

use std::num::NonZeroUsize;
use std::sync::Arc;

use phalanx_data::{from_fn, Column, DType, LoaderOptions, MicroBatch, Samples};
use phalanx_ddp_core::feed::Feed;
use tch::{Device, Kind};

const COLUMNS: u64 = 3;

fn samples() -> Arc<dyn Samples> {
    let columns = vec![
        Column::new("ids", DType::I64, [64]),
        Column::new("features", DType::F32, [16]),
        Column::new("short", DType::U16, [4]),
    ];
    Arc::new(from_fn(6400, columns, "v1", |sample, _, row| {
        row.column::<i64>(0)?.fill(sample.id.cast_signed());
        row.column::<f32>(1)?.fill(0.5);
        row.column::<u16>(2)?.fill(7);
        Ok(())
    }))
}

fn resident_bytes() -> u64 {
    let statm = std::fs::read_to_string("/proc/self/statm").expect("procfs");
    let pages = statm.split(' ').nth(1).and_then(|pages| pages.parse::<u64>().ok());
    pages.expect("a number of pages") * 4096
}

/// Allocations for each micro-batch, over ten epochs.
fn allocations(
    samples: &Arc<dyn Samples>,
    global_batch: usize,
    parts: usize,
    threads: usize,
) -> f64 {
    let micro_batch = MicroBatch::Count(NonZeroUsize::new(parts).unwrap());
    let options = LoaderOptions { global_batch, micro_batch, threads, ..Default::default() };
    let mut feed = Feed::new(Arc::clone(samples), options, Device::Cpu).unwrap();
    let steps = feed.steps_per_epoch();
    let mut sum = 0;
    let mut epoch = || {
        for _ in 0..steps {
            let step = feed.next_step().unwrap();
            for batch in &step.micro_batches {
                let short = batch.get("short").unwrap();
                sum += short.sum(Kind::Int64).int64_value(&[]);
            }
        }
    };
    epoch();
    epoch();
    let (before, resident) = (counting::allocations(), resident_bytes());
    for _ in 0..10 {
        epoch();
    }
    let allocated = counting::allocations() - before;
    let grown = resident_bytes().saturating_sub(resident);
    assert!(grown <= 1 << 20, "{grown} bytes more after 10 epochs of {global_batch}");
    assert!(sum > 0);
    #[expect(clippy::cast_precision_loss, reason = "few")]
    let each = allocated as f64 / (10 * steps * parts as u64) as f64;
    each
}

/// One test: others in this process would be counted as well.
#[test]
fn tensors_take_a_few_allocations_whatever_their_size_is_and_nothing_grows() {
    let samples = samples();
    for (parts, threads) in [(1, 0), (1, 1), (4, 2)] {
        let small = allocations(&samples, 16, parts, threads);
        let large = allocations(&samples, 256, parts, threads);
        assert!((small - large).abs() < 1.0, "{small} and {large} allocations a batch");
        #[expect(clippy::cast_precision_loss, reason = "few")]
        let most = (8 + 7 * COLUMNS) as f64;
        assert!(large <= most, "{large} allocations a batch");
    }
}
