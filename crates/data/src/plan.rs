//! What one rank computes in each step, and how a batch of it is built: immutable, shared by all threads of a loader.

use std::ops::Range;
use std::sync::Arc;

use crate::batch::{Batch, Pool};
use crate::error::Result;
use crate::sampler::{Position, Sampler};
use crate::samples::{Samples, Scratch};

/// One micro-batch to be built: the `micro`-th of the global batch that starts at `start`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Job {
    pub(crate) start: Position,
    pub(crate) micro: usize,
}

#[derive(Clone)]
pub(crate) struct Plan {
    pub(crate) samples: Arc<dyn Samples>,
    pub(crate) sampler: Sampler,
    pub(crate) seed: u64,
    /// This rank's micro-batches, counted within the global batch. Not empty.
    pub(crate) micro_batches: Vec<Range<usize>>,
    pub(crate) pool: Arc<Pool>,
}

impl Plan {
    pub(crate) fn build(&self, job: Job, scratch: &mut Scratch) -> Result<Batch> {
        let range = self.micro_batches[job.micro].clone();
        let mut cursor = self.sampler.cursor();
        let samples = range.map(|index| cursor.sample(job.start, index));
        let masked = self.samples.has_attention_mask();
        let mut batch = Batch::take(&self.pool, self.samples.sequence_len(), masked, samples);
        for (sample, row) in batch.rows_mut() {
            self.samples.fill(sample, self.seed, row, scratch)?;
        }
        Ok(batch)
    }

    /// Memory of the batch that `job` will give.
    pub(crate) fn bytes(&self, job: Job) -> usize {
        let rows = self.micro_batches[job.micro].len();
        Batch::bytes(rows, self.samples.sequence_len(), self.samples.has_attention_mask())
    }

    /// The micro-batch after `job`: of the same global batch, or the first one of the next.
    pub(crate) fn after(&self, job: Job) -> Job {
        if job.micro + 1 < self.micro_batches.len() {
            Job { micro: job.micro + 1, ..job }
        } else {
            Job { start: self.sampler.after(job.start), micro: 0 }
        }
    }
}
