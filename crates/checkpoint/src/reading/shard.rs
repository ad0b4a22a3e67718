//! A shard that is read: bytes are given out only as parts of blocks whose checksums were compared.
//!
//! A block that is wanted whole is read where it is wanted; of any other the last one is kept, so that small tensors that lie in it
//! one after the other cost one reading.

use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

use crate::cast::{to_u64, to_usize};
use crate::fs::Source;
use crate::manifest::BLOCK_BYTES;
use crate::{Error, Result};

#[derive(Debug)]
pub(crate) struct Shard {
    pub(crate) path: PathBuf,
    source: Arc<dyn Source>,
    pub(crate) bytes: u64,
    sums: Vec<u32>,
    last: Mutex<Kept>,
}

/// The last block that was read in part.
#[derive(Debug, Default)]
struct Kept {
    block: Option<u64>,
    bytes: Vec<u8>,
}

impl Shard {
    /// A file of this many bytes, with the checksum of each block.
    pub(crate) fn open(
        path: PathBuf,
        source: Arc<dyn Source>,
        bytes: u64,
        sums: Vec<u32>,
    ) -> Result<Self> {
        let actual = source.bytes().map_err(Error::io("look at", &path))?;
        if actual != bytes {
            return Err(Error::WrongSize { path, expected: bytes, actual });
        }
        Ok(Shard { path, source, bytes, sums, last: Mutex::default() })
    }

    pub(crate) fn block_count(&self) -> u64 {
        to_u64(self.sums.len())
    }

    /// Reads from an offset; `tensor` is what is read.
    pub(crate) fn read(&self, offset: u64, out: &mut [u8], tensor: Option<&str>) -> Result<()> {
        let (mut at, mut out) = (offset, out);
        while !out.is_empty() {
            let block = at / to_u64(BLOCK_BYTES);
            let (start, len) = self.block(block);
            let skipped = to_usize(at - start);
            let taken = out.len().min(len.saturating_sub(skipped));
            if taken == 0 {
                let what = format!("offset {at} of {}", self.path.display());
                return Err(Error::OutOfBounds { what });
            }
            let (head, rest) = out.split_at_mut(taken);
            if taken == len {
                self.read_block(block, head, tensor)?;
            } else {
                self.read_part(block, skipped, head, tensor)?;
            }
            at += to_u64(taken);
            out = rest;
        }
        Ok(())
    }

    /// Compares a block.
    pub(crate) fn check(
        &self,
        block: u64,
        buffer: &mut Vec<u8>,
        tensor: Option<&str>,
    ) -> Result<()> {
        buffer.resize(self.block(block).1, 0);
        self.read_block(block, buffer, tensor)
    }

    /// Where a block starts, and its bytes.
    fn block(&self, block: u64) -> (u64, usize) {
        let start = block * to_u64(BLOCK_BYTES);
        (start, to_usize(self.bytes.saturating_sub(start).min(to_u64(BLOCK_BYTES))))
    }

    fn read_part(
        &self,
        block: u64,
        from: usize,
        out: &mut [u8],
        tensor: Option<&str>,
    ) -> Result<()> {
        let mut kept = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        if kept.block != Some(block) {
            kept.block = None;
            self.check(block, &mut kept.bytes, tensor)?;
            kept.block = Some(block);
        }
        out.copy_from_slice(&kept.bytes[from..from + out.len()]);
        Ok(())
    }

    fn read_block(&self, block: u64, out: &mut [u8], tensor: Option<&str>) -> Result<()> {
        let (offset, _) = self.block(block);
        self.source.read_at(offset, out).map_err(|cause| self.why(cause))?;
        let expected = self.sums.get(to_usize(block)).copied().unwrap_or_default();
        let actual = crc32c::crc32c(out);
        if actual != expected {
            let (path, tensor) = (self.path.clone(), tensor.map(ToOwned::to_owned));
            return Err(Error::Damaged { path, block, offset, tensor, expected, actual });
        }
        Ok(())
    }

    /// Why reading failed: cut off since it was opened, or what the system said.
    fn why(&self, cause: std::io::Error) -> Error {
        let (path, expected) = (self.path.clone(), self.bytes);
        match self.source.bytes() {
            Ok(actual) if actual != expected => Error::WrongSize { path, expected, actual },
            _ => Error::Io { action: "read", path, cause },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug)]
    struct Memory(Vec<u8>);

    impl Source for Memory {
        fn bytes(&self) -> std::io::Result<u64> {
            Ok(to_u64(self.0.len()))
        }

        fn read_at(&self, offset: u64, out: &mut [u8]) -> std::io::Result<()> {
            crate::fs::read_slice(&self.0, offset, out)
        }
    }

    fn shard(bytes: &[u8], claimed: &[u8]) -> Result<Shard> {
        let sums = claimed.chunks(BLOCK_BYTES).map(crc32c::crc32c).collect();
        let source = Arc::new(Memory(bytes.to_vec()));
        Shard::open("shard".into(), source, to_u64(claimed.len()), sums)
    }

    #[test]
    fn bytes_come_from_compared_blocks_wherever_they_start() {
        let len = 3 * BLOCK_BYTES + 1000;
        let bytes: Vec<u8> = (0..len).map(|at| u8::try_from(at * 31 % 251).unwrap()).collect();
        let good = shard(&bytes, &bytes).unwrap();
        for (at, count) in
            [(0, len), (5, 7), (BLOCK_BYTES - 1, 2), (2000, 2 * BLOCK_BYTES), (len - 1, 1)]
        {
            let mut out = vec![0; count];
            good.read(to_u64(at), &mut out, None).unwrap();
            assert_eq!(out, bytes[at..at + count]);
        }
        assert!(matches!(good.read(to_u64(len), &mut [0], None), Err(Error::OutOfBounds { .. })));

        let mut bad = bytes.clone();
        bad[BLOCK_BYTES + 77] ^= 4;
        let bad = shard(&bad, &bytes).unwrap();
        bad.read(5, &mut [0; 9], None).unwrap();
        let error = bad.read(to_u64(BLOCK_BYTES) - 1, &mut [0; 9], Some("w")).unwrap_err();
        let text = error.to_string();
        assert!(text.contains("shard is damaged in block 1 (bytes from 1048576)"), "{text}");
        assert!(text.contains("tensor `w` lies there") && error.is_damage(), "{text}");
        assert!(bad.read(0, &mut vec![0; len], None).is_err());
        assert!(matches!(shard(&bytes[1..], &bytes), Err(Error::WrongSize { .. })));
    }
}
