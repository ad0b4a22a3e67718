//! Reading a text file in chunks that end at white space, checked to be UTF-8.
//!
//! No word crosses a chunk's end, so chunks can be tokenised in parallel with the same result as the whole.

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use crate::cast::to_u64;
use crate::error::{Error, Result};

/// Large enough that starting one costs nothing, small enough to spread a small text over all threads.
const CHUNK_BYTES: usize = 64 << 10;

/// A run without white space is cut at a character after so many bytes: no word of the vocabulary is as long.
const RUN_BYTES_MAX: usize = 1 << 20;

/// The chunks of one file.
#[derive(Debug)]
pub(super) struct Chunks {
    path: PathBuf,
    file: File,
    buffer: Vec<u8>,
    /// Where `buffer` starts in the file.
    offset: u64,
    ended: bool,
}

impl Chunks {
    pub(super) fn open(path: &Path) -> Result<Self> {
        let file = File::open(path).map_err(Error::io("open", path))?;
        Ok(Chunks { path: path.to_path_buf(), file, buffer: Vec::new(), offset: 0, ended: false })
    }

    /// The next chunk, or `None` at the file's end.
    pub(super) fn next(&mut self) -> Result<Option<String>> {
        loop {
            self.fill()?;
            if self.buffer.is_empty() {
                return Ok(None);
            }
            if let Some(len) = self.chunk_len() {
                return self.take(len).map(Some);
            }
        }
    }

    /// Reads another `CHUNK_BYTES`, unless the buffer still holds as much or the file is at its end.
    fn fill(&mut self) -> Result<()> {
        let missing = if self.chunk_len().is_some() { 0 } else { CHUNK_BYTES };
        if missing > 0 && !self.ended {
            let mut part = self.file.by_ref().take(to_u64(missing));
            let read = part.read_to_end(&mut self.buffer).map_err(Error::io("read", &self.path))?;
            self.ended = read < missing;
        }
        Ok(())
    }

    /// How long the next chunk is, if that can be told from what was read.
    fn chunk_len(&self) -> Option<usize> {
        let len = self.buffer.len();
        if self.ended {
            return Some(len);
        }
        if len < CHUNK_BYTES {
            return None;
        }
        let is_space = |byte: &u8| matches!(byte, b' ' | b'\n' | b'\t' | b'\r');
        if let Some(space) = self.buffer.iter().rposition(is_space) {
            return Some(space + 1);
        }
        if len < RUN_BYTES_MAX {
            return None;
        }
        // A byte that is not a continuation byte starts a character.
        self.buffer.iter().rposition(|byte| byte & 0xC0 != 0x80).filter(|&at| at > 0).or(Some(len))
    }

    fn take(&mut self, len: usize) -> Result<String> {
        let rest = self.buffer.split_off(len);
        let chunk = std::mem::replace(&mut self.buffer, rest);
        let start = self.offset;
        self.offset += to_u64(len);
        String::from_utf8(chunk).map_err(|error| Error::InvalidUtf8 {
            path: self.path.clone(),
            offset: start + to_u64(error.utf8_error().valid_up_to()),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chunks(text: &[u8]) -> Result<Vec<String>> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.txt");
        std::fs::write(&path, text).unwrap();
        let mut chunks = Chunks::open(&path)?;
        let mut all = Vec::new();
        while let Some(chunk) = chunks.next()? {
            all.push(chunk);
        }
        Ok(all)
    }

    #[test]
    fn chunks_join_to_the_file_and_end_at_white_space() {
        let text = "some words and ümläute of varying lengths\n".repeat(20_000);
        let chunks = chunks(text.as_bytes()).unwrap();
        assert!(chunks.len() > 10);
        assert_eq!(chunks.concat(), text);
        assert!(chunks.iter().all(|chunk| chunk.ends_with([' ', '\n'])));
    }

    #[test]
    fn a_run_without_white_space_is_cut_at_a_character() {
        let text = "é".repeat(3 << 20);
        let chunks = chunks(text.as_bytes()).unwrap();
        assert!(chunks.len() > 2);
        assert_eq!(chunks.concat(), text);
    }

    #[test]
    fn the_first_byte_that_is_not_utf8_is_named() {
        let mut text = "good words ".repeat(50_000).into_bytes();
        text[400_003] = 0xFF;
        match chunks(&text) {
            Err(Error::InvalidUtf8 { offset, .. }) => assert_eq!(offset, 400_003),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn empty_and_exactly_full_files_are_read() {
        assert!(chunks(b"").unwrap().is_empty());
        for len in [1, CHUNK_BYTES - 1, CHUNK_BYTES, CHUNK_BYTES + 1, 2 * CHUNK_BYTES] {
            let text = "ab ".repeat(len / 3 + 1)[..len].to_owned();
            assert_eq!(chunks(text.as_bytes()).unwrap().concat(), text, "{len} bytes");
        }
    }
}
