//! Reading a text file in blocks, cut so that blocks can be worked on in parallel with the result
//! of the whole.
//!
//! Where a block may end is a [`CutRule`]. A file's last block is followed by an empty one that
//! says so.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::cast::to_u64;
use crate::error::{Error, Result};
use crate::text::cut::{CutRule, BLOCK_BYTES, LINE_BYTES_MAX};

/// A place in the input: everything before it is done.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct InputPosition {
    /// Number of the file.
    pub(crate) file: usize,
    /// Bytes.
    pub(crate) offset: u64,
    /// Lines before it.
    pub(crate) line: u64,
}

/// A part of a file.
#[derive(Debug)]
pub(crate) struct TextBlock {
    /// Where it starts.
    pub(crate) start: InputPosition,
    pub(crate) content: BlockContent,
    /// Bytes of the file that it stands for.
    pub(crate) bytes: u64,
    /// Whether it may begin in the middle of a document: one that is open goes on here.
    pub(crate) is_inside: bool,
}

/// What a block holds.
#[derive(Debug)]
pub(crate) enum BlockContent {
    /// Bytes of the file.
    Bytes(Vec<u8>),
    /// Rows of a table.
    #[cfg(feature = "parquet")]
    Rows(Texts),
    /// A line of more than [`LINE_BYTES_MAX`] bytes, of which nothing is kept.
    LongLine,
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

/// How far a file is read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum ReadState {
    /// There may be more.
    Reading,
    /// It has no more bytes than the buffer holds.
    AtEnd,
    /// Its end was handed out.
    Done,
}

/// The blocks of one file.
#[derive(Debug)]
pub(crate) struct TextBlocks {
    path: PathBuf,
    file: File,
    cut: CutRule,
    line_bytes_max: usize,
    buffer: Vec<u8>,
    /// Where `buffer` starts.
    place: InputPosition,
    state: ReadState,
    /// Whether `place` lies in the middle of a document.
    is_inside: bool,
}

impl TextBlocks {
    /// Starts at a place of the file at which a document begins.
    pub(crate) fn open(path: &Path, cut: CutRule, place: InputPosition) -> Result<Self> {
        let mut file = File::open(path).map_err(Error::io("open", path))?;
        file.seek(SeekFrom::Start(place.offset)).map_err(Error::io("read", path))?;
        let (path, buffer, line_bytes_max) = (path.to_path_buf(), Vec::new(), LINE_BYTES_MAX);
        let (state, is_inside) = (ReadState::Reading, false);
        Ok(TextBlocks { path, file, cut, line_bytes_max, buffer, place, state, is_inside })
    }

    /// The next block, or `None` after the one that ends the file.
    pub(crate) fn next(&mut self) -> Result<Option<TextBlock>> {
        while self.state != ReadState::Done {
            if self.cut == CutRule::BlankLine {
                self.skip_blank_lines();
            }
            if self.state == ReadState::AtEnd && self.buffer.is_empty() {
                self.state = ReadState::Done;
                let (start, content) = (self.place, BlockContent::End);
                let is_inside = self.is_inside;
                return Ok(Some(TextBlock { start, content, bytes: 0, is_inside }));
            }
            if self.is_long_line() {
                return self.long_line().map(Some);
            }
            match self.cut.block_len(&self.buffer, self.state == ReadState::AtEnd) {
                Some(len) => return Ok(Some(self.block(len))),
                None => self.fill()?,
            }
        }
        Ok(None)
    }

    /// Reads as much as the buffer holds already, so that long runs are not searched over and over.
    fn fill(&mut self) -> Result<()> {
        let wanted = self.buffer.len().max(BLOCK_BYTES);
        let mut part = self.file.by_ref().take(to_u64(wanted));
        let read = part.read_to_end(&mut self.buffer).map_err(Error::io("read", &self.path))?;
        if read < wanted {
            self.state = ReadState::AtEnd;
        }
        Ok(())
    }

    fn block(&mut self, len: usize) -> TextBlock {
        let start = self.place;
        let bytes = self.take(len);
        let is_inside = std::mem::replace(&mut self.is_inside, self.cut.goes_on(&bytes));
        TextBlock { start, content: BlockContent::Bytes(bytes), bytes: to_u64(len), is_inside }
    }

    /// Whether lines stay whole and the first one of the buffer is too long for that. Later ones
    /// are not: until the buffer had a line break it was no longer than a line may be, and it grows
    /// by as much at most.
    fn is_long_line(&self) -> bool {
        let first = self.buffer.get(..=self.line_bytes_max);
        self.cut == CutRule::Line && first.is_some_and(|bytes| !bytes.contains(&b'\n'))
    }

