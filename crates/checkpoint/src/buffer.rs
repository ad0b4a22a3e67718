//! Bytes of a file to be, kept from one save to the next, that begin on a page: what a disk takes without the system's copy must.

use std::ops::{Deref, DerefMut};

/// What direct writes are aligned to: a page, and a multiple of every disk's sector.
pub(crate) const ALIGNMENT_BYTES: usize = 4096;

/// Bytes whose first one lies at a multiple of [`ALIGNMENT_BYTES`].
#[derive(Debug, Default)]
pub(crate) struct Buffer {
    memory: Vec<u8>,
    start: usize,
    len: usize,
}

impl Buffer {
    /// Makes it `len` long. Memory that is there is kept, with whatever it holds.
    pub(crate) fn resize(&mut self, len: usize) {
        if self.memory.len() < len + ALIGNMENT_BYTES {
            // What was in it is not wanted: no copy.
            self.memory = Vec::new();
            self.memory = vec![0; len + ALIGNMENT_BYTES];
            self.start = self.memory.as_ptr().align_offset(ALIGNMENT_BYTES).min(ALIGNMENT_BYTES);
        }
        self.len = len;
    }
}

impl Deref for Buffer {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.memory[self.start..self.start + self.len]
    }
}

impl DerefMut for Buffer {
    fn deref_mut(&mut self) -> &mut [u8] {
        &mut self.memory[self.start..self.start + self.len]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_begins_on_a_page_and_keeps_its_memory() {
        let mut buffer = Buffer::default();
        for len in [0, 1, 5000, 70_000, 3, 70_000] {
            buffer.resize(len);
            assert_eq!(buffer.len(), len);
            if len > 0 {
                assert!((buffer.as_ptr() as usize).is_multiple_of(ALIGNMENT_BYTES), "{len}");
            }
        }
        let before = buffer.as_ptr();
        buffer.resize(60_000);
        assert_eq!(buffer.as_ptr(), before);
    }
}
