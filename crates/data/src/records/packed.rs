//! Values of one field, row after row: what a thread has read and the writer appends.

use std::ops::Range;

/// Values of any lengths.
#[derive(Debug)]
pub(super) struct Packed {
    bytes: Vec<u8>,
    /// Where each row begins, and where the last one ends.
    bounds: Vec<usize>,
}

impl Packed {
    #[cfg(feature = "parquet")]
    pub(super) fn new() -> Self {
        Packed { bytes: Vec::new(), bounds: vec![0] }
    }

    /// Rows of `row_bytes` each.
    pub(super) fn of_rows(bytes: Vec<u8>, row_bytes: usize, rows: usize) -> Self {
        Packed { bytes, bounds: (0..=rows).map(|row| row * row_bytes).collect() }
    }

    pub(super) fn rows(&self) -> usize {
        self.bounds.len() - 1
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
    }

    /// The bytes of a row.
    pub(super) fn row_bytes(&self, row: usize) -> usize {
        self.bounds[row + 1] - self.bounds[row]
    }

    /// The bytes of some rows.
    pub(super) fn of(&self, rows: Range<usize>) -> &[u8] {
        &self.bytes[self.bounds[rows.start]..self.bounds[rows.end]]
    }
}
