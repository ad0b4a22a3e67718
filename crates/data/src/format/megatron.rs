//! Tokens as Megatron-LM keeps them: `PREFIX.bin` holds them, `PREFIX.idx` says where each sequence
//! and document is.
//!
//! ```text
//! PREFIX.idx   "MMIDIDX\0\0", u64 version 1, u8 type, u64 sequences n, u64 entries d of the document index,
//!              i32 lengths [n], i64 offsets in PREFIX.bin [n], i64 first sequence of each document, and n at last [d]
//! ```
//!
//! All numbers are little-endian. Multimodal files have i8 modes [n] after that; they are passed
//! over. Megatron itself does not check any of it; here everything is checked when a file is
//! opened, and nothing is kept in memory where sequences lie one behind the other, as Megatron's
//! own tools write them.
//! Source:
//! <https://github.com/NVIDIA/Megatron-LM/blob/main/megatron/core/datasets/indexed_dataset.py>.

use std::fmt::Display;
use std::ops::Range;
use std::path::{Path, PathBuf};

use super::bytes::SizedSource;
use super::special_tokens::SpecialTokens;
use super::tokens::Tokens;
use crate::batches::Scratch;
use crate::cast::{to_u64, to_usize};
use crate::error::{Error, Result};
use crate::fingerprint::{Fingerprint, Fingerprinter};
use crate::source::{Access, Folder};

const MAGIC: &[u8; 9] = b"MMIDIDX\0\0";
const HEADER_BYTES: u64 = 34;
/// Read at once while the index is checked.
const READ_ENTRIES: u64 = 1 << 16;

/// What tokens are on disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum TokenKind {
    U8,
    I8,
    I16,
    U16,
    I32,
    I64,
}

impl TokenKind {
    fn of_code(code: u8) -> std::result::Result<Self, String> {
        Ok(match code {
            1 => TokenKind::U8,
            2 => TokenKind::I8,
            3 => TokenKind::I16,
            4 => TokenKind::I32,
            5 => TokenKind::I64,
            8 => TokenKind::U16,
            6 | 7 => {
                return Err(format!("type code {code} is that of real numbers, not of tokens"))
            }
            _ => return Err(format!("type code {code} is none of 1, 2, 3, 4, 5, 8")),
        })
    }

    const fn bytes(self) -> usize {
        match self {
            TokenKind::U8 | TokenKind::I8 => 1,
            TokenKind::I16 | TokenKind::U16 => 2,
            TokenKind::I32 => 4,
            TokenKind::I64 => 8,
        }
    }
}

/// The tokens of a Megatron file pair as one stream, readable in any order from many threads.
#[derive(Debug)]
pub struct MegatronTokens {
    bin: SizedSource,
    idx: SizedSource,
    kind: TokenKind,
    sequences: u64,
    /// Entries of the document index: one more than there are documents.
    document_entries: u64,
    token_count: u64,
    vocab_size: u32,
    special: SpecialTokens,
    /// Where sequences start in the stream, and where the last one ends; only where there is other
    /// data between them.
    starts: Option<Vec<u64>>,
    /// Of the files alone, and with what was said of special tokens.
    files: Fingerprint,
    fingerprint: Fingerprint,
}

/// `PREFIX.idx` or `PREFIX.bin`; a prefix may hold dots.
fn with_suffix(prefix: &Path, suffix: &str) -> PathBuf {
    let mut name = prefix.as_os_str().to_owned();
    name.push(suffix);
    name.into()
}

impl MegatronTokens {
    /// Opens `PREFIX.bin` and `PREFIX.idx`, and reads the index once to check it. `vocab_size`:
    /// tokens are below it; the files do not say.
    ///
    /// # Errors
    /// [`Error::Io`], and [`Error::BadIndex`] that says which number is wrong.
    pub fn open(prefix: &Path, vocab_size: u32, access: Access) -> Result<Self> {
        let idx = SizedSource::open(&with_suffix(prefix, ".idx"), access, None)?;
        let bin = SizedSource::open(&with_suffix(prefix, ".bin"), access, None)?;
        Self::of(bin, idx, vocab_size)
    }

    /// Opens `NAME.bin` and `NAME.idx` of a folder, wherever it lies.
    ///
    /// # Errors
    /// As [`open`](Self::open), and what the folder says.
    pub fn open_from(folder: &dyn Folder, name: &str, vocab_size: u32) -> Result<Self> {
        let idx = SizedSource::of(folder.open(&format!("{name}.idx"))?, None)?;
        let bin = SizedSource::of(folder.open(&format!("{name}.bin"))?, None)?;
        Self::of(bin, idx, vocab_size)
    }

