//! The micro-batches of a step: a list whose memory goes back to the loader.

use std::sync::Arc;

use super::batch::Batch;
use super::recycling::BatchPool;

/// The micro-batches of a step. They are read as a slice, or taken one after the other.
#[derive(Debug)]
pub struct MicroBatches {
    batches: Vec<Batch>,
    pool: Arc<BatchPool>,
}

impl MicroBatches {
    pub(crate) fn new(batches: Vec<Batch>, pool: &Arc<BatchPool>) -> Self {
        MicroBatches { batches, pool: Arc::clone(pool) }
    }
}

impl std::ops::Deref for MicroBatches {
    type Target = [Batch];

    fn deref(&self) -> &[Batch] {
        &self.batches
    }
}

impl Drop for MicroBatches {
    fn drop(&mut self) {
        self.pool.give_list(std::mem::take(&mut self.batches));
    }
}

/// Takes micro-batches off a step, in order.
#[derive(Debug)]
pub struct IntoBatches {
    /// The first one last.
    reversed: MicroBatches,
}

impl Iterator for IntoBatches {
    type Item = Batch;

    fn next(&mut self) -> Option<Batch> {
        self.reversed.batches.pop()
    }

    fn size_hint(&self) -> (usize, Option<usize>) {
        let len = self.reversed.batches.len();
        (len, Some(len))
    }
}

impl ExactSizeIterator for IntoBatches {}

impl IntoIterator for MicroBatches {
    type Item = Batch;
    type IntoIter = IntoBatches;

    fn into_iter(mut self) -> IntoBatches {
        self.batches.reverse();
        IntoBatches { reversed: self }
    }
}

impl<'a> IntoIterator for &'a MicroBatches {
    type Item = &'a Batch;
    type IntoIter = std::slice::Iter<'a, Batch>;

    fn into_iter(self) -> Self::IntoIter {
        self.batches.iter()
    }
}
