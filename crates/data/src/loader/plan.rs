//! What one rank computes in each step, and how a batch of it is built: immutable, shared by all
//! threads of a loader.

use std::ops::Range;
use std::sync::Arc;

use super::bucketing::BucketWindow;
use super::holes::Holes;
use super::read_ahead::ReadAhead;
use crate::batches::batch::LeftOut;
use crate::batches::column::bytes_max;
use crate::batches::recycling::BatchPool;
use crate::batches::{Batch, Column, Scratch};
use crate::error::Result;
use crate::order::sampler::{Cursor, Sampler};
use crate::order::slice::part;
use crate::order::{MicroBatch, Position, Sample};
use crate::samples::Samples;

/// One micro-batch to be built: the `micro`-th of this rank in the global batch that starts at
/// `start`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct MicroBatchJob {
    pub(crate) start: Position,
    pub(crate) micro: usize,
}

#[derive(Clone)]
pub(crate) struct BatchPlan {
    pub(crate) samples: Arc<dyn Samples>,
    pub(crate) columns: Arc<[Column]>,
    pub(crate) sampler: Sampler,
    pub(crate) seed: u64,
    pub(crate) rank: usize,
    pub(crate) world_size: usize,
    pub(crate) micro_batch: MicroBatch,
    /// Global batches of a window of similar lengths; 0: none.
    pub(crate) bucketing: u64,
    /// There is nothing after so many epochs.
    pub(crate) epochs: Option<u64>,
    pub(crate) pool: Arc<BatchPool>,
    /// Samples that are left out.
    pub(crate) holes: Arc<Holes>,
    /// What is asked for from the disk before it is read.
    pub(crate) ahead: Option<Arc<ReadAhead>>,
}

/// Batches that were built.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Built {
    pub(crate) rows: usize,
    pub(crate) bytes: usize,
}

impl Built {
    pub(crate) fn add(&mut self, batch: &Batch) {
        self.rows = self.rows.saturating_add(batch.rows());
        self.bytes = self.bytes.saturating_add(batch.bytes());
    }
}

/// What a thread that builds batches keeps.
#[derive(Debug)]
pub(crate) struct BatchBuilder {
    cursor: Cursor,
    window: BucketWindow,
    scratch: Scratch,
}

impl BatchPlan {
    pub(crate) fn builder(&self) -> BatchBuilder {
        BatchBuilder {
            cursor: self.sampler.cursor(),
            window: BucketWindow::default(),
            scratch: Scratch::default(),
        }
    }

    /// This rank's rows of a global batch. It may be that there are none.
    pub(crate) fn slice(&self, start: Position) -> Range<usize> {
        part(self.sampler.size(start).rows, self.rank, self.world_size)
    }

    /// How many of this rank's rows count.
    pub(crate) fn valid(&self, start: Position) -> usize {
        let (slice, valid) = (self.slice(start), self.sampler.size(start).valid);
        slice.end.min(valid).saturating_sub(slice.start)
    }

    /// Which samples stand in the rows of a global batch, whether or not they are left out.
    fn order<'a>(
        &self,
        start: Position,
        (cursor, window): (&'a mut Cursor, &'a mut BucketWindow),
        scratch: &mut Scratch,
    ) -> Result<impl FnMut(usize) -> Sample + 'a> {
        let sorted = match self.bucketing {
            0 => None,
            batches => {
                let data = (&*self.samples, &*self.holes, scratch);
                window.batch((&self.sampler, &mut *cursor), batches, start, data)?
            }
        };
        Ok(move |row: usize| match sorted.and_then(|sorted| sorted.get(row)) {
            Some(&(_, sample)) => sample,
            None => cursor.sample(start, row),
        })
    }

    /// Counts the first `valid` rows of a global batch that are left out.
    fn left_out(
        &self,
        start: Position,
        valid: usize,
        mut sample_at: impl FnMut(usize) -> Sample,
    ) -> LeftOut {
        let (slice, mut count) = (self.slice(start), LeftOut::default());
        if self.holes.is_empty() {
            return count;
        }
        for row in 0..valid {
            if self.holes.instead(sample_at(row).id).is_some() {
                count.mine += usize::from(slice.contains(&row));
                count.all += 1;
            }
        }
        count
    }

    /// How many micro-batches a step has: at least one.
    pub(crate) fn micro_batches(&self, start: Position) -> usize {
        self.micro_batch.count(self.slice(start).len()).max(1)
    }

    /// A micro-batch's rows, counted within the global batch.
    fn rows(&self, job: MicroBatchJob) -> Range<usize> {
        let slice = self.slice(job.start);
        let within = self.micro_batch.nth(slice.len(), job.micro);
        slice.start + within.start..slice.start + within.end
    }

    pub(crate) fn build(&self, job: MicroBatchJob, builder: &mut BatchBuilder) -> Result<Batch> {
        let BatchBuilder { cursor, window, scratch } = builder;
        let (start, mut rows) = (job.start, self.rows(job));
        if let Some(ahead) = &self.ahead {
            ahead.reach(start);
        }
        let mut sample_at = self.order(start, (cursor, window), scratch)?;
        let mut valid = self.sampler.size(start).valid;
        let left_out = match job.micro {
            0 => self.left_out(start, valid, &mut sample_at),
            _ => LeftOut::default(),
        };
        if rows.is_empty() {
            // This rank has nothing, and goes through the step with a row that does not count.
            (rows, valid) = (0..1, 0);
        }
        let samples = rows.map(|index| {
            let sample = sample_at(index);
            match self.holes.instead(sample.id) {
                None => (sample, index < valid),
                Some(id) => (Sample { id, ..sample }, false),
            }
        });
        let mut batch = Batch::take(&self.pool, samples);
        batch.left_out = left_out;
        let mut longest = 0;
        if self.columns.iter().any(|column| column.padded) {
            for sample in batch.samples() {
                longest = longest.max(self.samples.sample_len(sample.id, scratch)?);
            }
        }
        batch.shape_for(longest)?;
        self.samples.fill(self.seed, &mut batch.rows_mut(), scratch)?;
        Ok(batch)
    }

    /// Bytes of the batch that `job` will give: at most, and, if rows differ in length, what they
    /// were on average in those that were built.
    pub(crate) fn bytes(&self, job: MicroBatchJob, built: Built) -> usize {
        let rows = self.rows(job).len().max(1);
        let max = bytes_max(&self.columns, rows);
        let row = built.bytes.checked_div(built.rows);
        row.map_or(max, |row| max.min(row.saturating_mul(rows)))
    }

    /// The micro-batch after `job`: of the same global batch, or the first one of the next.
    pub(crate) fn after(&self, job: MicroBatchJob) -> MicroBatchJob {
        if job.micro + 1 < self.micro_batches(job.start) {
            MicroBatchJob { micro: job.micro + 1, ..job }
        } else {
            MicroBatchJob { start: self.sampler.after(job.start), micro: 0 }
        }
    }

    /// Whether nothing comes at or after a place.
    pub(crate) fn is_end(&self, start: Position) -> bool {
        self.epochs.is_some_and(|epochs| self.sampler.start(start).epoch >= epochs)
    }
}
