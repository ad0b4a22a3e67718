//! A file whose blocks are compared with their checksums when they are first touched.
//!
//! The checksums are the file's last tensor, in pages of [`PAGE_BLOCKS`]; the index has a checksum
//! for each page. So an index of 10^12 bytes has some thousand numbers, and memory holds one bit a
//! block.

use std::fmt::Display;
use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Write};
use std::ops::Range;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};

use super::bytes::SizedSource;
use super::header::SafetensorsHeader;
use super::layout::{BlockLayout, BLOCK_BYTES, CHECKSUMS, CHECKSUM_BYTES, PAGE_BLOCKS};
use crate::cast::{to_u64, to_usize};
use crate::error::{Error, Result};

#[derive(Debug)]
pub(crate) struct Checked {
    pub(crate) bytes: SizedSource,
    layout: BlockLayout,
    /// Of each page of checksums.
    page_crc32c: Box<[u32]>,
    /// A bit for each block that was found good. Two threads may verify the same block; they come
    /// to the same result.
    verified: Box<[AtomicU64]>,
}

impl Checked {
    /// A file, and the checksums of the pages of its checksums. The index has compared their
    /// numbers.
    pub(crate) fn new(bytes: SizedSource, page_crc32c: &[u32]) -> Self {
        let layout = BlockLayout::of(bytes.len()).unwrap_or_default();
        let words = layout.blocks.div_ceil(u64::from(u64::BITS));
        let verified = (0..words).map(|_| AtomicU64::new(0)).collect();
        Checked { bytes, layout, page_crc32c: page_crc32c.into(), verified }
    }

    /// Whether the header puts the checksums where they are looked for.
    pub(crate) fn check_header(&self, header: &SafetensorsHeader) -> Result<()> {
        let span = header.vector(CHECKSUMS, "U32", self.layout.blocks)?;
        if span.start != self.layout.content_bytes {
            let reason = format!("`{CHECKSUMS}` is not its last tensor");
            return Err(Error::BadHeader { path: self.path().to_path_buf(), reason });
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

    /// Verifies the blocks under a range of bytes that nobody has verified yet. `reading` names
    /// what is read in errors.
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
        let offset = self.layout.content_bytes + page * PAGE_BLOCKS * CHECKSUM_BYTES;
        let end = offset + PAGE_BLOCKS * CHECKSUM_BYTES;
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
        let at = self.layout.content_bytes + block * CHECKSUM_BYTES;
        Ok(u32::from_le_bytes(self.bytes.array(at)?))
    }

    /// The actual checksum of a range, if it is not the expected one.
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

/// Reads a file back, appends the checksums of its blocks and syncs it to disk. Gives its size and
/// the checksums of their pages.
pub(crate) fn seal(file: &mut File, path: &Path) -> Result<(u64, Vec<u32>)> {
    file.seek(SeekFrom::Start(0)).map_err(Error::io("read", path))?;
    let (mut total, mut sums, mut block) = (0, Vec::new(), Vec::with_capacity(BLOCK_BYTES));
    loop {
        block.clear();
        let read = Read::by_ref(file).take(to_u64(BLOCK_BYTES)).read_to_end(&mut block);
        let read = read.map_err(Error::io("read", path))?;
        if read == 0 {
            break;
        }
        total += to_u64(read);
        sums.extend_from_slice(&crc32c::crc32c(&block).to_le_bytes());
    }
    file.write_all(&sums).map_err(Error::io("write", path))?;
    file.sync_all().map_err(Error::io("sync", path))?;
    let pages = sums.chunks(to_usize(PAGE_BLOCKS * CHECKSUM_BYTES));
    Ok((total + to_u64(sums.len()), pages.map(crc32c::crc32c).collect()))
}
