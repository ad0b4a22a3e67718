//! All shards of a prepared folder as one stream of tokens.

use std::fmt::Display;
use std::ops::Range;
use std::path::{Path, PathBuf};

use super::index::Index;
use super::shard::Shard;
use crate::cast::{to_u64, to_usize};
use crate::damage::{self, DamagedBlock};
use crate::error::{Error, Result};
use crate::samples::Scratch;
use crate::source::{Access, Folder, LocalFolder};

/// The tokens of a prepared folder, readable in any order from many threads.
#[derive(Debug)]
pub struct TokenStream {
    folder: PathBuf,
    index: Index,
    shards: Vec<Shard>,
    /// Where each shard starts in the stream, and where the last one ends.
    starts: Vec<u64>,
    /// The same of documents.
    document_starts: Vec<u64>,
    /// Tokens that are known to be damaged.
    damaged: Vec<Range<u64>>,
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
        let shards: Vec<Shard> = index
            .shards
            .iter()
            .map(|entry| Shard::open(folder, entry, index.dtype))
            .collect::<Result<_>>()?;
        let token_starts = running_sums(shards.iter().map(Shard::token_count));
        let document_starts = running_sums(shards.iter().map(Shard::document_count));
        let mut stream = TokenStream {
            folder: folder.name().to_path_buf(),
            index,
            shards,
            starts: token_starts,
            document_starts,
            damaged: Vec::new(),
        };
        stream.damaged = stream.damaged_tokens(&damage::read(folder, stream.index.fingerprint)?)?;
        Ok(stream)
    }

    fn damaged_tokens(&self, blocks: &[DamagedBlock]) -> Result<Vec<Range<u64>>> {
        let place = |listed: &DamagedBlock| {
            let at = self.index.shards.iter().position(|shard| shard.file == listed.file);
            match at.filter(|&at| listed.block < self.shards[at].block_count()) {
                Some(at) => Ok((at, listed.block)),
                None => Err(Error::BadDamageList {
                    path: self.folder.join(damage::DAMAGE_FILE),
                    reason: format!("there is no block {} of `{}`", listed.block, listed.file),
                }),
            }
        };
        let tokens = blocks.iter().map(|listed| {
            let (at, block) = place(listed)?;
            let (within, start) = (self.shards[at].tokens_of(block), self.starts[at]);
            Ok(start + within.start..start + within.end)
        });
        Ok(damage::merged(tokens.collect::<Result<_>>()?))
    }

    /// Tokens that lie in blocks that are known to be damaged (see [`record_damage`](crate::record_damage)): ascending.
    pub fn damaged(&self) -> &[Range<u64>] {
        &self.damaged
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
            let largest =
                self.shards[shard].read(at - self.starts[shard], now, scratch, reading)?;
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
        let within =
            self.shards[shard].document(document - self.document_starts[shard], scratch)?;
        let start = self.starts[shard];
        Ok(start + within.start..start + within.end)
    }

    /// Has the processor load `len` tokens from `start` on, which will be read soon. Costs little where that is of no use.
    #[inline]
    pub fn expect(&self, start: u64, len: usize) {
        let shard = self.shard_of(start);
        if let Some(of_start) = self.shards.get(shard) {
            of_start.expect(start - self.starts[shard], len);
        }
    }

    /// The shard that holds token `start`.
    #[inline]
    fn shard_of(&self, start: u64) -> usize {
        self.starts.partition_point(|&begin| begin <= start).saturating_sub(1)
    }

    /// The first token of `tokens` that is no entry of the vocabulary. They start at `at`, the read started at `start`.
    fn bad_value(&self, shard: usize, start: u64, at: u64, tokens: &[i64]) -> Error {
        let vocab_size = i64::from(self.index.vocab_size);
        let index = tokens.iter().position(|&token| token >= vocab_size).unwrap_or(0);
        Error::BadValue {
            path: self.shards[shard].path().to_path_buf(),
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
        for shard in &self.shards {
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
