//! Reading a text file in blocks, cut so that blocks can be worked on in parallel with the result of the whole.
//!
//! Where a block may end is a [`Cut`]: pure functions of the bytes from the block's start on. A file's last block is followed
//! by an empty one that says so.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::cast::to_u64;
use crate::error::{Error, Result};

/// Large enough that starting one costs nothing, small enough to spread a small text over all threads.
const BLOCK_BYTES: usize = 64 << 10;

/// What is encoded at once at most, where a document can be cut: encoders need some hundred bytes of memory for each.
pub(crate) const PIECE_BYTES: usize = 256 << 10;

/// A run without white space is cut at a character after so many bytes: no word of a vocabulary is as long.
const RUN_BYTES_MAX: usize = 1 << 20;

/// A line is held in memory whole; longer ones are rather files of another kind.
const LINE_BYTES_MAX: usize = 256 << 20;

/// A place in the input: everything before it is done.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Place {
    /// Number of the file.
    pub(crate) file: usize,
    /// Bytes.
    pub(crate) offset: u64,
    /// Lines before it.
    pub(crate) line: u64,
}

/// A part of a file.
#[derive(Debug)]
pub(crate) struct Block {
    /// Where it starts.
    pub(crate) start: Place,
    pub(crate) content: Content,
    /// Bytes of the file that it stands for.
    pub(crate) bytes: u64,
    /// Whether a document that is open ends before this block.
    pub(crate) after_gap: bool,
}

/// What a block holds.
#[derive(Debug)]
pub(crate) enum Content {
    /// Bytes of the file.
    Bytes(Vec<u8>),
    /// Rows of a table.
    #[cfg(feature = "parquet")]
    Rows(Texts),
    /// Nothing: the file ends here.
    End,
}

/// The texts of rows, one behind the other.
#[cfg(feature = "parquet")]
#[derive(Debug, Default)]
pub(crate) struct Texts {
    text: String,
    /// Where each row's text ends, or why it has none.
    ends: Vec<(usize, Option<&'static str>)>,
}

#[cfg(feature = "parquet")]
impl Texts {
    /// Adds a row: its text, or why it has none.
    pub(crate) fn push(&mut self, text: std::result::Result<&str, &'static str>) {
        self.text.push_str(text.unwrap_or_default());
        self.ends.push((self.text.len(), text.err()));
    }

    /// Bytes of all rows.
    pub(crate) fn bytes(&self) -> usize {
        self.text.len()
    }

    /// How many rows there are.
    pub(crate) fn rows(&self) -> usize {
        self.ends.len()
    }

    /// Each row's text, or why it has none.
    pub(crate) fn iter(&self) -> impl Iterator<Item = std::result::Result<&str, &'static str>> {
        let starts = std::iter::once(0).chain(self.ends.iter().map(|(end, _)| *end));
        starts.zip(&self.ends).map(|(start, (end, bad))| match bad {
            None => Ok(&self.text[start..*end]),
            Some(reason) => Err(*reason),
        })
    }
}

/// Where blocks may end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Cut {
    /// After white space: for encoders to which words are all that counts.
    Space,
    /// After a line. Lines stay whole.
    Line,
    /// After an empty line. What is longer than [`PIECE_BYTES`] without one is cut as a piece.
    BlankLine,
    /// As pieces: see [`piece_len`].
    Piece,
}

