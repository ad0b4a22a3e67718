//! Encoded blocks into shards, in order; after each shard the journal says how far the input is
//! done.

use super::block::{BlockContent, InputPosition, TextBlock};
use super::journal::{ConversionJournal, ConvertCounts, JournalEntry};
use super::pipeline::TextInput;
use crate::cast::to_u64;
use crate::error::Result;
use crate::format::TokenWriter;
use crate::text::encoder::Encoder;

/// The tokens of a block.
#[derive(Debug)]
pub(crate) struct Encoded {
    tokens: Vec<u32>,
    ends: Vec<DocumentEnd>,
    start: InputPosition,
    skipped_lines: u64,
    is_inside: bool,
    /// Where the input goes on, if a file ends with the block.
    next_file: Option<InputPosition>,
}

/// A document ends here.
#[derive(Clone, Copy, Debug)]
struct DocumentEnd {
    /// Tokens of the block before it.
    tokens: usize,
    /// Where the input goes on.
    next: InputPosition,
    /// Bad lines of the block before it.
    skipped_lines: u64,
}

/// Encodes a block.
pub(crate) fn encode(input: &TextInput, encoder: &Encoder, block: &TextBlock) -> Result<Encoded> {
    // English has some five letters a word and one token a word.
    let bytes = match &block.content {
        BlockContent::Bytes(bytes) => bytes.len(),
        #[cfg(feature = "parquet")]
        BlockContent::Rows(texts) => texts.bytes(),
        BlockContent::LongLine | BlockContent::End => 0,
    };
    let mut tokens = Vec::with_capacity(bytes / 4);
    let mut ends = Vec::new();
    let start = block.start;
    let mut is_first = true;
    let skipped_lines = input.segments(block, |segment, skipped_lines| {
        let goes_on = block.is_inside && std::mem::take(&mut is_first);
        encoder.encode(&segment.text, goes_on, &mut tokens)?;
        if segment.ends_document {
            let (offset, line) = (start.offset + to_u64(segment.end), start.line + segment.lines);
            let next = InputPosition { file: start.file, offset, line };
            ends.push(DocumentEnd { tokens: tokens.len(), next, skipped_lines });
        }
        Ok(())
    })?;
    let is_end = matches!(block.content, BlockContent::End);
    let next_file =
        is_end.then_some(InputPosition { file: start.file + 1, ..InputPosition::default() });
    let is_inside = block.is_inside;
    Ok(Encoded { tokens, ends, start, skipped_lines, is_inside, next_file })
}

/// Writes documents.
#[derive(Debug)]
pub(crate) struct TokenSink<'a> {
    pub(crate) writer: &'a mut TokenWriter,
    pub(crate) journal: Option<&'a mut ConversionJournal>,
    /// Closes each document.
    pub(crate) end_token: u32,
    pub(crate) unknown: Option<u32>,
    pub(crate) counts: ConvertCounts,
    /// Whether the current document has tokens.
    pub(crate) is_open: bool,
}

impl TokenSink<'_> {
    pub(crate) fn take(&mut self, block: &Encoded) -> Result<()> {
        if !block.is_inside {
            self.end_document(block.start)?;
        }
        let (mut from, before) = (0, self.counts.skipped_lines);
        for end in &block.ends {
            self.tokens(&block.tokens[from..end.tokens])?;
            from = end.tokens;
            self.counts.skipped_lines = before + end.skipped_lines;
            self.end_document(end.next)?;
        }
        self.tokens(&block.tokens[from..])?;
        self.counts.skipped_lines = before + block.skipped_lines;
        block.next_file.map_or(Ok(()), |next| self.end_document(next))
    }

    /// Closes the last shard; the input is done up to `place`.
    pub(crate) fn finish(&mut self, place: InputPosition) -> Result<ConvertCounts> {
        let before = self.writer.shards().len();
        self.writer.close_shard()?;
        self.note(before, place)?;
        Ok(self.counts)
    }

    fn tokens(&mut self, tokens: &[u32]) -> Result<()> {
        if tokens.is_empty() {
            return Ok(());
        }
        self.is_open = true;
        let unknown = tokens.iter().filter(|&&token| Some(token) == self.unknown).count();
        self.counts.unknown_tokens += to_u64(unknown);
        self.writer.tokens(tokens)
    }

    /// A document without tokens is none.
    fn end_document(&mut self, next: InputPosition) -> Result<()> {
        if !std::mem::take(&mut self.is_open) {
            return Ok(());
        }
        let before = self.writer.shards().len();
        self.writer.tokens(&[self.end_token])?;
        self.writer.end_document()?;
        self.note(before, next)
    }

    fn note(&mut self, shards_before: usize, next: InputPosition) -> Result<()> {
        let (Some(journal), Some(shard)) =
            (&mut self.journal, self.writer.shards().get(shards_before))
        else {
            return Ok(());
        };
        journal.add(&JournalEntry { shard: shard.clone(), next, counts: self.counts })
    }
}