    fn of(bin: SizedSource, idx: SizedSource, vocab_size: u32) -> Result<Self> {
        let bad = |reason: String| Error::BadIndex { path: idx.path().to_path_buf(), reason };
        if idx.len() < HEADER_BYTES {
            return Err(bad(format!("{} bytes are too few for a header", idx.len())));
        }
        let mut scratch = Vec::new();
        let header = idx.read(0, to_usize(HEADER_BYTES), &mut scratch)?;
        let word = |at: usize| {
            let mut bytes = [0; 8];
            bytes.copy_from_slice(&header[at..at + 8]);
            u64::from_le_bytes(bytes)
        };
        if header[..9] != MAGIC[..] {
            return Err(bad("it does not begin as a Megatron index (MMIDIDX)".to_owned()));
        }
        if word(9) != 1 {
            return Err(bad(format!("version {} is not 1", word(9))));
        }
        let kind = TokenKind::of_code(header[17]).map_err(bad)?;
        let (sequences, document_entries) = (word(18), word(26));
        let bytes = |extra: u64| {
            let of_sequences = sequences.checked_mul(12 + extra)?;
            let of_documents = document_entries.checked_mul(8)?;
            HEADER_BYTES.checked_add(of_sequences)?.checked_add(of_documents)
        };
        if bytes(0) != Some(idx.len()) && bytes(1) != Some(idx.len()) {
            let (is, len) =
                (format!("{sequences} sequences and {document_entries} documents"), idx.len());
            return Err(bad(format!("{is} do not fit its {len} bytes: it was cut off")));
        }
        let sum = Fingerprinter::new("megatron 1").number(bin.len()).number(u64::from(vocab_size));
        let mut tokens = MegatronTokens {
            bin,
            idx,
            kind,
            sequences,
            document_entries,
            token_count: 0,
            vocab_size,
            special: SpecialTokens::default(),
            starts: None,
            files: Fingerprint(0),
            fingerprint: Fingerprint(0),
        };
        let sum = tokens.check_sequences(sum)?;
        tokens.files = tokens.check_documents(sum)?.finish();
        tokens.fingerprint = tokens.files;
        Ok(tokens)
    }

    fn bad(&self, reason: String) -> Error {
        Error::BadIndex { path: self.idx.path().to_path_buf(), reason }
    }

    fn offsets_at(&self) -> u64 {
        HEADER_BYTES + 4 * self.sequences
    }

    fn documents_at(&self) -> u64 {
        self.offsets_at() + 8 * self.sequences
    }

    /// Checks that sequences follow each other inside the .bin, and counts tokens.
    fn check_sequences(&mut self, mut sum: Fingerprinter) -> Result<Fingerprinter> {
        let size = to_u64(self.kind.bytes());
        let (mut lengths, mut offsets) = (Vec::new(), Vec::new());
        let (mut end, mut tokens, mut has_gaps) = (0_u64, 0_u64, false);
        for first in (0..self.sequences).step_by(to_usize(READ_ENTRIES)) {
            let count = READ_ENTRIES.min(self.sequences - first);
            let lengths =
                self.idx.read(HEADER_BYTES + 4 * first, to_usize(4 * count), &mut lengths)?;
            let offsets =
                self.idx.read(self.offsets_at() + 8 * first, to_usize(8 * count), &mut offsets)?;
            sum = sum.number(u64::from(crc32c::crc32c(lengths)));
            sum = sum.number(u64::from(crc32c::crc32c(offsets)));
            let entries = lengths.as_chunks::<4>().0.iter().zip(offsets.as_chunks::<8>().0);
            for (sequence, (length, offset)) in (first..).zip(entries) {
                let (length, offset) = (i32::from_le_bytes(*length), i64::from_le_bytes(*offset));
                let (Ok(length), Ok(offset)) = (u64::try_from(length), u64::try_from(offset))
                else {
                    let what = format!("sequence {sequence} has {length} tokens at {offset}");
                    return Err(self.bad(what));
                };
                let is_apart = offset < end || !offset.is_multiple_of(size);
                let upto = offset.checked_add(length * size).filter(|&upto| upto <= self.bin.len());
                let (Some(upto), false) = (upto, is_apart) else {
                    return Err(self.bad(format!(
                        "sequence {sequence}, {length} tokens at {offset}, does not lie behind the one before (which ends at {end}) inside the {} bytes of the .bin",
                        self.bin.len()
                    )));
                };
                has_gaps |= offset != end;
                tokens += length;
                end = upto;
            }
        }
        self.token_count = tokens;
        if has_gaps {
            let mut starts = Vec::with_capacity(to_usize(self.sequences) + 1);
            let mut start = 0;
            for sequence in 0..self.sequences {
                starts.push(start);
                start += self.length(sequence)?;
            }
            starts.push(start);
            // Lengths were read twice.
            if start != tokens {
                return Err(self.bad(format!(
                    "it changed while it was opened: it had {tokens} tokens, then {start}"
                )));
            }
            self.starts = Some(starts);
        }
        Ok(sum)
    }

