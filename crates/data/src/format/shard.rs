//! Reading one shard: opened with its size and header checked, blocks verified when they are first touched.

use std::fmt::Display;
use std::ops::Range;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

use safetensors::tensor::Dtype;

use super::bytes::{Access, Bytes};
use super::header::Header;
use super::index::{ShardEntry, TokenDType, BLOCK_BYTES};
use crate::cast::{to_u64, to_usize};
use crate::error::{Error, Result};
use crate::prefetch_lines::prefetch_lines;
use crate::samples::Scratch;

#[derive(Debug)]
pub(crate) struct Shard {
    bytes: Bytes,
    dtype: TokenDType,
    token_start: u64,
    token_count: u64,
    crc32c: Vec<u32>,
    /// Which blocks were found good. Two threads may verify the same block; they come to the same result.
    verified: Vec<AtomicBool>,
}

impl Shard {
    /// Opens a shard and compares it with what the index says of it. Reads the header, but no tokens.
    pub(crate) fn open(
        folder: &Path,
        entry: &ShardEntry,
        dtype: TokenDType,
        access: Access,
    ) -> Result<Self> {
        let path = folder.join(&entry.file);
        let bytes = Bytes::open(&path, access, Some(entry.file_bytes))?;
        let header = Header::read(&bytes)?;
        let tokens = header.tensor("tokens")?;
        if tokens.dtype != safetensors_dtype(dtype) {
            let (name, actual) = ("tokens".to_owned(), format!("{:?}", tokens.dtype));
            return Err(Error::WrongDType { path, name, expected: dtype.name(), actual });
        }
        let offsets = header.tensor("doc_offsets")?;
        if offsets.dtype != Dtype::U64 {
            let (name, actual) = ("doc_offsets".to_owned(), format!("{:?}", offsets.dtype));
            return Err(Error::WrongDType { path, name, expected: "U64", actual });
        }
        let tensors = [
            (tokens, "tokens", entry.token_count),
            (offsets, "doc_offsets", entry.document_count + 1),
        ];
        let mut token_start = 0;
        for (span, name, len) in tensors.into_iter().rev() {
            if span.shape != [to_usize(len)] {
                let (name, expected) = (name.to_owned(), format!("[{len}]"));
                return Err(Error::WrongShape { path, name, expected, actual: span.shape });
            }
            token_start = span.start;
        }
        let verified = entry.crc32c.iter().map(|_| AtomicBool::new(false)).collect();
        let (token_count, crc32c) = (entry.token_count, entry.crc32c.clone());
        Ok(Shard { bytes, dtype, token_start, token_count, crc32c, verified })
    }

    pub(crate) fn token_count(&self) -> u64 {
        self.token_count
    }

    pub(crate) fn path(&self) -> &Path {
        self.bytes.path()
    }

    /// Tokens from `start` on, as many as `out` holds; gives the largest. `reading` names the sample in errors.
    pub(crate) fn read(
        &self,
        start: u64,
        out: &mut [i64],
        scratch: &mut Scratch,
        reading: &dyn Display,
    ) -> Result<u32> {
        let element = self.dtype.bytes();
        let offset = self.token_start + start * to_u64(element);
        let len = out.len() * element;
        self.verify(offset..offset + to_u64(len), scratch, reading)?;
        let bytes = self.bytes.read(offset, len, &mut scratch.bytes)?;
        Ok(match self.dtype {
            TokenDType::U16 => {
                let tokens = bytes.as_chunks::<2>().0;
                // Two plain loops: each becomes a few vector instructions.
                let largest = tokens.iter().map(|le| u16::from_le_bytes(*le)).max();
                for (token, le) in out.iter_mut().zip(tokens) {
                    *token = i64::from(u16::from_le_bytes(*le));
                }
                u32::from(largest.unwrap_or(0))
            }
            TokenDType::U32 => {
                let tokens = bytes.as_chunks::<4>().0;
                for (token, le) in out.iter_mut().zip(tokens) {
                    *token = i64::from(u32::from_le_bytes(*le));
                }
                tokens.iter().map(|le| u32::from_le_bytes(*le)).max().unwrap_or(0)
            }
        })
    }

    /// Has the processor load tokens that will be read soon. Only where they are mapped.
    #[inline]
    pub(crate) fn expect(&self, start: u64, len: usize) {
        let element = self.dtype.bytes();
        let offset = self.token_start + start * to_u64(element);
        if let Some(bytes) = self.bytes.mapped(offset, len * element) {
            prefetch_lines(bytes);
        }
    }

    /// Verifies the blocks under a range of bytes that nobody has verified yet.
    pub(crate) fn verify(
        &self,
        range: Range<u64>,
        scratch: &mut Scratch,
        reading: &dyn Display,
    ) -> Result<()> {
        let block_bytes = to_u64(BLOCK_BYTES);
        for block in range.start / block_bytes..range.end.div_ceil(block_bytes) {
            let index = to_usize(block);
            let Some(verified) = self.verified.get(index) else { break };
            if verified.load(Ordering::Relaxed) {
                continue;
            }
            let offset = block * block_bytes;
            let len = block_bytes.min(self.bytes.len() - offset);
            let bytes = self.bytes.read(offset, to_usize(len), &mut scratch.bytes)?;
            let (actual, expected) = (crc32c::crc32c(bytes), self.crc32c[index]);
            if actual != expected {
                let (path, reading) = (self.path().to_path_buf(), reading.to_string());
                return Err(Error::Damaged { path, block, offset, expected, actual, reading });
            }
            verified.store(true, Ordering::Relaxed);
        }
        Ok(())
    }

    pub(crate) fn file_bytes(&self) -> u64 {
        self.bytes.len()
    }
}

fn safetensors_dtype(dtype: TokenDType) -> Dtype {
    match dtype {
        TokenDType::U16 => Dtype::U16,
        TokenDType::U32 => Dtype::U32,
    }
}
