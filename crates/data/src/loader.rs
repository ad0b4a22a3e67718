//! [`Loader`]: this rank's batches, step after step, built ahead by threads.

use std::fmt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::agreement::Agreement;
use crate::ahead::{Ahead, Asking};
use crate::batch::{Batch, Column};
use crate::bucketing;
use crate::cast::to_u64;
use crate::damage::{Holes, OnDamage};
use crate::error::{Error, Result};
use crate::memory::{HostMemory, Memory};
use crate::micro_batches::MicroBatches;
use crate::order::{Order, Tail};
use crate::permutation;
use crate::plan::{Builder, Job, LeftOut, Plan};
use crate::prefetch::{left, Bounds, Prefetcher};
use crate::recycling::{Keep, Pool};
use crate::sampler::{Position, Sampler};
use crate::samples::Samples;
use crate::slice::{MicroBatch, RankSlice};
use crate::state::{Buckets, LoaderState};

/// What a [`Loader`] delivers, and how.
#[derive(Clone, Debug)]
pub struct LoaderOptions {
    /// Seed of order and masks. The same on every rank.
    pub seed: u64,
    /// The order of an epoch. The same on every rank.
    pub order: Order,
    /// What happens at the end of an epoch. The same on every rank.
    pub tail: Tail,
    /// The data ends after so many epochs; `None`: epoch follows epoch. The same on every rank.
    pub epochs: Option<u64>,
    /// Samples of similar length come together: so many global batches are sorted by length. 0: they are not. The same on
    /// every rank. Needs samples that know their length, and another tail than [`Tail::Wrap`].
    pub bucketing: u64,
    /// Samples that all ranks compute together in a step. The same on every rank.
    pub global_batch: usize,
    /// A state of other data is gone on from: [`Loader::resume`] keeps its epoch and place, and does not know which of the samples were
    /// seen. Otherwise that is an error.
    pub allow_dataset_change: bool,
    /// What is done about data that is known to be damaged. The same on every rank.
    pub on_damage: OnDamage,
    /// How this rank's slice is cut.
    pub micro_batch: MicroBatch,
    /// This rank.
    pub rank: usize,
    /// How many ranks there are.
    pub world_size: usize,
    /// Threads that build batches ahead. 0: they are built when they are asked for, by who asks. An order in blocks has one more, which
    /// asks for the next blocks from the disk.
    pub threads: usize,
    /// At most so many micro-batches wait in the queue.
    pub queue_batches: usize,
    /// About so many bytes of micro-batches wait in the queue; a single larger one is let through. Padded rows are as long as they come:
    /// a batch that is being made counts as those before it were on average, and so each thread may add one batch to these bytes.
    /// As much memory of padded rows is kept beside what is in use.
    pub queue_bytes: usize,
    /// Where the memory of batches comes from.
    pub memory: Arc<dyn Memory>,
    /// How long to wait for the batches of a step before that is an error.
    pub timeout: Duration,
}

impl Default for LoaderOptions {
    fn default() -> Self {
        LoaderOptions {
            seed: 0,
            order: Order::default(),
            tail: Tail::default(),
            epochs: None,
            bucketing: 0,
            global_batch: 32,
            allow_dataset_change: false,
            on_damage: OnDamage::default(),
            micro_batch: MicroBatch::default(),
            rank: 0,
            world_size: 1,
            threads: 1,
            queue_batches: 8,
            queue_bytes: 256 << 20,
            memory: Arc::new(HostMemory),
            timeout: Duration::from_secs(60),
        }
    }
}

impl LoaderOptions {
    fn buckets(&self) -> Option<Buckets> {
        let global_batch = to_u64(self.global_batch);
        (self.bucketing > 0).then_some(Buckets { batches: self.bucketing, global_batch })
    }

    /// Every sample exactly once over all ranks, in the data's order, and then the end ([`Error::EndOfData`]): for evaluation.
    /// All ranks have the same number of steps; ranks may differ by a sample in the last one, or have one that does not count.
    #[must_use]
    pub fn evaluation(global_batch: usize, rank: usize, world_size: usize) -> Self {
        LoaderOptions {
            order: Order::Sequential,
            tail: Tail::Exact,
            epochs: Some(1),
            global_batch,
            rank,
            world_size,
            ..Default::default()
        }
    }
}

