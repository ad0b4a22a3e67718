//! All shards of a prepared folder as one stream of tokens.

use std::fmt::Display;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::bytes::Bytes;
use super::files::Listed;
use super::index::{Index, ShardEntry, TOKENIZER_FILE};
use super::shard::Shard;
use crate::cast::{to_u64, to_usize};
use crate::damage::{self, ShardDamage};
use crate::error::{Error, Result};
use crate::fingerprint::Fingerprinter;
use crate::samples::Scratch;
use crate::source::{Access, Folder, LocalFolder, Source};
use crate::whole_words::{self, Continuations};

/// The tokens of a prepared folder, readable in any order from many threads.
#[derive(Debug)]
pub struct TokenStream {
    folder: PathBuf,
    index: Index,
    /// None: it is lost.
    shards: Vec<Option<Shard>>,
    /// Where each shard starts in the stream, and where the last one ends.
    starts: Vec<u64>,
    /// The same of documents.
    document_starts: Vec<u64>,
    /// What is known of each shard.
    known: Vec<ShardDamage>,
    /// Tokens that are known to be damaged.
    damaged: Vec<Range<u64>>,
    tokenizer: Option<Arc<dyn Source>>,
}

impl TokenStream {
    /// Opens a prepared folder: index, sizes and headers are checked; tokens are verified when they are first touched.
    ///
    /// # Errors
    /// [`Error::Io`], [`Error::BadIndex`], or what is wrong with a shard: its size, header, dtype or shape.
    pub fn open(folder: &Path, access: Access) -> Result<Self> {
        Self::open_from(&LocalFolder::new(folder, access))
    }

    /// Opens a prepared folder wherever it lies.
    ///
    /// # Errors
    /// As [`open`](Self::open), and what the folder says.
    pub fn open_from(folder: &dyn Folder) -> Result<Self> {
        let index = Index::read_from(folder)?;
        let listed: Vec<Listed<'_>> = index.shards.iter().map(ShardEntry::listed).collect();
        let known = damage::read(folder, index.fingerprint, &listed)?;
        let shards: Vec<Option<Shard>> = index
            .shards
            .iter()
            .zip(&known)
            .map(|(entry, known)| match known.is_lost {
                true => Ok(None),
                false => Shard::open(folder, entry, index.dtype).map(Some),
            })
            .collect::<Result<_>>()?;
        let starts = running_sums(index.shards.iter().map(|shard| shard.token_count));
        let document_starts = running_sums(index.shards.iter().map(|shard| shard.document_count));
        let tokenizer = folder.find(TOKENIZER_FILE)?;
        let folder = folder.name().to_path_buf();
        let damaged = Vec::new();
        let mut stream = TokenStream {
            folder,
            index,
            shards,
            starts,
            document_starts,
            known,
            damaged,
            tokenizer,
        };
        stream.damaged =
            stream.damaged_ranges(&stream.starts, |shard, blocks| Ok(shard.tokens_of(blocks)))?;
        Ok(stream)
    }

    /// Of each shard what `of_blocks` finds in its damaged blocks, or all of it; counted in the stream, of which `starts` says
    /// where shards begin.
    fn damaged_ranges(
        &self,
        starts: &[u64],
        of_blocks: impl Fn(&Shard, &[u64]) -> Result<Vec<Range<u64>>>,
    ) -> Result<Vec<Range<u64>>> {
        let mut all = Vec::new();
        for (at, (shard, known)) in self.shards.iter().zip(&self.known).enumerate() {
            let within = match shard {
                None => std::iter::once(0..starts[at + 1] - starts[at]).collect(),
                Some(shard) => of_blocks(shard, &known.blocks)?,
            };
            all.extend(within.iter().map(|range| starts[at] + range.start..starts[at] + range.end));
        }
        Ok(damage::merged(all))
    }

    /// Tokens that lie in blocks that are known to be damaged (see [`record_damage`](crate::record_damage)): ascending.
    pub fn damaged(&self) -> &[Range<u64>] {
        &self.damaged
    }

    /// Documents that have tokens or bounds in such blocks: ascending. Reads the bounds of all documents of those shards.
    ///
    /// # Errors
    /// [`Error::Damaged`] where bounds lie in a damaged block that is not listed, and [`Error::Io`].
    pub fn damaged_documents(&self) -> Result<Vec<Range<u64>>> {
        self.damaged_ranges(&self.document_starts, Shard::documents_of)
    }

    /// Which tokens continue a word, by the folder's `tokenizer.json`.
    ///
    /// # Errors
    /// [`Error::Tokenizer`] if there is none, if it is not the one that the tokens were made with, or if it does not tell words
    /// apart; and what kept it from being read.
    pub fn continuations(&self) -> Result<Continuations> {
        let json = self.tokenizer_json()?;
        let path = self.folder.join(TOKENIZER_FILE);
        let found = Fingerprinter::new(TOKENIZER_FILE).bytes(&json).finish();
        if found != self.index.tokenizer {
            let expected = self.index.tokenizer;
            return Err(whole_words::failed(&path, &format!(
                "it is not the tokenizer of these tokens (fingerprint {found}, the index says {expected}): copy the one that they were made with"
            )));
        }
        Continuations::of_json(&json, self.index.vocab_size, &path)
    }

    fn tokenizer_json(&self) -> Result<Vec<u8>> {
        let path = self.folder.join(TOKENIZER_FILE);
        let Some(source) = &self.tokenizer else {
            return Err(whole_words::failed(
                &path,
                "it is not there: copy it from where the data was prepared",
            ));
        };
        let bytes = Bytes::of(Arc::clone(source), None)?;
        let mut scratch = Vec::new();
        let json = bytes.read(0, to_usize(bytes.len()), &mut scratch)?.to_vec();
        bytes.check(0..bytes.len())?;
        Ok(json)
    }

