//! Prefetching: order, bounds, errors, panics, deadlines, memory.

use std::num::NonZeroUsize;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

use phalanx_data::batches::{Allocator, ColumnBuffer, HostAllocator};
use phalanx_data::{from_fn, Column, DType, Error, Loader, LoaderOptions, MicroBatch, Order};

use crate::support::{broken, open, write_tokens, Scripted};

/// Nothing here takes longer; a test that does has hung.
const LONG: Duration = Duration::from_secs(60);

fn options(threads: usize) -> LoaderOptions {
    LoaderOptions {
        order: Order::Sequential,
        global_batch: 4,
        threads,
        timeout: LONG,
        ..Default::default()
    }
}

#[test]
fn batches_come_in_order_when_threads_finish_in_another() {
    // Even batches take longer than odd ones.
    let script = |sample: phalanx_data::order::Sample| {
        if sample.id % 8 < 4 {
            std::thread::park_timeout(Duration::from_micros(200 * (sample.id % 3)));
        }
        Ok(())
    };
    let samples = Arc::new(Scripted::new(400, 1, script));
    let mut loader = Loader::new(samples, options(4)).unwrap();
    for step in 0..100 {
        let ids: Vec<i64> = loader.next_step().unwrap().micro_batches[0].input_ids().to_vec();
        assert_eq!(ids, (step * 4..step * 4 + 4).collect::<Vec<i64>>());
    }
}

#[test]
fn an_error_arrives_in_its_place_and_stops_the_loader() {
    for threads in [0, 1, 3] {
        let script = |sample: phalanx_data::order::Sample| match sample.id {
            21 => Err(broken()),
            _ => Ok(()),
        };
        let samples = Arc::new(Scripted::new(400, 1, script));
        let mut loader = Loader::new(samples, options(threads)).unwrap();
        for _ in 0..5 {
            loader.next_step().unwrap();
        }
        let state = loader.state();
        assert!(matches!(loader.next_step(), Err(Error::NoSuchSample { sample: 4711, .. })));
        match loader.next_step() {
            Err(Error::Stopped { first }) => assert!(first.contains("4711")),
            other => panic!("{other:?}"),
        }
        assert_eq!(loader.state(), state, "the place is that of the last good step");
    }
}

