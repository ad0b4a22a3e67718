//! Bounds of rows of any length: row i is elements `offsets[i]..offsets[i + 1]`. Read from end to
//! end, many at a time, around blocks that are known to be damaged.

use std::fmt::Display;
use std::ops::Range;

use super::checked::Checked;
use super::damage_list::merged;
use crate::cast::{to_u64, to_usize};
use crate::error::Result;

const ENTRY_BYTES: u64 = 8;

/// Entries that are read at once.
const READ_ENTRIES: u64 = 1 << 16;

/// Where bounds lie in a file.
#[derive(Clone, Copy, Debug)]
pub(crate) struct RowOffsets {
    /// From the file's beginning.
    pub(crate) start: u64,
    pub(crate) rows: u64,
}

impl RowOffsets {
    /// Gives each row's bounds, as they are written. `None`: they lie in one of the ranges of bytes
    /// in `damaged`, which are ascending.
    pub(crate) fn scan(
        self,
        file: &Checked,
        damaged: &[Range<u64>],
        reading: &dyn Display,
        mut row: impl FnMut(u64, Option<Range<u64>>) -> Result<()>,
    ) -> Result<()> {
        let (mut scratch, mut before, mut next) = (Vec::new(), None, 0);
        let mut entry = |value: Option<u64>| {
            if let Some(start) = before.replace(value) {
                row(next, start.zip(value).map(|(start, end)| start..end))?;
                next += 1;
            }
            Ok(())
        };
        let mut at = self.start;
        let end = self.start + (self.rows + 1) * ENTRY_BYTES;
        while at < end {
            let ahead = damaged.partition_point(|range| range.end <= at);
            let good_end = damaged.get(ahead).map_or(end, |range| range.start.min(end));
            if good_end < at + ENTRY_BYTES {
                entry(None)?;
                at += ENTRY_BYTES;
                continue;
            }
            let entries = ((good_end - at) / ENTRY_BYTES).min(READ_ENTRIES);
            let range = at..at + entries * ENTRY_BYTES;
            file.verify(range.clone(), &mut scratch, reading)?;
            let bytes = file.bytes.read(at, to_usize(entries * ENTRY_BYTES), &mut scratch)?;
            for le in bytes.as_chunks::<8>().0 {
                entry(Some(u64::from_le_bytes(*le)))?;
            }
            file.bytes.check(range.clone())?;
            at = range.end;
        }
        Ok(())
    }

    /// Rows whose bounds lie in damaged bytes, and those that hold one of the damaged elements.
    /// Both lists are ascending.
    pub(crate) fn damaged_rows(
        self,
        file: &Checked,
        bytes: &[Range<u64>],
        elements: &[Range<u64>],
        reading: &dyn Display,
    ) -> Result<Vec<Range<u64>>> {
        let mut rows: Vec<Range<u64>> = Vec::new();
        self.scan(file, bytes, reading, |row, bounds| {
            let is_damaged = bounds.is_none_or(|bounds| {
                let at = elements.partition_point(|range| range.end <= bounds.start);
                elements.get(at).is_some_and(|range| range.start < bounds.end)
            });
            if is_damaged {
                match rows.last_mut() {
                    Some(last) if last.end == row => last.end += 1,
                    _ => rows.push(row..row + 1),
                }
            }
            Ok(())
        })?;
        Ok(rows)
    }
}

/// The bytes of blocks, ascending.
pub(crate) fn bytes_of(file: &Checked, blocks: &[u64]) -> Vec<Range<u64>> {
    merged(blocks.iter().map(|&block| file.block(block)).collect())
}

/// Elements of a column of which some bytes are damaged. It begins at `start` and has `count`
/// elements of `element_bytes`.
pub(crate) fn elements_in(
    bytes: &[Range<u64>],
    (start, element_bytes, count): (u64, usize, u64),
) -> Vec<Range<u64>> {
    let element = to_u64(element_bytes).max(1);
    let of = |range: &Range<u64>| {
        let first = range.start.saturating_sub(start) / element;
        let end = range.end.saturating_sub(start).div_ceil(element);
        first.min(count)..end.min(count)
    };
    bytes.iter().map(of).filter(|range| !range.is_empty()).collect()
}