    /// Checks that documents begin at sequences, one after the other.
    fn check_documents(&self, mut sum: Fingerprinter) -> Result<Fingerprinter> {
        let mut buffer = Vec::new();
        let mut before = 0;
        for first in (0..self.document_entries).step_by(to_usize(READ_ENTRIES)) {
            let count = READ_ENTRIES.min(self.document_entries - first);
            let at = self.documents_at() + 8 * first;
            let bytes = self.idx.read(at, to_usize(8 * count), &mut buffer)?;
            sum = sum.number(u64::from(crc32c::crc32c(bytes)));
            for (document, entry) in (first..).zip(bytes.as_chunks::<8>().0) {
                let sequence = i64::from_le_bytes(*entry);
                let good = u64::try_from(sequence).ok().filter(|&sequence| {
                    sequence <= self.sequences
                        && if document == 0 { sequence == 0 } else { sequence >= before }
                });
                let Some(good) = good else {
                    return Err(self.bad(format!(
                        "document {document} begins at sequence {sequence}, the one before at {before}, and there are {}",
                        self.sequences
                    )));
                };
                before = good;
            }
        }
        self.idx.check(0..self.idx.len())?;
        if before != self.sequences {
            let have = self.sequences;
            return Err(self.bad(format!("its documents end at sequence {before} of {have}")));
        }
        Ok(sum)
    }

    fn length(&self, sequence: u64) -> Result<u64> {
        let bytes = self.idx.array(HEADER_BYTES + 4 * sequence)?;
        Ok(u64::from(i32::from_le_bytes(bytes).unsigned_abs()))
    }

    fn word(&self, at: u64) -> Result<u64> {
        Ok(u64::from_le_bytes(self.idx.array(at)?))
    }

    /// Where a sequence begins in the stream.
    fn start(&self, sequence: u64) -> Result<u64> {
        if sequence == self.sequences {
            return Ok(self.token_count);
        }
        match &self.starts {
            Some(starts) => starts.get(to_usize(sequence)).copied().ok_or_else(|| {
                self.bad(format!("there is no sequence {sequence}: it changed since it was opened"))
            }),
            None => {
                let offset = self.word(self.offsets_at() + 8 * sequence)?;
                Ok(offset / to_u64(self.kind.bytes()))
            }
        }
    }

    /// How many sequences there are: what was one line of text, or one sentence.
    pub fn sequence_count(&self) -> u64 {
        self.sequences
    }

    /// Says which tokens are no text: the files do not.
    ///
    /// # Errors
    /// [`Error::InvalidOption`] for a token outside the vocabulary.
    pub fn with_special(mut self, special: SpecialTokens) -> Result<Self> {
        if let Some(id) = special.all().find(|&id| id >= self.vocab_size) {
            let reason = format!("the vocabulary has {} entries", self.vocab_size);
            return Err(Error::option("special", id, reason));
        }
        self.special = special;
        // They decide about masks and documents. Data of which nothing was said keep the
        // fingerprint of their files.
        self.fingerprint = if special == SpecialTokens::default() {
            self.files
        } else {
            let sum = Fingerprinter::new("megatron special 1").number(self.files.0);
            special.add_to(sum).finish()
        };
        Ok(self)
    }

    /// Reads tokens that lie one behind the other: those after the first `before` of a read that
    /// started at `start`.
    fn read_at(
        &self,
        offset: u64,
        (start, before): (u64, usize),
        out: &mut [i64],
        scratch: &mut Scratch,
        reading: &dyn Display,
    ) -> Result<()> {
        self.copy_at(offset, out, scratch)
            .map_err(|error| error.while_reading(reading, self.bin.path(), offset))?;
        let range = 0..i64::from(self.vocab_size);
        match out.iter().position(|token| !range.contains(token)) {
            None => Ok(()),
            Some(position) => Err(Error::BadValue {
                path: self.bin.path().to_path_buf(),
                sample: start,
                position: before + position,
                value: out[position],
                reason: format!(
                    "found while reading {reading}; the vocabulary has {} entries: give the size of the tokenizer's",
                    self.vocab_size
                ),
            }),
        }
    }