    /// What the folder says it holds.
    pub fn index(&self) -> &Index {
        &self.index
    }

    /// The folder.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// How many tokens there are.
    pub fn token_count(&self) -> u64 {
        self.index.token_count
    }

    /// Reads tokens from `start` on, as many as `out` holds, across shards where need be. `reading` names them in errors.
    ///
    /// # Errors
    /// [`Error::NoSuchSample`] beyond the end, [`Error::Damaged`], [`Error::WrongSize`], [`Error::Io`], and
    /// [`Error::BadValue`] for tokens that are no entry of the vocabulary.
    pub fn read(
        &self,
        start: u64,
        out: &mut [i64],
        scratch: &mut Scratch,
        reading: &dyn Display,
    ) -> Result<()> {
        let end = start.checked_add(to_u64(out.len())).filter(|&end| end <= self.token_count());
        if end.is_none() {
            return Err(Error::NoSuchSample { sample: start, samples: self.token_count() });
        }
        let mut shard = self.shard_of(start);
        let (mut at, mut rest) = (start, out);
        while !rest.is_empty() {
            let available = to_usize((self.starts[shard + 1] - at).min(to_u64(rest.len())));
            let (now, later) = rest.split_at_mut(available);
            let of_shard = self.shard(shard, reading)?;
            let largest = of_shard.read(at - self.starts[shard], now, scratch, reading)?;
            if largest >= self.index.vocab_size {
                return Err(self.bad_value(shard, start, at, now));
            }
            at += to_u64(available);
            rest = later;
            shard += 1;
        }
        Ok(())
    }

    /// How many documents there are.
    pub fn document_count(&self) -> u64 {
        self.document_starts.last().copied().unwrap_or(0)
    }

    /// The tokens of a document. Its bounds are read where they are stored: no list of them is kept in memory.
    ///
    /// # Errors
    /// [`Error::NoSuchSample`] for a document that does not exist, [`Error::BadDocument`], [`Error::Damaged`],
    /// [`Error::WrongSize`], [`Error::Io`].
    pub fn document(&self, document: u64, scratch: &mut Scratch) -> Result<Range<u64>> {
        let samples = self.document_count();
        if document >= samples {
            return Err(Error::NoSuchSample { sample: document, samples });
        }
        let after = self.document_starts.partition_point(|&begin| begin <= document);
        let shard = after.saturating_sub(1);
        let reading = format_args!("the bounds of document {document}");
        let of_shard = self.shard(shard, &reading)?;
        let within =
            of_shard.document(document - self.document_starts[shard], scratch, &reading)?;
        let start = self.starts[shard];
        Ok(start + within.start..start + within.end)
    }

    /// Has the processor load `len` tokens from `start` on, which will be read soon. Costs little where that is of no use.
    #[inline]
    pub fn expect(&self, start: u64, len: usize) {
        let shard = self.shard_of(start);
        if let Some(Some(of_start)) = self.shards.get(shard) {
            of_start.expect(start - self.starts[shard], len);
        }
    }

    /// Has these tokens fetched from the disk, where that can be asked for.
    pub fn will_need(&self, tokens: Range<u64>) {
        for (shard, bounds) in self.shards.iter().zip(self.starts.windows(2)) {
            let (start, end) = (tokens.start.max(bounds[0]), tokens.end.min(bounds[1]));
            if let Some(shard) = shard.as_ref().filter(|_| start < end) {
                shard.will_need(start - bounds[0]..end - bounds[0]);
            }
        }
    }

    /// The shard that holds token `start`.
    #[inline]
    fn shard_of(&self, start: u64) -> usize {
        self.starts.partition_point(|&begin| begin <= start).saturating_sub(1)
    }

    /// A shard, unless it is lost.
    #[inline]
    fn shard(&self, at: usize, reading: &dyn Display) -> Result<&Shard> {
        self.shards[at].as_ref().ok_or_else(|| {
            let (path, reading) = (self.path(at), reading.to_string());
            Error::Lost { path, reading }
        })
    }

    fn path(&self, shard: usize) -> PathBuf {
        self.folder.join(&self.index.shards[shard].file)
    }

    /// The first token of `tokens` that is no entry of the vocabulary. They start at `at`, the read started at `start`.
    fn bad_value(&self, shard: usize, start: u64, at: u64, tokens: &[i64]) -> Error {
        let vocab_size = i64::from(self.index.vocab_size);
        let index = tokens.iter().position(|&token| token >= vocab_size).unwrap_or(0);
        Error::BadValue {
            path: self.path(shard),
            sample: start,
            position: to_usize(at - start) + index,
            value: tokens[index],
            reason: format!("the vocabulary has {vocab_size} entries; prepare the data again"),
        }
    }

    /// Reads everything once and compares all checksums.
    ///
    /// # Errors
    /// [`Error::Damaged`] for the first block that differs, [`Error::WrongSize`], [`Error::Io`].
    pub fn verify(&self) -> Result<()> {
        let mut scratch = Scratch::default();
        for at in 0..self.shards.len() {
            let shard = self.shard(at, &"everything")?;
            shard.verify(0..shard.file_bytes(), &mut scratch, &"everything")?;
        }
        Ok(())
    }
}

/// Where each part starts, and where the last one ends. The index has checked that the sums do not overflow.
fn running_sums(counts: impl Iterator<Item = u64>) -> Vec<u64> {
    let mut sums = vec![0];
    let mut end = 0_u64;
    for count in counts {
        end = end.saturating_add(count);
        sums.push(end);
    }
    sums
}
