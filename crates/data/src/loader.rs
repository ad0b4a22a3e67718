//! [`Loader`]: this rank's batches, step after step, built ahead by threads.

use std::fmt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::batch::{Batch, Pool};
use crate::error::{Error, Result};
use crate::permutation;
use crate::plan::{Job, Plan};
use crate::prefetch::{left, Bounds, Prefetcher};
use crate::sampler::{Order, Position, Sampler, Tail};
use crate::samples::{Samples, Scratch};
use crate::slice::{MicroBatch, RankSlice};
use crate::state::LoaderState;

/// What a [`Loader`] delivers, and how.
#[derive(Clone, Debug)]
pub struct LoaderOptions {
    /// Seed of order and masks. The same on every rank.
    pub seed: u64,
    /// The order of an epoch. The same on every rank.
    pub order: Order,
    /// What happens at the end of an epoch. The same on every rank.
    pub tail: Tail,
    /// Samples that all ranks compute together in a step. The same on every rank.
    pub global_batch: usize,
    /// How this rank's slice is cut.
    pub micro_batch: MicroBatch,
    /// This rank.
    pub rank: usize,
    /// How many ranks there are.
    pub world_size: usize,
    /// Threads that build batches ahead. 0: they are built when they are asked for, by who asks.
    pub threads: usize,
    /// At most so many micro-batches wait in the queue.
    pub queue_batches: usize,
    /// At most so many bytes of micro-batches wait in the queue; a single larger one is let through.
    pub queue_bytes: usize,
    /// How long to wait for the batches of a step before that is an error.
    pub timeout: Duration,
}

impl Default for LoaderOptions {
    fn default() -> Self {
        LoaderOptions {
            seed: 0,
            order: Order::default(),
            tail: Tail::default(),
            global_batch: 32,
            micro_batch: MicroBatch::default(),
            rank: 0,
            world_size: 1,
            threads: 1,
            queue_batches: 8,
            queue_bytes: 256 << 20,
            timeout: Duration::from_secs(60),
        }
    }
}

/// This rank's part of a global batch.
#[derive(Debug)]
pub struct Step {
    /// Where the global batch starts in the global order.
    pub start: Position,
    /// The micro-batches, in order; their rows are this rank's slice. Never empty.
    pub micro_batches: Vec<Batch>,
    /// How long the caller waited for them.
    pub data_wait: Duration,
}

impl Step {
    /// How many positions count in the loss, in all micro-batches.
    pub fn label_count(&self) -> usize {
        self.micro_batches.iter().map(Batch::label_count).sum()
    }
}

/// Delivers this rank's slice of each global batch, without end: epoch follows epoch.
///
/// # Determinism
/// What step n holds is a function of the data, seed, order, tail and global batch alone: the slices of all ranks joined are
/// the same for every world size, thread count and point of resuming.
pub struct Loader {
    plan: Plan,
    options: LoaderOptions,
    source: Source,
    /// Where the next step starts.
    position: Position,
    failed: Option<String>,
}

enum Source {
    Threads(Prefetcher),
    Caller(Scratch),
}

impl Loader {
    /// A loader from the beginning of the data.
    ///
    /// # Errors
    /// [`Error::TooFewSamples`] and [`Error::InvalidOption`].
    pub fn new(samples: Arc<dyn Samples>, options: LoaderOptions) -> Result<Self> {
        Self::start(samples, options, Position::default())
    }

    /// A loader that goes on where `state` was taken. Constant cost, wherever that was.
    ///
    /// Rank, world size, batch sizes, tail and threads may differ from those of then.
    ///
    /// # Errors
    /// [`Error::StateMismatch`] if data, seed or order differ; and as [`Loader::new`].
    pub fn resume(
        samples: Arc<dyn Samples>,
        options: LoaderOptions,
        state: &LoaderState,
    ) -> Result<Self> {
        let fresh = LoaderState {
            epoch: 0,
            next_global_sample: 0,
            seed: options.seed,
            order: options.order,
            version: permutation::VERSION,
            fingerprint: samples.fingerprint(),
        };
        state.check(&fresh)?;
        Self::start(samples, options, state.position())
    }

