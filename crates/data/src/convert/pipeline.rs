//! Input in blocks, worked on by all threads, handed on in order.
//!
//! As many blocks as keep all threads busy are read, worked on in parallel, and handed on; then the
//! next. Memory is bounded by that, and the result does not depend on the number of threads.

use rayon::prelude::*;

#[cfg(feature = "parquet")]
use super::block::Texts;
use super::block::{BlockContent, InputPosition, TextBlock, TextBlocks};
use super::documents::{self, BadJson, Passage};
use super::input::InputFile;
use super::options::{BadLines, Document, Format};
#[cfg(feature = "parquet")]
use super::rows::TableRows;
use crate::cast::to_u64;
use crate::error::{Error, Result};
use crate::text::cut::{CutRule, LINE_BYTES_MAX};

/// Blocks in flight for each thread: enough that a slow one does not make the others wait, few
/// enough to bound memory.
const BLOCKS_PER_THREAD: usize = 16;

/// Bytes in flight for each thread, if blocks are large.
const BYTES_PER_THREAD: u64 = 16 << 20;

/// What is read, and how it is told apart.
#[derive(Clone, Debug)]
pub(crate) struct TextInput {
    pub(crate) files: Vec<InputFile>,
    pub(crate) format: Format,
    pub(crate) unit: Document,
    pub(crate) field: String,
    pub(crate) bad_lines: BadLines,
}

impl TextInput {
    pub(crate) fn bytes(&self) -> u64 {
        self.files.iter().map(|file| file.bytes).sum()
    }

    /// Calls `work` on all blocks from `place` on, in parallel, and `take` on what it gave, in
    /// order. Must run in a rayon pool.
    pub(crate) fn for_each<T: Send>(
        &self,
        place: InputPosition,
        cut: CutRule,
        work: impl Fn(&TextBlock) -> Result<T> + Sync,
        mut take: impl FnMut(T) -> Result<()>,
    ) -> Result<()> {
        let threads = rayon::current_num_threads();
        let (count, bytes) = (threads * BLOCKS_PER_THREAD, to_u64(threads) * BYTES_PER_THREAD);
        let mut waiting = Vec::with_capacity(count);
        let mut waiting_bytes = 0;
        let mut hand_on = |blocks: &mut Vec<TextBlock>| -> Result<()> {
            // In order up to the first error, so that the same one is reported whatever the threads
            // do.
            let done: Vec<Result<T>> = blocks.par_iter().map(&work).collect();
            blocks.clear();
            done.into_iter().try_for_each(|result| take(result?))
        };
        for (number, file) in self.files.iter().enumerate().skip(place.file) {
            let start = if number == place.file {
                place
            } else {
                InputPosition { file: number, ..InputPosition::default() }
            };
            let mut reader = self.open(file, cut, start)?;
            while let Some(block) = reader.next()? {
                waiting_bytes += block.bytes;
                waiting.push(block);
                if waiting.len() >= count || waiting_bytes >= bytes {
                    hand_on(&mut waiting)?;
                    waiting_bytes = 0;
                }
            }
        }
        hand_on(&mut waiting)
    }

    fn open(&self, file: &InputFile, cut: CutRule, start: InputPosition) -> Result<BlockReader> {
        let cut = match self.format {
            #[cfg(feature = "parquet")]
            Format::Parquet | Format::Arrow => {
                return Ok(BlockReader::Rows(TableRows::open(&file.path, &self.field, start)?));
            }
            Format::Text => cut,
            _ => CutRule::Line,
        };
        Ok(BlockReader::Text(TextBlocks::open(&file.path, cut, start)?))
    }

