//! All shards of a prepared folder as one stream of tokens.

use std::fmt::Display;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::bytes::SizedSource;
use super::continuations::{self, fingerprint_of, Continuations, TOKENIZER_FILE};
use super::open_shards::{running_sums, shard_of, OpenShards};
use super::shard::OpenTokenShard;
use super::special_tokens::SpecialTokens;
use super::token_index::TokenIndex;
use super::tokens::Tokens;
use crate::batches::Scratch;
use crate::cast::{to_u64, to_usize};
use crate::error::{Error, Result};
use crate::fingerprint::Fingerprint;
use crate::source::{Access, Folder, LocalFolder, Source};

/// The tokens of a prepared folder, readable in any order from many threads.
#[derive(Debug)]
pub struct TokenStream {
    folder: PathBuf,
    index: TokenIndex,
    shards: OpenShards<OpenTokenShard>,
    /// Where each shard starts in the stream, and where the last one ends.
    starts: Vec<u64>,
    /// The same of documents.
    document_starts: Vec<u64>,
    /// Tokens that are known to be damaged.
    damaged: Vec<Range<u64>>,
    tokenizer: Option<Arc<dyn Source>>,
}

impl TokenStream {
    /// Opens a prepared folder: index, sizes and headers are checked; tokens are verified when they
    /// are first touched.
    ///
    /// # Errors
    /// [`Error::Io`], [`Error::BadIndex`], or what is wrong with a shard: its size, header, dtype
    /// or shape.
    pub fn open(folder: &Path, access: Access) -> Result<Self> {
        Self::open_from(&LocalFolder::new(folder, access))
    }

    /// Opens a prepared folder wherever it lies.
    ///
    /// # Errors
    /// As [`open`](Self::open), and what the folder says.
    pub fn open_from(folder: &dyn Folder) -> Result<Self> {
        let index = TokenIndex::read_from(folder)?;
        let open = |entry: &_| OpenTokenShard::open(folder, entry, index.dtype);
        let shards = OpenShards::open(folder, index.fingerprint, &index.shards, open)?;
        let starts = running_sums(index.shards.iter().map(|shard| shard.token_count));
        let document_starts = running_sums(index.shards.iter().map(|shard| shard.document_count));
        let damaged = shards.damaged(&starts, |_, shard, blocks| Ok(shard.tokens_of(blocks)))?;
        let tokenizer = folder.find(TOKENIZER_FILE)?;
        let folder = folder.name().to_path_buf();
        Ok(TokenStream { folder, index, shards, starts, document_starts, damaged, tokenizer })
    }

    fn tokenizer_json(&self) -> Result<Vec<u8>> {
        let path = self.folder.join(TOKENIZER_FILE);
        let Some(source) = &self.tokenizer else {
            return Err(continuations::failed(
                &path,
                "it is not there: copy it from where the data was prepared",
            ));
        };
        SizedSource::of(Arc::clone(source), None)?.read_all()
    }

    /// What the folder says it holds.
    pub fn index(&self) -> &TokenIndex {
        &self.index
    }

    /// The folder.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// The first token of `tokens` that is no entry of the vocabulary. They start at `at`, the read
    /// started at `start`.
    fn bad_value(&self, shard: usize, start: u64, at: u64, tokens: &[i64]) -> Error {
        let vocab_size = i64::from(self.index.vocab_size);
        let index = tokens.iter().position(|&token| token >= vocab_size).unwrap_or(0);
        Error::BadValue {
            path: self.shards.path(shard).to_path_buf(),
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
            let shard = self.shards.get(at, &"everything")?;
            shard.verify(0..shard.file_bytes(), &mut scratch, &"everything")?;
        }
        Ok(())
    }
}

impl Tokens for TokenStream {
    fn token_count(&self) -> u64 {
        self.index.token_count
    }

    fn vocab_size(&self) -> u32 {
        self.index.vocab_size
    }

    fn special(&self) -> SpecialTokens {
        self.index.special
    }

    fn fingerprint(&self) -> Fingerprint {
        self.index.fingerprint
    }

    /// # Errors
    /// [`Error::NoSuchSample`] beyond the end, [`Error::Damaged`], [`Error::WrongSize`],
    /// [`Error::Io`], and [`Error::BadValue`] for tokens that are no entry of the vocabulary.
    fn read(
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
        let mut shard = shard_of(&self.starts, start);
        let (mut at, mut rest) = (start, out);
        while !rest.is_empty() {
            let available = to_usize((self.starts[shard + 1] - at).min(to_u64(rest.len())));
            let (now, later) = rest.split_at_mut(available);
            let of_shard = self.shards.get(shard, reading)?;
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

    fn document_count(&self) -> u64 {
        self.document_starts.last().copied().unwrap_or(0)
    }

    /// Bounds are read where they are stored: no list of them is kept in memory.
    ///
    /// # Errors
    /// [`Error::NoSuchSample`] for a document that does not exist, [`Error::BadDocument`],
    /// [`Error::Damaged`], [`Error::WrongSize`], [`Error::Io`].
    fn document(&self, document: u64, scratch: &mut Scratch) -> Result<Range<u64>> {
        let samples = self.document_count();
        if document >= samples {
            return Err(Error::NoSuchSample { sample: document, samples });
        }
        let shard = shard_of(&self.document_starts, document);
        let reading = format_args!("the bounds of document {document}");
        let of_shard = self.shards.get(shard, &reading)?;
        let within =
            of_shard.document(document - self.document_starts[shard], scratch, &reading)?;
        let start = self.starts[shard];
        Ok(start + within.start..start + within.end)
    }

    fn damaged(&self) -> &[Range<u64>] {
        &self.damaged
    }

    /// Reads the bounds of all documents of the shards in which blocks are damaged.
    ///
    /// # Errors
    /// [`Error::Damaged`] where bounds lie in a damaged block that is not listed, and
    /// [`Error::Io`].
    fn damaged_documents(&self) -> Result<Vec<Range<u64>>> {
        self.shards.damaged(&self.document_starts, |_, shard, blocks| shard.documents_of(blocks))
    }

    #[inline]
    fn expect(&self, start: u64, len: usize) {
        let shard = shard_of(&self.starts, start);
        if let Some(of_start) = self.shards.find(shard) {
            of_start.expect(start - self.starts[shard], len);
        }
    }

    fn will_need(&self, tokens: Range<u64>) {
        self.shards.for_range(&self.starts, &tokens, |shard, within, _| shard.will_need(within));
    }

    /// # Errors
    /// [`Error::Tokenizer`] if there is none, if it is not the one that the tokens were made with,
    /// or if it does not tell words apart; and what kept it from being read.
    fn continuations(&self) -> Result<Continuations> {
        let json = self.tokenizer_json()?;
        let path = self.folder.join(TOKENIZER_FILE);
        let found = fingerprint_of(&json);
        if found != self.index.tokenizer {
            let expected = self.index.tokenizer;
            return Err(continuations::failed(&path, &format!(
                "it is not the tokenizer of these tokens (fingerprint {found}, the index says {expected}): copy the one that they were made with"
            )));
        }
        Continuations::of_json(&json, self.index.vocab_size, &path)
    }
}
