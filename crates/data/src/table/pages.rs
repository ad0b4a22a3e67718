//! The pages of a Parquet file, each looked at before the library takes its header at its word.
//!
//! The library reserves what a page claims to unpack to, and as many entries as its dictionary
//! claims to have: of a file of some kilobytes up to 16 GiB, which ends the process where there is
//! less. What a codec can make of the page's bytes is known. What is within them is not looked at:
//! pages of `DELTA_BYTE_ARRAY` and `DELTA_LENGTH_BYTE_ARRAY` say there how many strings they hold,
//! and the library (60.1) reserves as much.
//! Source: <https://parquet.apache.org/docs/file-format/>.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicU64, Ordering};

use bytes::Bytes;
use parquet::basic::{Compression, Type};
use parquet::errors::{ParquetError, Result};
use parquet::file::metadata::{ColumnChunkMetaData, RowGroupMetaData};
use parquet::file::reader::{ChunkReader, Length};

use super::compact::{Compact, STRUCT};
use crate::cast::{to_u64, to_usize};

/// What is read at first of a header; one with statistics of long strings has more.
const HEADER_BYTES: u64 = 512;

/// A longer header is not one.
const HEADER_BYTES_MAX: u64 = 16 << 20;

/// What a page may claim to unpack to, however small it is.
const CLAIM_BYTES_MIN: u64 = 1 << 17;

/// Structures within structures: statistics within a header of a page of data.
const DEPTH_MAX: u32 = 8;

/// A file whose pages are read.
pub(super) struct Pages {
    file: File,
    bytes: u64,
    /// In the order of their places.
    columns: Vec<ColumnChunk>,
}

/// A column of a row group.
struct ColumnChunk {
    start: u64,
    end: u64,
    /// What its codec can make of a byte.
    ratio: u64,
    /// Bytes of an entry of its dictionary, at least.
    entry_bytes: u64,
    /// Where the last page begins whose header was looked at, behind that header.
    body: AtomicU64,
}

impl Pages {
    /// Of the columns of some row groups.
    pub(super) fn of(file: File, groups: &[RowGroupMetaData]) -> std::result::Result<Self, String> {
        let of = |about: &ColumnChunkMetaData| {
            let start = about.dictionary_page_offset().unwrap_or(about.data_page_offset());
            let unsigned = |number: i64| u64::try_from(number).unwrap_or(0);
            let (start, bytes) = (unsigned(start), unsigned(about.compressed_size()));
            let (ratio, entry_bytes) = (ratio(about.compression()), width(about.column_type()));
            let body = AtomicU64::new(0);
            ColumnChunk { start, end: start.saturating_add(bytes), ratio, entry_bytes, body }
        };
        let mut columns: Vec<ColumnChunk> =
            groups.iter().flat_map(RowGroupMetaData::columns).map(of).collect();
        columns.sort_unstable_by_key(|column| (column.start, column.end));
        if columns.windows(2).any(|pair| pair[0].end > pair[1].start) {
            return Err("its columns overlap".to_owned());
        }
        Ok(Pages { bytes: Length::len(&file), file, columns })
    }

    /// Looks at the header of the page that begins there.
    fn check(&self, start: u64) -> Result<()> {
        let before = self.columns.partition_point(|column| column.start <= start);
        let Some(column) = self.columns[..before].last() else {
            return Err(bad(format!("no column has a page at {start}")));
        };
        // The library asks again behind a header that it has read already, and at the end, and
        // reads nothing there.
        if start >= column.end || column.body.load(Ordering::Relaxed) == start {
            return Ok(());
        }
        let available = column.end.min(self.bytes).saturating_sub(start);
        let (Page { compressed, unpacked, dictionary }, body) = self.header(start, available)?;
        let most = compressed.saturating_mul(column.ratio).saturating_add(CLAIM_BYTES_MIN);
        if compressed > available || unpacked > most {
            return Err(bad(format!(
                "a page claims that {compressed} bytes, of {available}, unpack to {unpacked}"
            )));
        }
        if dictionary > unpacked / column.entry_bytes {
            return Err(bad(format!(
                "a dictionary of {unpacked} bytes claims {dictionary} entries"
            )));
        }
        // Behind an empty page the next header begins.
        column.body.store(if compressed > 0 { body } else { 0 }, Ordering::Relaxed);
        Ok(())
    }

    /// The header that begins at `start`, and where it ends.
    fn header(&self, start: u64, available: u64) -> Result<(Page, u64)> {
        let mut len = HEADER_BYTES;
        loop {
            let mut bytes = vec![0; to_usize(len.min(available))];
            self.file.read_exact_at(&mut bytes, start)?;
            let mut input = Compact { rest: &bytes };
            if let Some(page) = input.page() {
                return Ok((page, start + to_u64(bytes.len() - input.rest.len())));
            }
            if len >= available.min(HEADER_BYTES_MAX) {
                return Err(bad("a page has no header".to_owned()));
            }
            len *= 16;
        }
    }
}

