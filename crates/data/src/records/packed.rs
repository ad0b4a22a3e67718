//! Values of one field, row after row: what a thread has read and the writer appends.

use std::ops::Range;

/// Values of any lengths.
#[derive(Debug)]
pub(super) struct PackedColumn {
    bytes: Vec<u8>,
    rows: usize,
    /// Of each row, if all have the same.
    row_bytes: usize,
    /// Where each row begins, and where the last one ends; empty if all have the same length.
    bounds: Vec<usize>,
}

impl PackedColumn {
    #[cfg(feature = "parquet")]
    pub(super) fn new() -> Self {
        PackedColumn { bytes: Vec::new(), rows: 0, row_bytes: 0, bounds: vec![0] }
    }

    /// Rows of `row_bytes` each.
    pub(super) fn of_rows(bytes: Vec<u8>, row_bytes: usize, rows: usize) -> Self {
        PackedColumn { bytes, rows, row_bytes, bounds: Vec::new() }
    }

    pub(super) fn rows(&self) -> usize {
        self.rows
    }

    /// Bytes of all rows.
    #[cfg(feature = "parquet")]
    pub(super) fn bytes_mut(&mut self) -> &mut Vec<u8> {
        &mut self.bytes
    }

    /// The next row is what was added to the bytes since the last one.
    #[cfg(feature = "parquet")]
    pub(super) fn end_row_at(&mut self, end: usize) {
        self.bounds.push(end);
        self.rows += 1;
    }

    /// Where a row begins, or the one before it ends.
    fn bound(&self, row: usize) -> usize {
        self.bounds.get(row).copied().unwrap_or(row * self.row_bytes)
    }

    /// The bytes of a row.
    pub(super) fn row_bytes(&self, row: usize) -> usize {
        self.bound(row + 1) - self.bound(row)
    }

    /// The bytes of some rows.
    pub(super) fn of(&self, rows: Range<usize>) -> &[u8] {
        &self.bytes[self.bound(rows.start)..self.bound(rows.end)]
    }
}