    /// Passes over the line that the buffer begins with.
    fn long_line(&mut self) -> Result<TextBlock> {
        let start = self.place;
        let mut has_ended = false;
        while !has_ended {
            let end = self.buffer.iter().position(|&byte| byte == b'\n');
            has_ended = end.is_some() || self.state == ReadState::AtEnd;
            drop(self.take(end.map_or(self.buffer.len(), |at| at + 1)));
            if !has_ended {
                self.fill()?;
            }
        }
        let bytes = self.place.offset - start.offset;
        Ok(TextBlock { start, content: BlockContent::LongLine, bytes, is_inside: false })
    }

    /// Cuts bytes off the buffer.
    fn take(&mut self, len: usize) -> Vec<u8> {
        let rest = self.buffer.split_off(len);
        let taken = std::mem::replace(&mut self.buffer, rest);
        self.place.offset += to_u64(len);
        self.place.line += to_u64(taken.iter().filter(|&&byte| byte == b'\n').count());
        taken
    }

    /// Drops empty lines, so that a block starts where a document does.
    fn skip_blank_lines(&mut self) {
        let mut len = 0;
        while let Some(end) = self.buffer[len..].iter().position(|&byte| byte == b'\n') {
            if !self.buffer[len..len + end].trim_ascii().is_empty() {
                break;
            }
            len += end + 1;
        }
        drop(self.take(len));
        self.is_inside &= len == 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::text::cut::PIECE_BYTES;

    fn blocks(text: &[u8], cut: CutRule) -> Vec<String> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.txt");
        std::fs::write(&path, text).unwrap();
        let mut blocks = TextBlocks::open(&path, cut, InputPosition::default()).unwrap();
        let (mut all, mut has_ended) = (Vec::new(), false);
        while let Some(block) = blocks.next().unwrap() {
            assert!(!has_ended);
            match block.content {
                BlockContent::Bytes(bytes) => {
                    assert!(!bytes.is_empty());
                    all.push(String::from_utf8(bytes).unwrap());
                }
                #[cfg(feature = "parquet")]
                BlockContent::Rows(_) => panic!("text has no rows"),
                BlockContent::LongLine => panic!("no line is that long"),
                BlockContent::End => has_ended = true,
            }
        }
        assert!(has_ended, "the last block says that the file ends");
        all
    }

    #[test]
    fn blocks_join_to_the_file_and_end_where_they_may() {
        let text = "some words and ümläute of varying lengths\n".repeat(20_000);
        for (cut, ends) in [(CutRule::Space, " \n"), (CutRule::Line, "\n")] {
            let blocks = blocks(text.as_bytes(), cut);
            assert!(blocks.len() > 2, "{cut:?}");
            assert_eq!(blocks.concat(), text);
            assert!(blocks.iter().all(|block| block.ends_with(|last| ends.contains(last))));
        }
        let pieces = blocks(text.as_bytes(), CutRule::Piece);
        assert!(pieces.len() > 2 && pieces.concat() == text);
        assert!(pieces[1..].iter().all(|piece| piece.starts_with(' ')));
    }

    #[test]
    fn paragraphs_stay_whole_unless_they_are_too_long() {
        let text = "one line\nand another\n\n".repeat(20_000);
        let whole = blocks(text.as_bytes(), CutRule::BlankLine);
        assert!(whole.len() > 2);
        assert_eq!(whole.concat(), text);
        assert!(whole.iter().all(|block| block.starts_with("one") && block.ends_with("er\n\n")));

        let long = format!("\n\n \nshort\n\n{}\n\r\nlast", "word\n".repeat(200_000));
        let cut = blocks(long.as_bytes(), CutRule::BlankLine);
        assert_eq!(cut[0], "short\n\n");
        assert_eq!(cut[1].len(), PIECE_BYTES / 5 * 5);
        assert_eq!(cut.concat(), long.trim_start(), "only empty lines before the first are gone");
    }

