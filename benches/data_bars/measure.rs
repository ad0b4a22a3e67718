//! The loader against the clock.

use std::sync::Arc;
use std::time::{Duration, Instant};

use phalanx::data::{Loader, LoaderOptions, Samples};
use phalanx::ddp::feed::Feed;
use tch::Device;

use super::corpus::Corpus;
use super::processor::{on_processor, paced};

/// Sequences of a batch.
pub(crate) const BATCH: usize = 32;
/// How long a figure is measured, once; the best of [`RUNS`] counts.
pub(crate) const SECONDS: f64 = 1.0;
const RUNS: usize = 4;
/// Of a batch, at 1 000 sequences a second.
const PERIOD: Duration = Duration::from_millis(32);

/// Sequences a second.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Rate {
    /// By the clock.
    pub(crate) wall: f64,
    /// Of the time for which the calling thread had a processor; `None` where others work for it.
    pub(crate) busy: Option<f64>,
}

impl Rate {
    pub(crate) fn keep_best(&mut self, other: Rate) {
        self.wall = self.wall.max(other.wall);
        self.busy = other.busy.map(|busy| busy.max(self.busy.unwrap_or(0.0)));
    }
}

/// Runs `step`, which gives the sequences of a step, over and over.
fn rate(
    threads: usize,
    seconds: f64,
    mut step: impl FnMut() -> anyhow::Result<usize>,
) -> anyhow::Result<Rate> {
    let mut best = Rate { wall: 0.0, busy: (threads == 0).then_some(0.0) };
    for run in 0..=RUNS {
        let (started, before, mut done) = (Instant::now(), on_processor()?, 0);
        while started.elapsed().as_secs_f64() < seconds {
            // The clock is asked seldom.
            for _ in 0..16 {
                done += step()?;
            }
        }
        let (elapsed, busy) = (started.elapsed().as_secs_f64(), on_processor()? - before);
        #[expect(clippy::cast_precision_loss, reason = "a rate")]
        let rate = Rate {
            wall: done as f64 / elapsed,
            busy: (threads == 0).then_some(done as f64 / busy.max(1e-9)),
        };
        // The first run touches everything for the first time.
        if run > 0 {
            best.keep_best(rate);
        }
    }
    Ok(best)
}

fn options(threads: usize) -> LoaderOptions {
    LoaderOptions { global_batch: BATCH, threads, ..Default::default() }
}

pub(crate) fn batches(
    samples: &Arc<dyn Samples>,
    threads: usize,
    seconds: f64,
) -> anyhow::Result<Rate> {
    let mut loader = Loader::new(Arc::clone(samples), options(threads))?;
    rate(threads, seconds, || {
        let step = loader.next_step()?;
        std::hint::black_box(step.micro_batches[0].input_ids());
        Ok(BATCH)
    })
}

pub(crate) fn tensors(
    samples: &Arc<dyn Samples>,
    threads: usize,
    seconds: f64,
) -> anyhow::Result<Rate> {
    let mut feed = Feed::new(Arc::clone(samples), options(threads), Device::Cpu)?;
    rate(threads, seconds, || {
        let step = feed.next_step()?;
        std::hint::black_box(&step.micro_batches[0]);
        Ok(BATCH)
    })
}

/// Bytes a second that so many threads read and write together, each in memory of its own.
pub(crate) fn copying(threads: usize, seconds: f64) -> anyhow::Result<f64> {
    const BYTES: usize = 64 << 20;
    let copy = || {
        let (from, mut to) = (vec![1_u8; BYTES], vec![0_u8; BYTES]);
        let mut best = 0.0_f64;
        for _ in 0..=RUNS {
            let (started, mut copied) = (Instant::now(), 0.0);
            while started.elapsed().as_secs_f64() < seconds / 2.0 {
                to.copy_from_slice(std::hint::black_box(&from));
                std::hint::black_box(&mut to);
                copied += 2.0 * 67_108_864.0;
            }
            best = best.max(copied / started.elapsed().as_secs_f64());
        }
        best
    };
    let joined = std::thread::scope(|scope| {
        let all: Vec<_> = (0..threads).map(|_| scope.spawn(copy)).collect();
        all.into_iter().map(std::thread::ScopedJoinHandle::join).collect::<Vec<_>>()
    });
    let mut sum = 0.0;
    for bytes in joined {
        sum += bytes.map_err(|_panic| anyhow::anyhow!("a thread that copies panicked"))?;
    }
    Ok(sum)
}

/// Milliseconds from opening the folder to the first batch, and where a run at 99 % of an epoch goes on: medians, and the medians of
/// the time on a processor.
pub(crate) fn prompt(corpus: &Corpus) -> anyhow::Result<[(f64, f64); 2]> {
    let mut state = Loader::new(corpus.masked()?, options(0))?.state();
    let count = corpus.masked()?.sample_count();
    let mut times = [(Vec::new(), Vec::new()), (Vec::new(), Vec::new())];
    for _ in 0..21 {
        for (place, (wall, busy)) in [0, count / 100 * 99].into_iter().zip(&mut times) {
            state.next_global_sample = place;
            let (started, before) = (Instant::now(), on_processor()?);
            let mut loader = Loader::resume(corpus.masked()?, options(0), &state)?;
            drop(loader.next_step()?);
            wall.push(started.elapsed().as_secs_f64() * 1e3);
            busy.push((on_processor()? - before) * 1e3);
        }
    }
    let median = |mut all: Vec<f64>| {
        all.sort_by(f64::total_cmp);
        all[all.len() / 2]
    };
    Ok(times.map(|(wall, busy)| (median(wall), median(busy))))
}

/// Per cent by which an epoch takes more processor time than later ones: the first, and the second. The least of five folders
/// that are opened anew.
pub(crate) fn first_touch(corpus: &Corpus) -> anyhow::Result<[f64; 2]> {
    let mut least = [f64::INFINITY; 2];
    for _ in 0..5 {
        let mut loader = Loader::new(corpus.raw()?, options(0))?;
        let steps = loader.steps_per_epoch();
        let mut times = [0.0; 5];
        for time in &mut times {
            let before = on_processor()?;
            for _ in 0..steps {
                drop(loader.next_step()?);
            }
            *time = on_processor()? - before;
        }
        let later = times[2..].iter().copied().fold(f64::INFINITY, f64::min);
        for (best, time) in least.iter_mut().zip(times) {
            *best = best.min((1.0 - later / time) * 100.0);
        }
    }
    Ok(least)
}

/// Per cent of a processor that all threads take to deliver 1 000 sequences a second, beyond what a caller takes that only waits.
pub(crate) fn pacing(corpus: &Corpus, seconds: f64) -> anyhow::Result<f64> {
    let mut loader = Loader::new(corpus.masked()?, options(1))?;
    // What is read for the first time is no part of it.
    for _ in 0..loader.steps_per_epoch() {
        drop(loader.next_step()?);
    }
    let with = paced(seconds, PERIOD, || {
        drop(loader.next_step()?);
        Ok(())
    })?;
    drop(loader);
    Ok(with - paced(seconds, PERIOD, || Ok(()))?)
}