    /// Calls `each` for every segment of a block; gives how many bad lines were left out before
    /// each.
    pub(crate) fn segments(
        &self,
        block: &TextBlock,
        mut each: impl FnMut(Passage<'_>, u64) -> Result<()>,
    ) -> Result<u64> {
        let InputPosition { file, offset, line } = block.start;
        let path = || self.files[file].path.clone();
        // How many lines are left out for it.
        let bad_line = |bad: BadJson| match self.bad_lines {
            BadLines::Skip => Ok(1),
            BadLines::Refuse => {
                let (line, reason) = (line + bad.line, bad.reason);
                Err(Error::BadLine { path: path(), line, reason })
            }
        };
        let mut skipped = 0;
        match &block.content {
            BlockContent::End => {}
            #[cfg(feature = "parquet")]
            BlockContent::Rows(texts) => return self.rows(block, texts, each),
            BlockContent::LongLine => {
                let reason = format!("it has more than {LINE_BYTES_MAX} bytes");
                skipped += bad_line(BadJson { line: 1, reason })?;
            }
            BlockContent::Bytes(bytes) if self.format == Format::Text => {
                let text = std::str::from_utf8(bytes).map_err(|error| {
                    let offset = offset + to_u64(error.valid_up_to());
                    Error::InvalidUtf8 { path: path(), offset }
                })?;
                documents::of_text(text, self.unit, |segment| each(segment, 0))?;
            }
            BlockContent::Bytes(bytes) => {
                documents::of_json_lines(bytes, offset, &self.field, |found| match found {
                    Ok(segment) => each(segment, skipped),
                    Err(bad) => {
                        skipped += bad_line(bad)?;
                        Ok(())
                    }
                })?;
            }
        }
        Ok(skipped)
    }

    #[cfg(feature = "parquet")]
    /// The same of rows, each of which is a document.
    fn rows(
        &self,
        block: &TextBlock,
        texts: &Texts,
        mut each: impl FnMut(Passage<'_>, u64) -> Result<()>,
    ) -> Result<u64> {
        let mut skipped = 0;
        for (end, found) in (1..).zip(texts.iter()) {
            let lines = to_u64(end);
            match found {
                Ok(text) => {
                    let text = text.into();
                    each(Passage { text, end, lines, ends_document: true }, skipped)?;
                }
                Err(_) if self.bad_lines == BadLines::Skip => skipped += 1,
                Err(reason) => {
                    let path = self.files[block.start.file].path.clone();
                    let row = block.start.line + lines;
                    let reason = format!(
                        "{reason}; correct it, or leave such rows out with --skip-bad-lines"
                    );
                    return Err(Error::BadRow { path, row, column: self.field.clone(), reason });
                }
            }
        }
        Ok(skipped)
    }
}

/// The blocks of one file.
enum BlockReader {
    Text(TextBlocks),
    #[cfg(feature = "parquet")]
    Rows(TableRows),
}

impl BlockReader {
    fn next(&mut self) -> Result<Option<TextBlock>> {
        match self {
            BlockReader::Text(blocks) => blocks.next(),
            #[cfg(feature = "parquet")]
            BlockReader::Rows(rows) => rows.next(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::progress::Silent;

    #[test]
    fn a_line_of_which_nothing_is_kept_is_bad() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.jsonl");
        std::fs::write(&path, "").unwrap();
        let (files, _) = super::super::input::list(&[path], None, &Silent).unwrap();
        let (format, unit, field) = (Format::Text, Document::Line, "text".to_owned());
        let mut input = TextInput { files, format, unit, field, bad_lines: BadLines::Skip };
        let start = InputPosition { file: 0, offset: 700, line: 6 };
        let block =
            TextBlock { start, content: BlockContent::LongLine, bytes: 1 << 40, is_inside: false };
        for one in [Format::JsonLines, Format::Text] {
            input.format = one;
            input.bad_lines = BadLines::Skip;
            assert_eq!(input.segments(&block, |_, _| panic!("nothing is kept")).unwrap(), 1);
            input.bad_lines = BadLines::Refuse;
            let error = input.segments(&block, |_, _| Ok(())).unwrap_err().to_string();
            assert!(error.contains("a.jsonl, line 7: it has more than 268435456 bytes"), "{error}");
        }
    }
}
