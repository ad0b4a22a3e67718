//! Reading one shard: opened with its size and header checked, blocks verified when they are first
//! touched.

use std::fmt::Display;
use std::ops::Range;
use std::path::Path;

use super::bytes::SizedSource;
use super::checked::Checked;
use super::header::SafetensorsHeader;
use super::offsets::{bytes_of, elements_in, RowOffsets};
use super::prefetch_lines::prefetch_lines;
use super::token_index::TokenShard;
use super::widen::widen_u16;
use crate::batches::{DType, Scratch};
use crate::cast::to_u64;
use crate::error::{Error, Result};
use crate::source::Folder;

#[derive(Debug)]
pub(crate) struct OpenTokenShard {
    checked: Checked,
    dtype: DType,
    token_start: u64,
    token_count: u64,
    offset_start: u64,
    document_count: u64,
}

impl OpenTokenShard {
    /// Opens a shard and compares it with what the index says of it. Reads the header, but no
    /// tokens.
    pub(crate) fn open(folder: &dyn Folder, entry: &TokenShard, dtype: DType) -> Result<Self> {
        let bytes = SizedSource::of(folder.open(&entry.file)?, Some(entry.file_bytes))?;
        let header = SafetensorsHeader::read(&bytes)?;
        let tokens = header.vector("tokens", dtype.name(), entry.token_count)?;
        let documents = entry.document_count.saturating_add(1);
        let offsets = header.vector("doc_offsets", "U64", documents)?;
        let checked = Checked::new(bytes, &entry.crc32c);
        checked.check_header(&header)?;
        Ok(OpenTokenShard {
            checked,
            dtype,
            token_start: tokens.start,
            token_count: entry.token_count,
            offset_start: offsets.start,
            document_count: entry.document_count,
        })
    }

    /// The tokens of a document, counted within the shard.
    /// `reading` names them in errors.
    pub(crate) fn document(
        &self,
        document: u64,
        scratch: &mut Scratch,
        reading: &dyn Display,
    ) -> Result<Range<u64>> {
        let offset = self.offset_start + document * to_u64(size_of::<u64>());
        let ends = offset..offset + to_u64(2 * size_of::<u64>());
        let bytes: [u8; 16] = self
            .verify(ends, scratch, reading)
            .and_then(|()| self.checked.bytes.array(offset))
            .map_err(|error| error.while_reading(reading, self.path(), offset))?;
        let (pair, _) = bytes.as_chunks::<8>();
        let (start, end) = (u64::from_le_bytes(pair[0]), u64::from_le_bytes(pair[1]));
        if start > end || end > self.token_count {
            let path = self.path().to_path_buf();
            let reason = format!("tokens {start} to {end} of {}", self.token_count);
            return Err(Error::BadDocument { path, document, reason });
        }
        Ok(start..end)
    }

    pub(crate) fn path(&self) -> &Path {
        self.checked.bytes.path()
    }

    /// Tokens from `start` on, as many as `out` holds; gives the largest. `reading` names the
    /// sample in errors.
    pub(crate) fn read(
        &self,
        start: u64,
        out: &mut [i64],
        scratch: &mut Scratch,
        reading: &dyn Display,
    ) -> Result<u32> {
        let offset = self.token_start + start * to_u64(self.dtype.bytes());
        self.read_at(offset, out, scratch, reading)
            .map_err(|error| error.while_reading(reading, self.path(), offset))
    }

    #[inline]
    fn read_at(
        &self,
        offset: u64,
        out: &mut [i64],
        scratch: &mut Scratch,
        reading: &dyn Display,
    ) -> Result<u32> {
        let len = out.len() * self.dtype.bytes();
        self.verify(offset..offset + to_u64(len), scratch, reading)?;
        let bytes = self.checked.bytes.read(offset, len, &mut scratch.bytes)?;
        let largest = match self.dtype {
            DType::U16 => u32::from(widen_u16(bytes.as_chunks::<2>().0, out)),
            _ => {
                let tokens = bytes.as_chunks::<4>().0;
                for (token, le) in out.iter_mut().zip(tokens) {
                    *token = i64::from(u32::from_le_bytes(*le));
                }
                tokens.iter().map(|le| u32::from_le_bytes(*le)).max().unwrap_or(0)
            }
        };
        self.checked.bytes.check(offset..offset + to_u64(len))?;
        Ok(largest)
    }

    /// Has the processor load tokens that will be read soon. Only where they are mapped.
    #[inline]
    pub(crate) fn expect(&self, start: u64, len: usize) {
        let element = self.dtype.bytes();
        let offset = self.token_start + start * to_u64(element);
        if let Some(bytes) = self.checked.bytes.mapped(offset, len * element) {
            prefetch_lines(bytes);
        }
    }

    /// Has tokens fetched from the disk.
    pub(crate) fn will_need(&self, tokens: Range<u64>) {
        let place = |token: u64| self.token_start + token * to_u64(self.dtype.bytes());
        self.checked.bytes.will_need(place(tokens.start)..place(tokens.end));
    }

    /// Verifies the blocks under a range of bytes that nobody has verified yet.
    pub(crate) fn verify(
        &self,
        range: Range<u64>,
        scratch: &mut Scratch,
        reading: &dyn Display,
    ) -> Result<()> {
        self.checked.verify(range, &mut scratch.bytes, reading)
    }

    /// The tokens in these blocks, counted within the shard: ascending.
    pub(crate) fn tokens_of(&self, blocks: &[u64]) -> Vec<Range<u64>> {
        let bytes = bytes_of(&self.checked, blocks);
        elements_in(&bytes, (self.token_start, self.dtype.bytes(), self.token_count))
    }

    /// The documents that have tokens or bounds in these blocks, counted within the shard:
    /// ascending. Reads all bounds once.
    pub(crate) fn documents_of(&self, blocks: &[u64]) -> Result<Vec<Range<u64>>> {
        let bytes = bytes_of(&self.checked, blocks);
        let bounds = RowOffsets { start: self.offset_start, rows: self.document_count };
        let reading = &"the bounds of documents";
        bounds.damaged_rows(&self.checked, &bytes, &self.tokens_of(blocks), reading)
    }

    pub(crate) fn file_bytes(&self) -> u64 {
        self.checked.bytes.len()
    }
}