impl Cut {
    /// How long the next block is, if that can be told from what was read. `Err`: a line is too long.
    fn block_len(self, buffer: &[u8], ended: bool) -> std::result::Result<Option<usize>, ()> {
        let len = buffer.len();
        let whole_bytes_max = match self {
            Cut::Space => RUN_BYTES_MAX - 1,
            Cut::Piece => PIECE_BYTES,
            Cut::Line | Cut::BlankLine => usize::MAX,
        };
        if ended && len <= whole_bytes_max {
            return Ok(Some(len));
        }
        if len < BLOCK_BYTES {
            return Ok(None);
        }
        let end = match self {
            // What lies behind the window depends on how the buffer was filled; the cut must not.
            Cut::Space => space_end(&buffer[..len.min(RUN_BYTES_MAX)]).or_else(|| run_end(buffer)),
            Cut::Line => match line_end(buffer) {
                None if len >= LINE_BYTES_MAX => return Err(()),
                end => end,
            },
            Cut::BlankLine => blank_line_end(buffer).or_else(|| piece_len(buffer)),
            Cut::Piece => piece_len(buffer),
        };
        Ok(end.or(ended.then_some(len)))
    }
}

/// How long the first piece of a text of more than [`PIECE_BYTES`] is: after the last line in it that begins and ends with
/// more than white space, so that byte-pair encoders see the same words on both sides of the cut as in the whole; after any
/// line or white space else. `None` if more bytes are needed.
pub(crate) fn piece_len(text: &[u8]) -> Option<usize> {
    if text.len() <= PIECE_BYTES {
        return None;
    }
    let window = &text[..PIECE_BYTES];
    let is_clean = |at: &usize| {
        let inside = |byte: &u8| !byte.is_ascii_whitespace();
        window[*at] == b'\n'
            && at.checked_sub(1).is_some_and(|before| inside(&window[before]))
            && text.get(at + 1).is_some_and(inside)
    };
    let clean = (0..window.len()).rev().find(is_clean).map(|at| at + 1);
    clean.or_else(|| line_end(window)).or_else(|| space_end(window)).or_else(|| run_end(text))
}

fn line_end(bytes: &[u8]) -> Option<usize> {
    bytes.iter().rposition(|&byte| byte == b'\n').map(|at| at + 1)
}

fn space_end(bytes: &[u8]) -> Option<usize> {
    let is_space = |byte: &u8| matches!(byte, b' ' | b'\n' | b'\t' | b'\r');
    bytes.iter().rposition(is_space).map(|at| at + 1)
}

/// The end of the last empty line.
fn blank_line_end(bytes: &[u8]) -> Option<usize> {
    let mut later = line_end(bytes)?;
    // Lines from the last one on, each `start..later`.
    while later > 0 {
        let start = line_end(&bytes[..later - 1]).unwrap_or(0);
        if start > 0 && bytes[start..later].trim_ascii().is_empty() {
            return Some(later);
        }
        later = start;
    }
    None
}

/// Before the last character that begins within [`RUN_BYTES_MAX`]: a function of these bytes alone, so that reading that goes on
/// in the middle of a file cuts where reading it whole does.
fn run_end(bytes: &[u8]) -> Option<usize> {
    let window = bytes.get(..RUN_BYTES_MAX)?;
    // A byte that is not a continuation byte starts a character.
    let start = window.iter().rposition(|byte| byte & 0xC0 != 0x80).filter(|&at| at > 0);
    start.or(Some(window.len()))
}

/// How far a file is read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// There may be more.
    Reading,
    /// It has no more bytes than the buffer holds.
    AtEnd,
    /// Its end was handed out.
    Done,
}

/// The blocks of one file.
#[derive(Debug)]
pub(crate) struct Blocks {
    path: PathBuf,
    file: File,
    cut: Cut,
    buffer: Vec<u8>,
    /// Where `buffer` starts.
    place: Place,
    state: State,
}

impl Blocks {
    /// Starts at a place of the file.
    pub(crate) fn open(path: &Path, cut: Cut, place: Place) -> Result<Self> {
        let mut file = File::open(path).map_err(Error::io("open", path))?;
        file.seek(SeekFrom::Start(place.offset)).map_err(Error::io("read", path))?;
        let (path, buffer) = (path.to_path_buf(), Vec::new());
        Ok(Blocks { path, file, cut, buffer, place, state: State::Reading })
    }

