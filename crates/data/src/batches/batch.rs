//! [`Batch`]: rows of named, typed columns, whose memory goes back to a pool.

use std::sync::Arc;

use super::column::{longest_max, Column};
use super::dtype::Element;
use super::memory::ColumnBuffer;
use super::recycling::{BatchPool, BatchStorage, Counted};
use super::rows::{find, misaligned, Rows};
use crate::error::Result;
use crate::order::Sample;

/// The label of positions that do not count in the loss (PyTorch's `ignore_index`).
pub const IGNORED: i64 = -100;

/// Samples of a global batch that are left out.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct LeftOut {
    /// Of this rank's rows.
    pub(crate) mine: usize,
    /// Of all ranks' rows.
    pub(crate) all: usize,
}

/// What one rank computes at once: rows of named columns.
///
/// Dropping it gives its memory back to the loader.
#[derive(Debug)]
pub struct Batch {
    parts: BatchStorage,
    longest: usize,
    /// Of the global batch whose first micro-batch this is.
    pub(crate) left_out: LeftOut,
    pool: Arc<BatchPool>,
}

impl Batch {
    /// A batch for `samples`, of which the last ones may not count. Its memory holds old values.
    pub(crate) fn take(
        pool: &Arc<BatchPool>,
        samples: impl Iterator<Item = (Sample, bool)>,
    ) -> Self {
        let mut parts = pool.take();
        parts.samples.clear();
        parts.valid.clear();
        parts.counted = Counted::default();
        for (sample, valid) in samples {
            parts.samples.push(sample);
            parts.valid.push(valid);
        }
        Batch { parts, longest: 0, left_out: LeftOut::default(), pool: Arc::clone(pool) }
    }

    /// Sets how long the rows of padded columns are, and gets memory where there is too little.
    pub(crate) fn shape_for(&mut self, longest: usize) -> Result<()> {
        let rows = self.rows();
        let columns = self.shared_columns();
        self.longest = longest.min(longest_max(&columns));
        self.parts.blocks.resize_with(columns.len(), || None);
        for (block, column) in self.parts.blocks.iter_mut().zip(columns.iter()) {
            let bytes = column.row_bytes(self.longest).saturating_mul(rows);
            let has = block.as_ref().map_or(0, |block| block.bytes().len());
            if has < bytes || block.is_none() {
                // Padded rows differ in length from batch to batch: half as much again is
                // allocated, so that a longer one fits as well.
                let largest = column.row_bytes_max().saturating_mul(rows);
                let bytes = if column.padded { (bytes + bytes / 2).min(largest) } else { bytes };
                self.pool.replace(block, bytes)?;
            }
        }
        let needed = self.bytes();
        self.pool.use_bytes(&mut self.parts, needed);
        Ok(())
    }

    /// The columns there are.
    pub fn columns(&self) -> &[Column] {
        self.pool.columns()
    }

    /// The same, shared by all batches of a loader.
    pub fn shared_columns(&self) -> Arc<[Column]> {
        Arc::clone(self.pool.columns())
    }

    /// The elements of a column, row after row: `[rows, …shape of a row]`.
    ///
    /// # Errors
    /// [`Error::NoColumn`](crate::Error::NoColumn) if there is no column of that name and type.
    pub fn get<T: Element>(&self, name: &str) -> Result<&[T]> {
        let at = find::<T>(self.columns(), name)?;
        bytemuck::try_cast_slice(self.column_bytes(at)).map_err(|error| misaligned(name, error))
    }

    /// The bytes of column number `column`, row after row. Empty if there is no such column.
    pub fn column_bytes(&self, column: usize) -> &[u8] {
        let (Some(Some(block)), Some(about)) =
            (self.parts.blocks.get(column), self.pool.columns().get(column))
        else {
            return &[];
        };
        &block.bytes()[..about.row_bytes(self.longest) * self.rows()]
    }