impl Length for Pages {
    fn len(&self) -> u64 {
        self.bytes
    }
}

impl ChunkReader for Pages {
    type T = <File as ChunkReader>::T;

    /// Called for the header of each page.
    fn get_read(&self, start: u64) -> Result<Self::T> {
        self.check(start)?;
        self.file.get_read(start)
    }

    fn get_bytes(&self, start: u64, length: usize) -> Result<Bytes> {
        if start.checked_add(to_u64(length)).is_none_or(|end| end > self.bytes) {
            return Err(bad(format!("it has {} bytes, not {length} from {start} on", self.bytes)));
        }
        self.file.get_bytes(start, length)
    }
}

fn bad(reason: String) -> ParquetError {
    ParquetError::General(reason)
}

/// What a codec makes of a byte at most. Of Brotli's nothing is known but that a page has less than
/// 2 GiB.
fn ratio(codec: Compression) -> u64 {
    match codec {
        Compression::UNCOMPRESSED => 1,
        // A copy of 64 bytes has three.
        Compression::SNAPPY => 22,
        Compression::GZIP(_) => 1032,
        Compression::LZ4 | Compression::LZ4_RAW => super::ipc::LZ4_RATIO,
        Compression::ZSTD(_) => super::ipc::ZSTD_RATIO,
        _ => u64::MAX,
    }
}

/// Bytes of a value that is written plainly, at least.
fn width(kind: Type) -> u64 {
    match kind {
        Type::BOOLEAN | Type::FIXED_LEN_BYTE_ARRAY => 1,
        // Before bytes stands how many.
        Type::INT32 | Type::FLOAT | Type::BYTE_ARRAY => 4,
        Type::INT64 | Type::DOUBLE => 8,
        Type::INT96 => 12,
    }
}

/// What is looked at of a page's header.
#[derive(Debug, Default, PartialEq)]
struct Page {
    compressed: u64,
    unpacked: u64,
    /// Entries of a dictionary.
    dictionary: u64,
}

impl Compact<'_> {
    fn page(&mut self) -> Option<Page> {
        let (mut page, mut id) = (Page::default(), 0);
        while let Some(kind) = self.field(&mut id)? {
            match id {
                2 => page.unpacked = self.size(kind)?,
                3 => page.compressed = self.size(kind)?,
                7 if kind == STRUCT => {
                    let mut inner = 0;
                    while let Some(of) = self.field(&mut inner)? {
                        if inner == 1 {
                            page.dictionary = self.size(of)?;
                        } else {
                            self.skip(of, DEPTH_MAX)?;
                        }
                    }
                }
                7 => return None,
                _ => self.skip(kind, DEPTH_MAX)?,
            }
        }
        Some(page)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn page(bytes: &[u8]) -> Option<Page> {
        Compact { rest: bytes }.page()
    }

    #[test]
    fn sizes_are_found_among_other_fields() {
        // Type 2 (dictionary), 1000 and 100 bytes, a checksum, then the dictionary: 7 entries, an
        // encoding, sorted.
        let header = [
            0x15, 4, 0x15, 0xD0, 0x0F, 0x15, 0xC8, 1, 0x15, 2, 0x3C, 0x15, 14, 0x15, 0, 0x11, 0, 0,
        ];
        let expected = Page { compressed: 100, unpacked: 1000, dictionary: 7 };
        assert_eq!(page(&header), Some(expected));
        for len in 0..header.len() {
            assert_eq!(page(&header[..len]), None, "{len} bytes");
        }
        // A string, a list of numbers and a structure before them, and a number of a field that is
        // written out.
        let others = [0x18, 2, 9, 9, 0x09, 18, 0x25, 2, 4, 0x0C, 20, 0x15, 2, 0, 0x05, 6, 8, 0];
        assert_eq!(page(&others), Some(Page { compressed: 4, ..Page::default() }));
    }

    #[test]
    fn what_is_no_header_is_none() {
        let deep: Vec<u8> = [0x1C; 20].into_iter().chain([0; 21]).collect();
        // Negative, of another type, too deep, a list of very many.
        for bytes in
            [&[0x25, 1, 0][..], &[0x28, 0, 0], &deep, &[0x19, 0xF5, 0xFF, 0xFF, 0xFF, 0x0F]]
        {
            assert_eq!(page(bytes), None, "{bytes:?}");
        }
    }
}
