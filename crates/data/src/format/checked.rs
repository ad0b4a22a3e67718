//! A file whose blocks are compared with their checksums when they are first touched.

use std::fmt::Display;
use std::ops::Range;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

use super::bytes::Bytes;
use super::index::BLOCK_BYTES;
use crate::cast::{to_u64, to_usize};
use crate::error::{Error, Result};

#[derive(Debug)]
pub(crate) struct Checked {
    pub(crate) bytes: Bytes,
    crc32c: Vec<u32>,
    /// Which blocks were found good. Two threads may verify the same block; they come to the same result.
    verified: Vec<AtomicBool>,
}

impl Checked {
    /// A file and the checksums of its blocks.
    pub(crate) fn new(bytes: Bytes, crc32c: &[u32]) -> Self {
        let verified = crc32c.iter().map(|_| AtomicBool::new(false)).collect();
        Checked { bytes, crc32c: crc32c.to_vec(), verified }
    }

    pub(crate) fn path(&self) -> &Path {
        self.bytes.path()
    }

    /// Verifies the blocks under a range of bytes that nobody has verified yet. `reading` names what is read in errors.
    pub(crate) fn verify(
        &self,
        range: Range<u64>,
        scratch: &mut Vec<u8>,
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
            let whole = offset..offset + len;
            let expected = self.crc32c[index];
            let mut actual = self.checksum(whole.clone(), scratch)?;
            if actual != expected && self.bytes.forget(whole.clone()) {
                actual = self.checksum(whole, scratch)?;
            }
            if actual != expected {
                let (path, reading) = (self.path().to_path_buf(), reading.to_string());
                return Err(Error::Damaged { path, block, offset, expected, actual, reading });
            }
            verified.store(true, Ordering::Relaxed);
        }
        Ok(())
    }

    fn checksum(&self, range: Range<u64>, scratch: &mut Vec<u8>) -> Result<u32> {
        let len = to_usize(range.end - range.start);
        let sum = crc32c::crc32c(self.bytes.read(range.start, len, scratch)?);
        self.bytes.check(range)?;
        Ok(sum)
    }
}