    /// Widens the numbers from `offset` of the .bin on.
    fn copy_at(&self, offset: u64, out: &mut [i64], scratch: &mut Scratch) -> Result<()> {
        let len = out.len() * self.kind.bytes();
        let bytes = self.bin.read(offset, len, &mut scratch.bytes)?;
        match self.kind {
            TokenKind::U8 => copy(out, bytes, |le| i64::from(u8::from_le_bytes(le))),
            TokenKind::I8 => copy(out, bytes, |le| i64::from(i8::from_le_bytes(le))),
            TokenKind::I16 => copy(out, bytes, |le| i64::from(i16::from_le_bytes(le))),
            TokenKind::U16 => copy(out, bytes, |le| i64::from(u16::from_le_bytes(le))),
            TokenKind::I32 => copy(out, bytes, |le| i64::from(i32::from_le_bytes(le))),
            TokenKind::I64 => copy(out, bytes, i64::from_le_bytes),
        }
        self.bin.check(offset..offset + to_u64(len))
    }
}

impl Tokens for MegatronTokens {
    fn token_count(&self) -> u64 {
        self.token_count
    }

    fn vocab_size(&self) -> u32 {
        self.vocab_size
    }

    /// The tokens that are no text, as far as they were given.
    fn special(&self) -> SpecialTokens {
        self.special
    }

    /// Identifies the files, by their index and sizes, and the special tokens that were given.
    fn fingerprint(&self) -> Fingerprint {
        self.fingerprint
    }

    /// # Errors
    /// [`Error::NoSuchSample`] beyond the end, [`Error::WrongSize`], [`Error::Io`], and
    /// [`Error::BadValue`] for tokens that are no entry of the vocabulary.
    fn read(
        &self,
        start: u64,
        out: &mut [i64],
        scratch: &mut Scratch,
        reading: &dyn Display,
    ) -> Result<()> {
        let end = start.checked_add(to_u64(out.len())).filter(|&end| end <= self.token_count);
        if end.is_none() {
            return Err(Error::NoSuchSample { sample: start, samples: self.token_count });
        }
        let size = to_u64(self.kind.bytes());
        let Some(starts) = &self.starts else {
            return self.read_at(start * size, (start, 0), out, scratch, reading);
        };
        let mut sequence = starts.partition_point(|&begin| begin <= start).saturating_sub(1);
        let (mut at, mut rest) = (start, out);
        while !rest.is_empty() {
            let there = to_usize((starts[sequence + 1] - at).min(to_u64(rest.len())));
            let (now, later) = rest.split_at_mut(there);
            let entry = self.offsets_at() + 8 * to_u64(sequence);
            let offset = self
                .word(entry)
                .map_err(|error| error.while_reading(reading, self.idx.path(), entry))?;
            let offset = offset + (at - starts[sequence]) * size;
            self.read_at(offset, (start, to_usize(at - start)), now, scratch, reading)?;
            at += to_u64(there);
            rest = later;
            sequence += 1;
        }
        Ok(())
    }

    fn document_count(&self) -> u64 {
        self.document_entries.saturating_sub(1)
    }

    /// # Errors
    /// [`Error::NoSuchSample`] and [`Error::Io`].
    fn document(&self, document: u64, _scratch: &mut Scratch) -> Result<Range<u64>> {
        let samples = self.document_count();
        if document >= samples {
            return Err(Error::NoSuchSample { sample: document, samples });
        }
        let at = self.documents_at() + 8 * document;
        let bounds = || {
            let (first, after) = (self.word(at)?, self.word(at + 8)?);
            Ok(self.start(first)?..self.start(after)?)
        };
        bounds().map_err(|error: Error| {
            let reading = format_args!("the bounds of document {document}");
            error.while_reading(&reading, self.idx.path(), at)
        })
    }

    /// Does nothing where there is other data between sequences.
    fn will_need(&self, tokens: Range<u64>) {
        if self.starts.is_none() {
            let size = to_u64(self.kind.bytes());
            let end = tokens.end.min(self.token_count);
            self.bin.will_need(tokens.start.min(end) * size..end * size);
        }
    }
}

/// Widens numbers of `N` bytes.
fn copy<const N: usize>(out: &mut [i64], from: &[u8], widen: impl Fn([u8; N]) -> i64) {
    for (token, le) in out.iter_mut().zip(from.as_chunks().0) {
        *token = widen(*le);
    }
}