    /// The next block, or `None` after the one that ends the file.
    pub(crate) fn next(&mut self) -> Result<Option<Block>> {
        let mut after_gap = false;
        while self.state != State::Done {
            if self.cut == Cut::BlankLine {
                after_gap |= self.skip_blank_lines();
            }
            if self.state == State::AtEnd && self.buffer.is_empty() {
                self.state = State::Done;
                let (start, content) = (self.place, Content::End);
                return Ok(Some(Block { start, content, bytes: 0, after_gap }));
            }
            match self.cut.block_len(&self.buffer, self.state == State::AtEnd) {
                Ok(Some(len)) => return Ok(Some(self.block(len, after_gap))),
                Ok(None) => self.fill()?,
                Err(()) => {
                    let reason = format!("it has more than {LINE_BYTES_MAX} bytes");
                    let line = self.place.line + 1;
                    return Err(Error::BadLine { path: self.path.clone(), line, reason });
                }
            }
        }
        Ok(None)
    }

    /// Reads as much again as there is, so that long runs are not looked through over and over.
    fn fill(&mut self) -> Result<()> {
        let wanted = self.buffer.len().max(BLOCK_BYTES);
        let mut part = self.file.by_ref().take(to_u64(wanted));
        let read = part.read_to_end(&mut self.buffer).map_err(Error::io("read", &self.path))?;
        if read < wanted {
            self.state = State::AtEnd;
        }
        Ok(())
    }

    fn block(&mut self, len: usize, after_gap: bool) -> Block {
        let start = self.place;
        let content = Content::Bytes(self.take(len));
        Block { start, content, bytes: to_u64(len), after_gap }
    }

    /// Cuts bytes off the buffer.
    fn take(&mut self, len: usize) -> Vec<u8> {
        let rest = self.buffer.split_off(len);
        let taken = std::mem::replace(&mut self.buffer, rest);
        self.place.offset += to_u64(len);
        self.place.line += to_u64(taken.iter().filter(|&&byte| byte == b'\n').count());
        taken
    }

    /// Drops empty lines, so that a block starts where a document does. Says whether there were any.
    fn skip_blank_lines(&mut self) -> bool {
        let mut len = 0;
        while let Some(end) = self.buffer[len..].iter().position(|&byte| byte == b'\n') {
            if !self.buffer[len..len + end].trim_ascii().is_empty() {
                break;
            }
            len += end + 1;
        }
        drop(self.take(len));
        len > 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn blocks(text: &[u8], cut: Cut) -> Vec<String> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.txt");
        std::fs::write(&path, text).unwrap();
        let mut blocks = Blocks::open(&path, cut, Place::default()).unwrap();
        let (mut all, mut has_ended) = (Vec::new(), false);
        while let Some(block) = blocks.next().unwrap() {
            assert!(!has_ended);
            match block.content {
                Content::Bytes(bytes) => {
                    assert!(!bytes.is_empty());
                    all.push(String::from_utf8(bytes).unwrap());
                }
                #[cfg(feature = "parquet")]
                Content::Rows(_) => panic!("text has no rows"),
                Content::End => has_ended = true,
            }
        }
        assert!(has_ended, "the last block says that the file ends");
        all
    }

    #[test]
    fn blocks_join_to_the_file_and_end_where_they_may() {
        let text = "some words and ümläute of varying lengths\n".repeat(20_000);
        for (cut, ends) in [(Cut::Space, " \n"), (Cut::Line, "\n"), (Cut::Piece, "\n")] {
            let blocks = blocks(text.as_bytes(), cut);
            assert!(blocks.len() > 2, "{cut:?}");
            assert_eq!(blocks.concat(), text);
            assert!(blocks.iter().all(|block| block.ends_with(|last| ends.contains(last))));
        }
    }

