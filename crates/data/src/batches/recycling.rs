//! The memory of batches, which is used again and again.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use super::batch::Batch;
use super::column::Column;
use super::memory::{Allocator, ColumnBuffer};
use crate::error::Result;
use crate::order::Sample;

/// The memory of a batch.
#[derive(Debug, Default)]
pub(crate) struct BatchStorage {
    pub(crate) blocks: Vec<Option<Box<dyn ColumnBuffer>>>,
    pub(crate) samples: Vec<Sample>,
    pub(crate) valid: Vec<bool>,
    pub(crate) counted: Counted,
    /// Bytes that its rows need, of those that its blocks have.
    needed: usize,
}

impl BatchStorage {
    fn bytes(&self) -> usize {
        self.blocks.iter().flatten().map(|block| block.bytes().len()).sum()
    }
}

/// What was counted while rows were filled.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Counted {
    /// The rows whose labels were counted.
    pub(crate) rows: usize,
    pub(crate) labels: usize,
}

/// How much of what was dropped is kept.
#[derive(Clone, Copy, Debug)]
pub(crate) struct PoolLimits {
    /// The memory of so many batches at most.
    pub(crate) batches: usize,
    /// Bytes of padded rows that are kept beside what batches in use and one more step need: blocks
    /// grow to the longest row that ever came.
    pub(crate) bytes: usize,
}

/// Takes back the memory of dropped batches.
#[derive(Debug)]
pub(crate) struct BatchPool {
    columns: Arc<[Column]>,
    memory: Arc<dyn Allocator>,
    keep: PoolLimits,
    has_padded: bool,
    free: Mutex<Vec<BatchStorage>>,
    /// Bytes of all blocks there are, in batches and free.
    held: AtomicUsize,
    /// Bytes that the rows of all batches in use need.
    needed: AtomicUsize,
    /// What the rows of the last step needed: its batches come back all at once, and the next step
    /// needs about as much.
    step: AtomicUsize,
    /// The lists of steps that were dropped.
    lists: Mutex<Vec<Vec<Batch>>>,
}

impl BatchPool {
    /// A pool for batches of these columns.
    pub(crate) fn new(
        columns: Arc<[Column]>,
        memory: Arc<dyn Allocator>,
        keep: PoolLimits,
    ) -> Arc<Self> {
        let free = Mutex::new(Vec::with_capacity(keep.batches));
        let has_padded = columns.iter().any(|column| column.padded);
        let [held, needed, step] = [(); 3].map(|()| AtomicUsize::new(0));
        let lists = Mutex::default();
        Arc::new(BatchPool { columns, memory, keep, has_padded, free, held, needed, step, lists })
    }

    pub(crate) fn columns(&self) -> &Arc<[Column]> {
        &self.columns
    }

    pub(crate) fn take(&self) -> BatchStorage {
        self.free.lock().unwrap_or_else(PoisonError::into_inner).pop().unwrap_or_default()
    }

    /// A block of at least `bytes` bytes in the place of one that is too small.
    pub(crate) fn replace(
        &self,
        block: &mut Option<Box<dyn ColumnBuffer>>,
        bytes: usize,
    ) -> Result<()> {
        if let Some(old) = block.take() {
            self.held.fetch_sub(old.bytes().len(), Ordering::Relaxed);
        }
        let new = self.memory.allocate(bytes)?;
        self.held.fetch_add(new.bytes().len(), Ordering::Relaxed);
        *block = Some(new);
        Ok(())
    }

    /// The rows of a batch need so many bytes.
    pub(crate) fn use_bytes(&self, parts: &mut BatchStorage, bytes: usize) {
        self.needed.fetch_add(bytes, Ordering::Relaxed);
        self.needed.fetch_sub(std::mem::replace(&mut parts.needed, bytes), Ordering::Relaxed);
    }

    /// The rows of a step that is delivered need so many bytes.
    pub(crate) fn note_step(&self, bytes: usize) {
        self.step.store(bytes, Ordering::Relaxed);
    }

    /// Takes back what a batch had.
    pub(crate) fn give(&self, mut parts: BatchStorage) {
        self.use_bytes(&mut parts, 0);
        let frees = self.has_padded && self.holds_too_much();
        let mut free = self.free.lock().unwrap_or_else(PoisonError::into_inner);
        if frees || free.len() >= self.keep.batches {
            self.held.fetch_sub(parts.bytes(), Ordering::Relaxed);
            parts.blocks.clear();
        }
        if free.len() < self.keep.batches {
            // Batches are taken from the end: those that have memory come first.
            let at = if frees { 0 } else { free.len() };
            free.insert(at, parts);
        }
    }

    /// Whether more is held than is needed, half as much again (which blocks of padded rows have at
    /// first), and what may be kept beside.
    fn holds_too_much(&self) -> bool {
        let [held, needed, step] =
            [&self.held, &self.needed, &self.step].map(|bytes| bytes.load(Ordering::Relaxed));
        let needed = needed.saturating_add(step);
        held > needed.saturating_add(needed / 2).saturating_add(self.keep.bytes)
    }

    /// A list for the batches of a step.
    pub(crate) fn list(&self) -> Vec<Batch> {
        self.lists.lock().unwrap_or_else(PoisonError::into_inner).pop().unwrap_or_default()
    }

    pub(crate) fn give_list(&self, mut list: Vec<Batch>) {
        list.clear();
        let mut lists = self.lists.lock().unwrap_or_else(PoisonError::into_inner);
        // A caller holds one step, seldom two.
        if lists.len() < 4 {
            lists.push(list);
        }
    }
}
