//! Batches, and the pool that their memory goes back to.

use std::sync::{Arc, Mutex, PoisonError};

use crate::sampler::Sample;
use crate::samples::Row;

/// The memory of a batch.
#[derive(Debug, Default)]
struct Buffers {
    input_ids: Vec<i64>,
    labels: Vec<i64>,
    attention_mask: Vec<i64>,
    samples: Vec<Sample>,
}

/// Takes back the memory of dropped batches.
#[derive(Debug)]
pub(crate) struct Pool {
    free: Mutex<Vec<Buffers>>,
    free_max: usize,
}

impl Pool {
    /// A pool that keeps the memory of at most `free_max` batches.
    pub(crate) fn new(free_max: usize) -> Arc<Self> {
        Arc::new(Pool { free: Mutex::new(Vec::with_capacity(free_max)), free_max })
    }

    fn take(&self) -> Buffers {
        self.free.lock().unwrap_or_else(PoisonError::into_inner).pop().unwrap_or_default()
    }

    fn give(&self, buffers: Buffers) {
        let mut free = self.free.lock().unwrap_or_else(PoisonError::into_inner);
        if free.len() < self.free_max {
            free.push(buffers);
        }
    }
}

/// What one rank computes at once: `rows` samples of `sequence_len` tokens, row after row.
///
/// Dropping it gives its memory back to the loader.
///
/// # Shapes
/// [`input_ids`](Self::input_ids), [`labels`](Self::labels) and [`attention_mask`](Self::attention_mask) are
/// `[rows, sequence_len]`.
#[derive(Debug)]
pub struct Batch {
    buffers: Buffers,
    sequence_len: usize,
    masked: bool,
    pool: Arc<Pool>,
}

impl Batch {
    /// A batch of zeros for `samples`, in memory from the pool.
    pub(crate) fn take(
        pool: &Arc<Pool>,
        sequence_len: usize,
        masked: bool,
        samples: impl Iterator<Item = Sample>,
    ) -> Self {
        let mut buffers = pool.take();
        buffers.samples.clear();
        buffers.samples.extend(samples);
        let len = buffers.samples.len() * sequence_len;
        buffers.input_ids.resize(len, 0);
        buffers.labels.resize(len, 0);
        buffers.attention_mask.resize(if masked { len } else { 0 }, 0);
        Batch { buffers, sequence_len, masked, pool: Arc::clone(pool) }
    }

    /// Memory of a batch of that shape.
    pub(crate) fn bytes(rows: usize, sequence_len: usize, masked: bool) -> usize {
        let columns = if masked { 3 } else { 2 };
        rows.saturating_mul(sequence_len).saturating_mul(columns * size_of::<i64>())
    }

    /// Token ids, row after row.
    pub fn input_ids(&self) -> &[i64] {
        &self.buffers.input_ids
    }

    /// Labels, row after row; [`IGNORED`](crate::IGNORED) where the loss does not look.
    pub fn labels(&self) -> &[i64] {
        &self.buffers.labels
    }

    /// 1 for tokens, 0 for padding. `None`: there is no padding.
    pub fn attention_mask(&self) -> Option<&[i64]> {
        self.masked.then_some(&self.buffers.attention_mask)
    }

    /// Which sample each row is.
    pub fn samples(&self) -> &[Sample] {
        &self.buffers.samples
    }

    /// How many samples.
    pub fn rows(&self) -> usize {
        self.buffers.samples.len()
    }

    /// How many tokens a sample has.
    pub fn sequence_len(&self) -> usize {
        self.sequence_len
    }

    /// `[rows, sequence_len]` as libtorch counts.
    ///
    /// # Panics
    /// Never: what is in memory fits `i64`.
    pub fn shape(&self) -> [i64; 2] {
        [self.rows(), self.sequence_len]
            .map(|size| i64::try_from(size).expect("a size in memory fits i64"))
    }

    /// How many positions count in the loss: the weight of this batch's mean loss.
    pub fn label_count(&self) -> usize {
        self.labels().iter().filter(|&&label| label != crate::IGNORED).count()
    }

    /// The samples and their rows, to be filled.
    pub(crate) fn rows_mut(&mut self) -> impl Iterator<Item = (Sample, Row<'_>)> {
        let len = self.sequence_len.max(1);
        let Buffers { input_ids, labels, attention_mask, samples } = &mut self.buffers;
        let mut masks = attention_mask.chunks_mut(len);
        samples.iter().zip(input_ids.chunks_mut(len).zip(labels.chunks_mut(len))).map(
            move |(&sample, (input_ids, labels))| {
                (sample, Row { input_ids, labels, attention_mask: masks.next() })
            },
        )
    }
}

impl Drop for Batch {
    fn drop(&mut self) {
        self.pool.give(std::mem::take(&mut self.buffers));
    }
}