/// This rank's part of a global batch.
#[derive(Debug)]
#[non_exhaustive]
pub struct Step {
    /// Where the global batch starts in the global order.
    pub start: Position,
    /// The micro-batches, in order; their rows are this rank's slice. Never empty.
    pub micro_batches: MicroBatches,
    /// How long the caller waited for them.
    pub data_wait: Duration,
    /// How many of this rank's rows count.
    pub valid: usize,
    /// How many rows of all ranks count.
    pub global_valid: usize,
    /// How many samples of all ranks were left out for damage ([`OnDamage::Skip`]). The same on every rank.
    pub left_out: usize,
    /// How many ranks share the global batch.
    pub world_size: usize,
}

impl Step {
    /// How many positions count in the loss, in all micro-batches.
    pub fn label_count(&self) -> usize {
        self.micro_batches.iter().map(Batch::label_count).sum()
    }

    /// What this rank's mean over its rows that count is to be multiplied by, so that the mean over ranks is the mean over all
    /// samples of the global batch: 1 unless ranks differ in rows, 0 for a rank without any that counts.
    #[expect(clippy::cast_precision_loss, reason = "rows of a batch are few")]
    pub fn weight(&self) -> f64 {
        (self.valid * self.world_size) as f64 / self.global_valid.max(1) as f64
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
    Caller(Box<Builder>),
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
    /// Rank, world size, batch sizes, tail and threads may differ from those of then; the global batch only without
    /// [`LoaderOptions::bucketing`].
    ///
    /// # Errors
    /// [`Error::StateMismatch`] if data (unless [`LoaderOptions::allow_dataset_change`] is set), seed, order or batches of similar length differ; and as [`Loader::new`].
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
            buckets: options.buckets(),
            version: permutation::VERSION,
            fingerprint: match options.allow_dataset_change {
                true => state.fingerprint,
                false => samples.fingerprint(),
            },
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
        let parts = samples.parts();
        let sampler = Sampler::mixed(&parts, global_batch, seed, order, tail)?;
        let sampler = sampler.with_epochs(options.epochs);
        // Checks both numbers.
        let slice = RankSlice::new(rank, world_size, global_batch)?.range();
        if options.queue_batches == 0 {
            return Err(Error::option("queue_batches", 0, "at least one batch must fit the queue"));
        }
        let position = sampler.start(position);
        if tail == Tail::Refuse && position.next_global_sample % to_u64(global_batch) != 0 {
            let reason = format!(
                "{} samples of the epoch are done, which are no global batches of {global_batch}: go on with the global batch of the run \
                 that saved it, or with another tail",
                position.next_global_sample
            );
            return Err(Error::option("tail", "refuse", reason));
        }
        if options.bucketing > 0 {
            bucketing::check(&sampler, tail == Tail::Wrap, options.bucketing, position)?;
        }
        // All that wait, all of the step that the caller holds and of the one that is collected, and one in each thread's hands.
        let micro_batches = options.micro_batch.count(slice.len());
        let live_max = options.queue_batches + 2 * micro_batches + options.threads;
        let columns: Arc<[Column]> = samples.columns().into();
        let keep = Keep { batches: live_max, bytes: options.queue_bytes };
        let pool = Pool::new(Arc::clone(&columns), Arc::clone(&options.memory), keep);
        let holes = match options.on_damage {
            OnDamage::Fail => Holes::default(),
            OnDamage::Skip => Holes::new(samples.damaged()?, samples.sample_count())?,
        };
        let asking = Asking::new(&sampler, options.epochs);
        let ahead = asking
            .map(|asking| Ahead::start(asking, Arc::clone(&samples), position))
            .transpose()?;
        let plan = Plan {
            samples,
            columns,
            sampler,
            seed,
            rank,
            world_size,
            micro_batch: options.micro_batch,
            bucketing: options.bucketing,
            epochs: options.epochs,
            pool,
            holes: Arc::new(holes),
            ahead: ahead.map(Arc::new),
        };
        let source = match options.threads {
            0 => Source::Caller(Box::new(plan.builder())),
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
    /// [`Error::Stopped`] with the first one's message. [`Error::EndOfData`] after the last epoch that was asked for.
    pub fn next_step(&mut self) -> Result<Step> {
        if self.is_at_end() {
            return Err(Error::EndOfData { epochs: self.options.epochs.unwrap_or(0) });
        }
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
        let mut batches = self.plan.pool.list();
        for micro in 0..self.plan.micro_batches(start) {
            batches.push(match &mut self.source {
                Source::Threads(threads) => threads.next(left(started, self.options.timeout))?,
                Source::Caller(builder) => self.plan.build(Job { start, micro }, builder)?,
            });
        }
        self.plan.pool.note_step(batches.iter().map(Batch::bytes).sum());
        let LeftOut { mine, all } = batches.first().map_or_else(LeftOut::default, |b| b.left_out);
        Ok(Step {
            start,
            micro_batches: MicroBatches::new(batches, &self.plan.pool),
            data_wait: started.elapsed(),
            valid: self.plan.valid(start) - mine,
            global_valid: self.plan.sampler.size(start).valid - all,
            left_out: all,
            world_size: self.plan.world_size,
        })
    }

    /// Whether the next step can be had without waiting: it was built ahead, or as much of it as the queue holds. What nobody builds
    /// ahead (the end, what comes after an error, all without threads) nobody has to wait for.
    pub fn is_next_ready(&self) -> bool {
        match &self.source {
            Source::Threads(threads) if !self.is_at_end() && self.failed.is_none() => {
                threads.has(self.plan.micro_batches(self.position))
            }
            _ => true,
        }
    }

    /// Whether all epochs that were asked for are over.
    pub fn is_at_end(&self) -> bool {
        self.plan.is_end(self.position)
    }

    /// The steps up to the end of the data, or to the first error.
    pub fn steps(&mut self) -> impl Iterator<Item = Result<Step>> + '_ {
        std::iter::from_fn(|| {
            let over = self.is_at_end() || self.failed.is_some();
            (!over).then(|| self.next_step())
        })
    }

    /// The place after the last step that was delivered. The same on every rank.
    pub fn state(&self) -> LoaderState {
        LoaderState {
            epoch: self.position.epoch,
            next_global_sample: self.position.next_global_sample,
            seed: self.options.seed,
            order: self.options.order,
            buckets: self.options.buckets(),
            version: permutation::VERSION,
            fingerprint: self.plan.samples.fingerprint(),
        }
    }

    /// What all ranks must have alike, so that their parts are of the same global batches: data, seed, order and its version, tail,
    /// epochs, batches, damaged samples and place. To be gathered and [compared](Agreement::compare).
    pub fn agreement(&self) -> Agreement {
        let LoaderOptions { seed, order, tail, epochs, global_batch, on_damage, .. } =
            &self.options;
        let Position { epoch, next_global_sample } = self.position;
        let samples = &self.plan.samples;
        let column = |column: &Column| {
            let Column { name, dtype, shape, padded } = column;
            format!("{name} {dtype} {shape:?}{}", if *padded { " padded" } else { "" })
        };
        let columns: Vec<String> = self.plan.columns.iter().map(column).collect();
        Agreement::of_rank(self.options.rank)
            .with("world size", self.options.world_size)
            .with("data", samples.fingerprint())
            .with("samples", samples.sample_count())
            .with("columns", columns.join(", "))
            .with("seed", seed)
            .with("order", order)
            .with("order's version", permutation::VERSION)
            .with("tail", format!("{tail:?}").to_lowercase())
            .with(
                "epochs",
                epochs.map_or_else(|| "endless".to_owned(), |epochs| epochs.to_string()),
            )
            .with("global batch", global_batch)
            .with("batches of similar length", self.options.bucketing)
            .with("on_damage", format!("{on_damage:?}").to_lowercase())
            .with("damaged samples", self.plan.holes.summary())
            .with("position", format!("epoch {epoch}, sample {next_global_sample}"))
    }

    /// How many steps an epoch has.
    pub fn steps_per_epoch(&self) -> u64 {
        self.plan.sampler.batches_per_epoch()
    }

    /// What a batch holds.
    pub fn columns(&self) -> &[Column] {
        &self.plan.columns
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
