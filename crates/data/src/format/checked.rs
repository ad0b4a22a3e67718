//! A file whose blocks are compared with their checksums when they are first touched.
//!
//! The checksums are the file's last tensor, in pages of [`PAGE_BLOCKS`]; the index has a checksum for each page. So an index of
//! 10^12 bytes has some thousand numbers, and memory holds one bit a block.

use std::fmt::Display;
use std::ops::Range;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};

use super::bytes::Bytes;
use super::files::{Layout, PAGE_BLOCKS};
use super::header::Header;
use super::index::BLOCK_BYTES;
use crate::cast::{to_u64, to_usize};
use crate::error::{Error, Result};

/// The tensor of checksums.
pub(crate) const CHECKSUMS: &str = "block_crc32c";

const CHECKSUM_BYTES: usize = size_of::<u32>();

#[derive(Debug)]
pub(crate) struct Checked {
    pub(crate) bytes: Bytes,
    layout: Layout,
    /// Of each page of checksums.
    page_crc32c: Box<[u32]>,
    /// A bit for each block that was found good. Two threads may verify the same block; they come to the same result.
    verified: Box<[AtomicU64]>,
}

impl Checked {
    /// A file, and the checksums of the pages of its checksums. The index has compared their numbers.
    pub(crate) fn new(bytes: Bytes, page_crc32c: &[u32]) -> Self {
        let layout = Layout::of(bytes.len()).unwrap_or_default();
        let words = layout.blocks.div_ceil(u64::from(u64::BITS));
        let verified = (0..words).map(|_| AtomicU64::new(0)).collect();
        Checked { bytes, layout, page_crc32c: page_crc32c.into(), verified }
    }

    /// Whether the header puts the checksums where they are looked for.
    pub(crate) fn check_header(&self, header: &Header) -> Result<()> {
        let span = header.tensor(CHECKSUMS)?;
        let (path, name) = (self.path().to_path_buf(), CHECKSUMS.to_owned());
        if span.dtype != safetensors::tensor::Dtype::U32 {
            let actual = format!("{:?}", span.dtype);
            return Err(Error::WrongDType { path, name, expected: "U32", actual });
        }
        if span.shape != [to_usize(self.layout.blocks)] {
            let expected = format!("[{}]", self.layout.blocks);
            return Err(Error::WrongShape { path, name, expected, actual: span.shape });
        }
        if span.start != self.layout.content_bytes {
            let reason = format!("`{CHECKSUMS}` is not its last tensor");
            return Err(Error::BadHeader { path, reason });
        }
        Ok(())
    }

    pub(crate) fn path(&self) -> &Path {
        self.bytes.path()
    }

    /// Blocks with a checksum of their own.
    pub(crate) fn block_count(&self) -> u64 {
        self.layout.blocks
    }

    /// The bytes of a block.
    pub(crate) fn block(&self, block: u64) -> Range<u64> {
        let start = block * to_u64(BLOCK_BYTES);
        start..(start + to_u64(BLOCK_BYTES)).min(self.layout.content_bytes)
    }

    /// Verifies the blocks under a range of bytes that nobody has verified yet. `reading` names what is read in errors.
    #[inline]
    pub(crate) fn verify(
        &self,
        range: Range<u64>,
        scratch: &mut Vec<u8>,
        reading: &dyn Display,
    ) -> Result<()> {
        let block_bytes = to_u64(BLOCK_BYTES);
        for block in range.start / block_bytes..range.end.div_ceil(block_bytes) {
            let (word, bit) = (to_usize(block / u64::from(u64::BITS)), 1 << (block % 64));
            let Some(verified) = self.verified.get(word) else { break };
            if verified.load(Ordering::Relaxed) & bit == 0 && block < self.layout.blocks {
                self.check_block(block, scratch, reading)?;
                verified.fetch_or(bit, Ordering::Relaxed);
            }
        }
        Ok(())
    }

    /// Reads a block and compares it with its checksum.
    #[cold]
    pub(crate) fn check_block(
        &self,
        block: u64,
        scratch: &mut Vec<u8>,
        reading: &dyn Display,
    ) -> Result<()> {
        let expected = self.expected(block, scratch)?;
        let range = self.block(block);
        let offset = range.start;
        match self.compare(range, expected, scratch)? {
            None => Ok(()),
            Some(actual) => {
                let (path, reading) = (self.path().to_path_buf(), reading.to_string());
                Err(Error::Damaged { path, block, offset, expected, actual, reading })
            }
        }
    }

    /// The checksum of a block, out of its page, which is compared with its own.
    fn expected(&self, block: u64, scratch: &mut Vec<u8>) -> Result<u32> {
        let page = block / PAGE_BLOCKS;
        let offset = self.layout.content_bytes + page * PAGE_BLOCKS * to_u64(CHECKSUM_BYTES);
        let end = offset + PAGE_BLOCKS * to_u64(CHECKSUM_BYTES);
        let range = offset..end.min(self.bytes.len());
        let expected = self.page_crc32c.get(to_usize(page)).copied().unwrap_or_default();
        if let Some(actual) = self.compare(range.clone(), expected, scratch)? {
            let reading = "the checksums of other blocks".to_owned();
            return Err(Error::Damaged {
                path: self.path().to_path_buf(),
                block: offset / to_u64(BLOCK_BYTES),
                offset,
                expected,
                actual,
                reading,
            });
        }
        let at = self.layout.content_bytes + block * to_u64(CHECKSUM_BYTES);
        Ok(u32::from_le_bytes(self.bytes.array(at)?))
    }

    /// The checksum of a range, if it is not the expected one.
    fn compare(
        &self,
        range: Range<u64>,
        expected: u32,
        scratch: &mut Vec<u8>,
    ) -> Result<Option<u32>> {
        let mut actual = self.checksum(range.clone(), scratch)?;
        if actual != expected && self.bytes.forget(range.clone()) {
            actual = self.checksum(range, scratch)?;
        }
        Ok((actual != expected).then_some(actual))
    }

    fn checksum(&self, range: Range<u64>, scratch: &mut Vec<u8>) -> Result<u32> {
        let len = to_usize(range.end - range.start);
        let sum = crc32c::crc32c(self.bytes.read(range.start, len, scratch)?);
        self.bytes.check(range)?;
        Ok(sum)
    }
}