    /// The bytes of column number `column`, to be changed. Empty if there is no such column.
    pub fn column_bytes_mut(&mut self, column: usize) -> &mut [u8] {
        let rows = self.rows();
        self.parts.counted = Counted::default();
        let (Some(Some(block)), Some(about)) =
            (self.parts.blocks.get_mut(column), self.pool.columns().get(column))
        else {
            return &mut [];
        };
        &mut block.bytes_mut()[..about.row_bytes(self.longest) * rows]
    }

    /// The block that column number `column` lies in, for who has made the
    /// [`Allocator`](crate::batches::Allocator).
    pub fn block(&self, column: usize) -> Option<&dyn ColumnBuffer> {
        self.parts.blocks.get(column)?.as_deref()
    }

    /// The shape of column number `column` as libtorch counts: `[rows, …shape of a row]`. Empty if
    /// there is no such column.
    pub fn column_shape(&self, column: usize) -> Vec<i64> {
        let Some(about) = self.pool.columns().get(column) else { return Vec::new() };
        std::iter::once(self.rows()).chain(about.row_shape(self.longest)).map(size).collect()
    }

    /// Column `input_ids`, `[rows, sequence_len]`: token ids. Empty if there is none of I64.
    pub fn input_ids(&self) -> &[i64] {
        self.get("input_ids").unwrap_or_default()
    }

    /// Column `labels`, `[rows, sequence_len]`; [`IGNORED`] where the loss does not look. Empty if
    /// there is none of I64.
    pub fn labels(&self) -> &[i64] {
        self.get("labels").unwrap_or_default()
    }

    /// Column `attention_mask`, `[rows, sequence_len]`: 1 for tokens, 0 for padding. `None`: there
    /// is no padding.
    pub fn attention_mask(&self) -> Option<&[i64]> {
        self.get("attention_mask").ok()
    }

    /// Which sample each row is.
    pub fn samples(&self) -> &[Sample] {
        &self.parts.samples
    }

    /// Which rows count: rows that only fill up the last batch of an epoch do not.
    pub fn valid(&self) -> &[bool] {
        &self.parts.valid
    }

    /// How many rows count.
    pub fn valid_count(&self) -> usize {
        self.parts.valid.iter().filter(|&&valid| valid).count()
    }

    /// Bytes of all columns.
    pub(crate) fn bytes(&self) -> usize {
        let of = |column: &Column| column.row_bytes(self.longest).saturating_mul(self.rows());
        self.columns().iter().map(of).fold(0, usize::saturating_add)
    }

    /// How many samples.
    pub fn rows(&self) -> usize {
        self.parts.samples.len()
    }

    /// The first size of the first column's rows: how many tokens a sample has.
    pub fn sequence_len(&self) -> usize {
        let first = self.pool.columns().first();
        first.map_or(0, |column| column.row_shape(self.longest).next().unwrap_or(1))
    }

    /// `[rows, sequence_len]` as libtorch counts.
    pub fn shape(&self) -> [i64; 2] {
        [size(self.rows()), size(self.sequence_len())]
    }

    /// How many positions of `labels` count in the loss: the weight of this batch's mean loss.
    pub fn label_count(&self) -> usize {
        if self.parts.counted.rows == self.rows() {
            return self.parts.counted.labels;
        }
        self.labels().iter().filter(|&&label| label != IGNORED).count()
    }

    /// The rows, to be filled.
    pub(crate) fn rows_mut(&mut self) -> Rows<'_> {
        let BatchStorage { blocks, samples, valid, counted, .. } = &mut self.parts;
        let (columns, longest) = (&self.pool.columns()[..], self.longest);
        Rows { columns, blocks, samples, valid, counted, start: 0, longest }
    }
}

/// What is in memory fits `i64`.
fn size(count: usize) -> i64 {
    i64::try_from(count).unwrap_or(i64::MAX)
}

impl Drop for Batch {
    fn drop(&mut self) {
        self.pool.give(std::mem::take(&mut self.parts));
    }
}