    /// A loader from any place of the order on.
    ///
    /// # Errors
    /// As [`Loader::new`].
    pub fn start(
        samples: Arc<dyn Samples>,
        options: LoaderOptions,
        position: Position,
    ) -> Result<Self> {
        let LoaderOptions { seed, order, tail, global_batch, rank, world_size, .. } = options;
        let sampler = Sampler::new(samples.sample_count(), global_batch, seed, order, tail)?;
        let slice = RankSlice::new(rank, world_size, global_batch)?.range();
        let micro_batches: Vec<_> = options
            .micro_batch
            .cut(slice.len())
            .into_iter()
            .map(|range| slice.start + range.start..slice.start + range.end)
            .collect();
        if options.queue_batches == 0 {
            return Err(Error::option("queue_batches", 0, "at least one batch must fit the queue"));
        }
        // All that wait, all of the step that the caller holds and of the one that is collected, and one in each thread's hands.
        let live_max = options.queue_batches + 2 * micro_batches.len() + options.threads;
        let position = sampler.start(position);
        let plan = Plan { samples, sampler, seed, micro_batches, pool: Pool::new(live_max) };
        let source = match options.threads {
            0 => Source::Caller(Scratch::default()),
            threads => {
                let bounds = Bounds { batches: options.queue_batches, bytes: options.queue_bytes };
                let first = Job { start: position, micro: 0 };
                Source::Threads(Prefetcher::start(plan.clone(), first, threads, bounds)?)
            }
        };
        Ok(Loader { plan, options, source, position, failed: None })
    }

    /// The next step. Waits at most the loader's timeout.
    ///
    /// # Errors
    /// What went wrong in reading a sample, [`Error::WorkerPanicked`], or [`Error::Timeout`]. After an error every call gives
    /// [`Error::Stopped`] with the first one's message.
    pub fn next_step(&mut self) -> Result<Step> {
        if let Some(first) = &self.failed {
            return Err(Error::Stopped { first: first.clone() });
        }
        let step = self.collect();
        match &step {
            Ok(_) => self.position = self.plan.sampler.after(self.position),
            Err(error) => self.failed = Some(error.to_string()),
        }
        step
    }

    fn collect(&mut self) -> Result<Step> {
        let (start, started) = (self.position, Instant::now());
        let count = self.plan.micro_batches.len();
        let mut micro_batches = Vec::with_capacity(count);
        for micro in 0..count {
            micro_batches.push(match &mut self.source {
                Source::Threads(threads) => threads.next(left(started, self.options.timeout))?,
                Source::Caller(scratch) => self.plan.build(Job { start, micro }, scratch)?,
            });
        }
        Ok(Step { start, micro_batches, data_wait: started.elapsed() })
    }

    /// The place after the last step that was delivered. The same on every rank.
    pub fn state(&self) -> LoaderState {
        LoaderState {
            epoch: self.position.epoch,
            next_global_sample: self.position.next_global_sample,
            seed: self.options.seed,
            order: self.options.order,
            version: permutation::VERSION,
            fingerprint: self.plan.samples.fingerprint(),
        }
    }

    /// How many steps an epoch has.
    pub fn steps_per_epoch(&self) -> u64 {
        self.plan.sampler.batches_per_epoch()
    }

    /// How many tokens a sample has.
    pub fn sequence_len(&self) -> usize {
        self.plan.samples.sequence_len()
    }

    /// The micro-batches of each step, as ranges within the global batch.
    pub fn micro_batches(&self) -> &[std::ops::Range<usize>] {
        &self.plan.micro_batches
    }
}

impl fmt::Debug for Loader {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Loader")
            .field("options", &self.options)
            .field("position", &self.position)
            .field("failed", &self.failed)
            .finish_non_exhaustive()
    }
}
