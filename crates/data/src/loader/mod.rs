//! This rank's batches, step after step, built ahead by threads: [`Loader`].
//!
//! Here belongs what happens while a run reads its data: which rows a rank builds when
//! (`plan.rs`), threads and their queue (`prefetch.rs`), what is asked for from the disk before
//! (`read_ahead.rs`), what is left out, what a checkpoint keeps, and what ranks must agree on.

mod agreement;
mod bucketing;
mod holes;
mod options;
mod plan;
mod prefetch;
mod read_ahead;
mod state;
mod wait_shares;

use std::fmt;
use std::sync::Arc;
use std::time::{Duration, Instant};

pub use agreement::Agreement;
use holes::Holes;
pub use options::{LoaderOptions, OnDamage};
use plan::{BatchBuilder, BatchPlan, MicroBatchJob};
use prefetch::{left, Bounds, Prefetcher};
use read_ahead::{Asking, ReadAhead};
pub use state::{Buckets, LoaderState};
pub use wait_shares::{SlowLoader, WaitShares};

use crate::batches::batch::LeftOut;
use crate::batches::recycling::{BatchPool, PoolLimits};
use crate::batches::{Batch, Column, MicroBatches};
use crate::cast::to_u64;
use crate::error::{Error, Result};
use crate::order::sampler::Sampler;
use crate::order::slice::rank_slice;
use crate::order::{permutation, Position, Tail};
use crate::samples::Samples;

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
    /// How many samples of all ranks were left out for damage ([`OnDamage::Skip`]). The same on
    /// every rank.
    pub left_out: usize,
    /// How many ranks share the global batch.
    pub world_size: usize,
}

impl Step {
    /// How many positions count in the loss, in all micro-batches.
    pub fn label_count(&self) -> usize {
        self.micro_batches.iter().map(Batch::label_count).sum()
    }

    /// What this rank's mean over its rows that count is to be multiplied by, so that the mean over
    /// ranks is the mean over all samples of the global batch: 1 unless ranks differ in rows, 0 for
    /// a rank without any that counts.
    #[expect(clippy::cast_precision_loss, reason = "rows of a batch are few")]
    pub fn weight(&self) -> f64 {
        (self.valid * self.world_size) as f64 / self.global_valid.max(1) as f64
    }
}

/// Delivers this rank's slice of each global batch, without end: epoch follows epoch.
///
/// # Determinism
/// What step n holds is a function of the data, seed, order, tail and global batch alone: the
/// slices of all ranks joined are the same for every world size, thread count and point of
/// resuming.
pub struct Loader {
    plan: BatchPlan,
    options: LoaderOptions,
    source: BatchSource,
    /// Where the next step starts.
    position: Position,
    failed: Option<String>,
}

enum BatchSource {
    Threads(Prefetcher),
    Caller(Box<BatchBuilder>),
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
    /// Rank, world size, batch sizes, tail and threads may differ from those of then; the global
    /// batch only without [`LoaderOptions::bucketing`].
    ///
    /// # Errors
    /// [`Error::StateMismatch`] if data (unless [`LoaderOptions::allow_dataset_change`] is set),
    /// seed, order or batches of similar length differ; and as [`Loader::new`].
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
    pub(crate) fn start(
        samples: Arc<dyn Samples>,
        options: LoaderOptions,
        position: Position,
    ) -> Result<Self> {
        let LoaderOptions { seed, order, tail, global_batch, rank, world_size, .. } = options;
        let parts = samples.parts();
        let sampler = Sampler::mixed(&parts, global_batch, seed, order, tail)?;
        let sampler = sampler.with_epochs(options.epochs);
        // Checks both numbers.
        let slice = rank_slice(rank, world_size, global_batch)?;
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
        // Batches that are alive at once: those in the queue, of the step that the caller holds and
        // of the one that is being collected, and one in the hands of each thread.
        let micro_batches = options.micro_batch.count(slice.len());
        let live_max = options.queue_batches + 2 * micro_batches + options.threads;
        let columns: Arc<[Column]> = samples.columns().into();
        let keep = PoolLimits { batches: live_max, bytes: options.queue_bytes };
        let pool = BatchPool::new(Arc::clone(&columns), Arc::clone(&options.memory), keep);
        let holes = match options.on_damage {
            OnDamage::Fail => Holes::default(),
            OnDamage::Skip => Holes::new(samples.damaged()?, samples.sample_count())?,
        };
        let asking = Asking::new(&sampler, options.epochs);
        let ahead = asking
            .map(|asking| ReadAhead::start(asking, Arc::clone(&samples), position))
            .transpose()?;
        let plan = BatchPlan {
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
            0 => BatchSource::Caller(Box::new(plan.builder())),
            threads => {
                let bounds = Bounds { batches: options.queue_batches, bytes: options.queue_bytes };
                let first = MicroBatchJob { start: position, micro: 0 };
                BatchSource::Threads(Prefetcher::start(plan.clone(), first, threads, bounds)?)
            }
        };
        Ok(Loader { plan, options, source, position, failed: None })
    }

    /// The next step. Waits at most the loader's timeout.
    ///
    /// # Errors
    /// What went wrong in reading a sample, [`Error::WorkerPanicked`], or [`Error::Timeout`]. After
    /// an error every call gives [`Error::Stopped`] with the first one's message.
    /// [`Error::EndOfData`] after the last epoch that was asked for.
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
                BatchSource::Threads(threads) => {
                    threads.next(left(started, self.options.timeout))?
                }
                BatchSource::Caller(builder) => {
                    self.plan.build(MicroBatchJob { start, micro }, builder)?
                }
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

    /// Whether the next step can be had without waiting: it was built ahead, or as much of it as
    /// the queue holds. `true` also where nothing is built ahead: at the end, after an error,
    /// without threads.
    pub fn is_next_ready(&self) -> bool {
        match &self.source {
            BatchSource::Threads(threads) if !self.is_at_end() && self.failed.is_none() => {
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

    /// What all ranks must have alike, so that their parts are of the same global batches: data,
    /// seed, order and its version, tail, epochs, batches, damaged samples and place. To be
    /// gathered and [compared](Agreement::compare).
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