    #[test]
    fn blocks_say_whether_they_begin_in_the_middle_of_a_document() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.txt");
        let long = "word\n".repeat(300_000);
        std::fs::write(&path, format!("short\n\n{long}\n\n\n{long}")).unwrap();
        let inside = |cut| {
            let mut blocks = TextBlocks::open(&path, cut, InputPosition::default()).unwrap();
            let next = || blocks.next().unwrap().map(|block| block.is_inside);
            std::iter::from_fn(next).collect::<Vec<_>>()
        };
        let of_paragraphs = inside(CutRule::BlankLine);
        let begin: Vec<usize> = (0..of_paragraphs.len()).filter(|&at| !of_paragraphs[at]).collect();
        assert_eq!(begin.len(), 3, "as many as there are paragraphs: {of_paragraphs:?}");
        let of_file = inside(CutRule::Piece);
        assert!(!of_file[0] && of_file[1..].iter().all(|&is_inside| is_inside));
        assert!(inside(CutRule::Line).iter().all(|is_inside| !is_inside));
    }

    #[test]
    fn a_run_without_white_space_is_cut_at_a_character() {
        let text = "é".repeat(3 << 20);
        for cut in [CutRule::Space, CutRule::Piece, CutRule::BlankLine] {
            let blocks = blocks(text.as_bytes(), cut);
            assert!(blocks.len() > 2, "{cut:?}");
            assert_eq!(blocks.concat(), text);
        }
    }

    #[test]
    fn a_line_is_too_long_by_its_length_wherever_it_begins_and_the_next_one_is_read() {
        const MAX: usize = BLOCK_BYTES + 1000;
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.jsonl");
        for before in [0, 1, 999, BLOCK_BYTES - 2, BLOCK_BYTES - 1, BLOCK_BYTES, MAX, 2 * MAX] {
            let lens = [MAX, MAX + 1, 2 * MAX, 5 * MAX];
            for (len, after) in lens.into_iter().flat_map(|len| [(len, ""), (len, "\nlast")]) {
                let (first, long) = ("short\n".repeat(before / 6), "x".repeat(len));
                std::fs::write(&path, [&*first, &long, after].concat()).unwrap();
                let mut blocks =
                    TextBlocks::open(&path, CutRule::Line, InputPosition::default()).unwrap();
                blocks.line_bytes_max = MAX;
                let (mut kept, mut left_out, mut offset) = (Vec::new(), Vec::new(), 0);
                while let Some(block) = blocks.next().unwrap() {
                    assert_eq!(block.start.offset, offset);
                    offset += block.bytes;
                    match block.content {
                        BlockContent::Bytes(bytes) => kept.extend(bytes),
                        BlockContent::LongLine => left_out.push((block.start.line, block.bytes)),
                        BlockContent::End => {
                            assert_eq!(offset, to_u64(first.len() + len + after.len()));
                        }
                        #[cfg(feature = "parquet")]
                        BlockContent::Rows(_) => panic!("text has no rows"),
                    }
                }
                let (expected, places) = if len > MAX {
                    let place = (to_u64(before / 6), to_u64(len + after.len().min(1)));
                    ([&*first, after.trim_start()].concat(), vec![place])
                } else {
                    ([&*first, &long, after].concat(), Vec::new())
                };
                assert_eq!(left_out, places, "{len} bytes behind {before}");
                assert!(kept == expected.as_bytes(), "{len} bytes behind {before}");
            }
        }
    }

    #[test]
    fn a_place_is_where_reading_goes_on() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.txt");
        let text = "a line of text\n".repeat(30_000);
        std::fs::write(&path, &text).unwrap();
        let mut whole = TextBlocks::open(&path, CutRule::Line, InputPosition::default()).unwrap();
        let (first, second) = (whole.next().unwrap().unwrap(), whole.next().unwrap().unwrap());
        assert_eq!(second.start.line, second.start.offset / 15);
        assert_eq!(second.start.offset, first.bytes);
        let mut later = TextBlocks::open(&path, CutRule::Line, second.start).unwrap();
        let again = later.next().unwrap().unwrap();
        assert_eq!(again.start, second.start);
        let (BlockContent::Bytes(a), BlockContent::Bytes(b)) = (again.content, second.content)
        else {
            panic!("bytes")
        };
        assert_eq!(a, b);
    }

    #[test]
    fn empty_and_exactly_full_files_are_read() {
        for cut in [CutRule::Space, CutRule::Line, CutRule::BlankLine, CutRule::Piece] {
            assert!(blocks(b"", cut).is_empty());
            for len in [1, BLOCK_BYTES - 1, BLOCK_BYTES, BLOCK_BYTES + 1, 2 * BLOCK_BYTES] {
                let text = "ab ".repeat(len / 3 + 1)[..len].to_owned();
                assert_eq!(blocks(text.as_bytes(), cut).concat(), text, "{len} bytes");
            }
        }
    }
}