    #[test]
    fn paragraphs_stay_whole_unless_they_are_too_long() {
        let text = "one line\nand another\n\n".repeat(20_000);
        let whole = blocks(text.as_bytes(), Cut::BlankLine);
        assert!(whole.len() > 2);
        assert_eq!(whole.concat(), text);
        assert!(whole.iter().all(|block| block.starts_with("one") && block.ends_with("er\n\n")));

        let long = format!("\n\n \nshort\n\n{}\n\r\nlast", "word\n".repeat(200_000));
        let cut = blocks(long.as_bytes(), Cut::BlankLine);
        assert_eq!(cut[0], "short\n\n");
        assert_eq!(cut[1].len(), PIECE_BYTES / 5 * 5);
        assert_eq!(cut.concat(), long.trim_start(), "only empty lines before the first are gone");
    }

    #[test]
    fn a_piece_ends_after_a_line_with_words_on_both_sides() {
        let mut text = "x".repeat(PIECE_BYTES + 10).into_bytes();
        text[1000] = b'\n';
        text[2000..2002].copy_from_slice(b"\n\n");
        text[3000] = b' ';
        assert_eq!(piece_len(&text), Some(1001));
        text[1000] = b'x';
        assert_eq!(piece_len(&text), Some(2002));
        text[2000..2002].copy_from_slice(b"xx");
        assert_eq!(piece_len(&text), Some(3001));
        assert_eq!(piece_len(&text[..PIECE_BYTES]), None);
    }

    #[test]
    fn a_run_without_white_space_is_cut_at_a_character() {
        let text = "é".repeat(3 << 20);
        for cut in [Cut::Space, Cut::Piece, Cut::BlankLine] {
            let blocks = blocks(text.as_bytes(), cut);
            assert!(blocks.len() > 2, "{cut:?}");
            assert_eq!(blocks.concat(), text);
        }
    }

    #[test]
    fn a_run_is_cut_after_a_mebibyte_however_much_was_read() {
        let long = "x".repeat(5 << 20).into_bytes();
        assert_eq!(piece_len(&long), Some(RUN_BYTES_MAX - 1));
        assert_eq!(piece_len(&long[..RUN_BYTES_MAX]), Some(RUN_BYTES_MAX - 1));
        let spaced = [&long[..], b" more"].concat();
        assert_eq!(Cut::Space.block_len(&spaced, false), Ok(Some(RUN_BYTES_MAX - 1)));
        assert_eq!(Cut::Space.block_len(&spaced, true), Ok(Some(RUN_BYTES_MAX - 1)));
    }

    #[test]
    fn a_place_is_where_reading_goes_on() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.txt");
        let text = "a line of text\n".repeat(30_000);
        std::fs::write(&path, &text).unwrap();
        let mut whole = Blocks::open(&path, Cut::Line, Place::default()).unwrap();
        let (first, second) = (whole.next().unwrap().unwrap(), whole.next().unwrap().unwrap());
        assert_eq!(second.start.line, second.start.offset / 15);
        assert_eq!(second.start.offset, first.bytes);
        let mut later = Blocks::open(&path, Cut::Line, second.start).unwrap();
        let again = later.next().unwrap().unwrap();
        assert_eq!(again.start, second.start);
        let (Content::Bytes(a), Content::Bytes(b)) = (again.content, second.content) else {
            panic!("bytes")
        };
        assert_eq!(a, b);
    }

    #[test]
    fn empty_and_exactly_full_files_are_read() {
        for cut in [Cut::Space, Cut::Line, Cut::BlankLine, Cut::Piece] {
            assert!(blocks(b"", cut).is_empty());
            for len in [1, BLOCK_BYTES - 1, BLOCK_BYTES, BLOCK_BYTES + 1, 2 * BLOCK_BYTES] {
                let text = "ab ".repeat(len / 3 + 1)[..len].to_owned();
                assert_eq!(blocks(text.as_bytes(), cut).concat(), text, "{len} bytes");
            }
        }
    }
}