#[test]
fn a_panic_in_a_thread_is_an_error_with_its_place_and_message() {
    let script = |sample: phalanx_data::order::Sample| {
        assert!(sample.id != 13, "thirteen brings no luck");
        Ok(())
    };
    let samples = Arc::new(Scripted::new(400, 1, script));
    let mut loader = Loader::new(samples, options(2)).unwrap();
    for _ in 0..3 {
        loader.next_step().unwrap();
    }
    match loader.next_step() {
        Err(Error::WorkerPanicked { epoch: 0, position: 12, message }) => {
            assert_eq!(message, "thirteen brings no luck");
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn slow_storage_is_an_error_after_the_timeout_not_a_hang() {
    let gate = Arc::new((Mutex::new(false), Condvar::new()));
    let held = Arc::clone(&gate);
    let script = move |_| {
        let (open, changed) = &*held;
        let open = open.lock().unwrap();
        drop(changed.wait_timeout_while(open, LONG, |open| !*open).unwrap());
        Ok(())
    };
    let samples = Arc::new(Scripted::new(400, 1, script));
    let timeout = Duration::from_millis(50);
    let mut loader = Loader::new(samples, LoaderOptions { timeout, ..options(1) }).unwrap();
    let started = Instant::now();
    assert!(matches!(loader.next_step(), Err(Error::Timeout { epoch: 0, position: 0, .. })));
    assert!(started.elapsed() >= timeout);
    *gate.0.lock().unwrap() = true;
    gate.1.notify_all();
    // Dropping waits for the thread that is let go.
    drop(loader);
}

#[test]
fn the_queue_is_bounded_in_batches_and_in_bytes() {
    for (queue_batches, queue_bytes, bound) in [(3, usize::MAX, 3), (100, 5 * 64, 5), (100, 1, 1)] {
        let built = Arc::new(AtomicU64::new(0));
        let count = Arc::clone(&built);
        let script = move |_| {
            count.fetch_add(1, Ordering::SeqCst);
            Ok(())
        };
        // 4 rows of one token: 4 × 2 × 8 = 64 bytes a batch.
        let samples = Arc::new(Scripted::new(4000, 1, script));
        let options = LoaderOptions { queue_batches, queue_bytes, ..options(2) };
        let mut loader = Loader::new(samples, options).unwrap();
        // Threads that found it full wake when half of it is taken.
        let taken_at_once = bound - bound / 2;
        for taken in (0..10).map(|round| round * taken_at_once) {
            let deadline = Instant::now() + LONG;
            let full = (taken + bound) * 4;
            while built.load(Ordering::SeqCst) < full && Instant::now() < deadline {
                std::thread::park_timeout(Duration::from_micros(100));
            }
            // It fills the queue, and stays at its bound although both threads have nothing else to do.
            std::thread::park_timeout(Duration::from_millis(2));
            assert_eq!(built.load(Ordering::SeqCst), full, "after {taken} batches");
            for _ in 0..taken_at_once {
                loader.next_step().unwrap();
            }
        }
    }
}

/// Counts what is there of the process's memory.
#[derive(Clone, Debug, Default)]
struct Counting(Arc<AtomicU64>);

#[derive(Debug)]
struct Counted(Box<dyn ColumnBuffer>, Arc<AtomicU64>);

impl Allocator for Counting {
    fn allocate(&self, bytes: usize) -> phalanx_data::Result<Box<dyn ColumnBuffer>> {
        let block = HostAllocator.allocate(bytes)?;
        self.0.fetch_add(block.bytes().len() as u64, Ordering::SeqCst);
        Ok(Box::new(Counted(block, Arc::clone(&self.0))))
    }
}

impl ColumnBuffer for Counted {
    fn bytes(&self) -> &[u8] {
        self.0.bytes()
    }

    fn bytes_mut(&mut self) -> &mut [u8] {
        self.0.bytes_mut()
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.1.fetch_sub(self.0.bytes().len() as u64, Ordering::SeqCst);
    }
}

#[test]
fn a_step_is_ready_when_it_would_not_be_waited_for() {
    let gate = Arc::new((Mutex::new(0_u64), Condvar::new()));
    let open = |up_to: u64| {
        *gate.0.lock().unwrap() = up_to;
        gate.1.notify_all();
    };
    for (queue_batches, threads) in [(8, 1), (8, 2), (1, 1), (1, 2)] {
        open(0);
        let waits = Arc::clone(&gate);
        let samples = Arc::new(Scripted::new(12, 1, move |sample: phalanx_data::order::Sample| {
            let up_to = waits.0.lock().unwrap();
            drop(waits.1.wait_timeout_while(up_to, LONG, |up_to| *up_to <= sample.id).unwrap());
            Ok(())
        }));
        let two = NonZeroUsize::new(2).unwrap();
        let micro_batch = MicroBatch::Size(two);
        let options =
            LoaderOptions { queue_batches, micro_batch, epochs: Some(1), ..options(threads) };
        let mut loader = Loader::new(samples, options).unwrap();
        let wait_until_ready = |loader: &Loader| {
            let deadline = Instant::now() + LONG;
            while !loader.is_next_ready() && Instant::now() < deadline {
                std::thread::park_timeout(Duration::from_micros(100));
            }
            loader.is_next_ready()
        };
        assert!(!loader.is_next_ready(), "nothing is there");
        if queue_batches > 1 {
            open(2);
            std::thread::park_timeout(Duration::from_millis(5));
            assert!(
                !loader.is_next_ready(),
                "half a step is there, and there is room for the rest"
            );
        }
        open(6);
        assert!(wait_until_ready(&loader));
        loader.next_step().unwrap();
        if queue_batches > 1 {
            std::thread::park_timeout(Duration::from_millis(5));
            assert!(!loader.is_next_ready());
        }
        open(12);
        for _ in 0..2 {
            assert!(wait_until_ready(&loader));
            loader.next_step().unwrap();
        }
        assert!(loader.is_at_end() && loader.is_next_ready());
    }
    let at_once = Loader::new(Arc::new(Scripted::new(12, 1, |_| Ok(()))), options(0)).unwrap();
    assert!(at_once.is_next_ready());
    let mut broken =
        Loader::new(Arc::new(Scripted::new(12, 1, |_| Err(broken()))), options(1)).unwrap();
    assert!(broken.next_step().is_err());
    assert!(broken.is_next_ready(), "the same error once more");
}

#[test]
fn padded_batches_count_as_long_as_they_are() {
    // A row may have 8 MiB, and has 64 bytes; of each 200 samples the last 20 have 64 KiB.
    let len = |id: u64| if id % 200 < 180 { 8 } else { 8 << 10 };
    const LARGEST: u64 = 4 * (64 << 10);
    let queue_bytes = 1 << 19;
    for threads in [1, 2] {
        let (memory, built) = (Counting::default(), Arc::new(AtomicU64::new(0)));
        let count = Arc::clone(&built);
        let columns = vec![Column::padded("x", DType::I64, [1 << 20])];
        let samples = from_fn(4000, columns, "1", move |sample, _, row| {
            row.column::<i64>(0)?.fill(sample.id.cast_signed());
            count.fetch_add(1, Ordering::SeqCst);
            Ok(())
        });
        let samples = Arc::new(samples.with_len(move |id| Ok(len(id))));
        let options = LoaderOptions {
            queue_bytes,
            memory: Arc::new(memory.clone()),
            epochs: Some(1),
            ..options(threads)
        };
        let mut loader = Loader::new(samples, options).unwrap();
        let deadline = Instant::now() + LONG;
        while built.load(Ordering::SeqCst) < 8 * 4 && Instant::now() < deadline {
            std::thread::yield_now();
        }
        assert_eq!(built.load(Ordering::SeqCst), 8 * 4, "short batches fill the queue");
        let (mut most, mut now) = (0, 0);
        while !loader.is_at_end() {
            std::thread::park_timeout(Duration::from_micros(100));
            let step = loader.next_step().unwrap();
            let x = step.micro_batches[0].get::<i64>("x").unwrap();
            assert_eq!(x.len() as u64, 4 * len(step.micro_batches[0].samples()[0].id) as u64);
            now = memory.0.load(Ordering::SeqCst);
            most = most.max(now);
        }
        // Blocks have half more than was needed. One batch in each thread's hands, one here, one that is not yet given back.
        let most_max = 3 * (queue_bytes as u64 + (threads as u64 + 2) * LARGEST) / 2;
        assert!(most <= most_max, "{threads} threads: {most} bytes at once, {now} at the end");
    }
}

#[test]
fn a_step_of_more_micro_batches_than_the_queue_holds_is_delivered() {
    let samples = Arc::new(Scripted::new(400, 1, |_| Ok(())));
    let one = NonZeroUsize::new(1).unwrap();
    let options = LoaderOptions {
        global_batch: 50,
        micro_batch: MicroBatch::Size(one),
        queue_batches: 2,
        ..options(2)
    };
    let mut loader = Loader::new(samples, options).unwrap();
    let step = loader.next_step().unwrap();
    assert_eq!(step.micro_batches.len(), 50);
    assert!(step.micro_batches.iter().zip(0_i64..).all(|(batch, at)| batch.input_ids() == [at]));
}

#[test]
fn the_memory_of_dropped_batches_is_used_again() {
    let folder = tempfile::tempdir().unwrap();
    let target = folder.path().join("tokens");
    write_tokens(&target, 60, 500, 1 << 20);
    let loader_options = LoaderOptions { queue_batches: 3, ..options(2) };
    let mut loader = Loader::new(open(&target, 34), loader_options).unwrap();
    let mut addresses = Vec::new();
    for _ in 0..200 {
        let step = loader.next_step().unwrap();
        addresses.push(step.micro_batches[0].input_ids().as_ptr().addr());
    }
    addresses.sort_unstable();
    addresses.dedup();
    // 3 in the queue, 1 here, and 1 in the hands of each thread.
    assert!(addresses.len() <= 6, "{} buffers for 200 batches", addresses.len());
}

#[test]
fn waiting_for_data_is_reported() {
    let slow = Duration::from_millis(5);
    let script = move |_| {
        let until = Instant::now() + slow;
        while Instant::now() < until {
            std::thread::park_timeout(slow);
        }
        Ok(())
    };
    let samples = Arc::new(Scripted::new(400, 1, script));
    for threads in [0, 1] {
        let samples = Arc::clone(&samples);
        let mut loader = Loader::new(samples, options(threads)).unwrap();
        // A thread of its own builds while this one, for all we know, does not run: one of many steps will have waited.
        let has_waited = (0..100).any(|_| {
            let started = Instant::now();
            let wait = loader.next_step().unwrap().data_wait;
            assert!(wait <= started.elapsed(), "{threads} threads: {wait:?}");
            wait >= slow * 3
        });
        assert!(has_waited, "{threads} threads");
    }
}

#[test]
fn dropping_a_loader_ends_its_threads() {
    let ended = Arc::new(AtomicBool::new(false));
    struct Tell(Arc<AtomicBool>);
    impl Drop for Tell {
        fn drop(&mut self) {
            self.0.store(true, Ordering::SeqCst);
        }
    }
    let tell = Tell(Arc::clone(&ended));
    let script = move |_| {
        let _held_by_the_samples = &tell;
        Ok(())
    };
    let samples = Arc::new(Scripted::new(400, 1, script));
    let mut loader = Loader::new(samples, options(3)).unwrap();
    loader.next_step().unwrap();
    drop(loader);
    assert!(ended.load(Ordering::SeqCst), "the threads held the samples");
}

#[test]
fn options_that_cannot_work_are_refused() {
    let samples = || Arc::new(Scripted::new(10, 1, |_| Ok(())));
    let refused = |options| Loader::new(samples(), options).unwrap_err().to_string();
    let error = refused(LoaderOptions { global_batch: 11, ..options(1) });
    assert!(error.contains("10 samples, fewer than the global batch of 11"), "{error}");
    assert!(refused(LoaderOptions { global_batch: 0, ..options(1) }).contains("at least one"));
    assert!(refused(LoaderOptions { rank: 2, world_size: 2, ..options(1) }).contains("world size"));
    assert!(refused(LoaderOptions { world_size: 5, ..options(1) }).contains("5 ranks need"));
    assert!(refused(LoaderOptions { queue_batches: 0, ..options(1) }).contains("queue_batches"));
}

/// What a panic carries, and what panics when it is thrown away.
struct Bomb;

impl Drop for Bomb {
    fn drop(&mut self) {
        assert!(std::thread::panicking(), "the bomb goes off");
    }
}

#[test]
fn a_thread_that_dies_between_two_batches_is_an_error_and_no_time_out() {
    let script = |sample: phalanx_data::order::Sample| match sample.id {
        21 => std::panic::panic_any(Bomb),
        _ => Ok(()),
    };
    let mut loader = Loader::new(Arc::new(Scripted::new(400, 1, script)), options(1)).unwrap();
    let error = (0..10).find_map(|_| loader.next_step().err()).unwrap();
    assert!(matches!(error, Error::WorkerPanicked { .. }), "{error}");
}
