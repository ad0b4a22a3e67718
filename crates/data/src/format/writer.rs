//! Writing a folder of tokens.

use std::fs::{File, OpenOptions};
use std::io::{BufWriter, Seek, Write};
use std::path::{Path, PathBuf};

use super::checked::seal;
use super::continuations::{fingerprint_of, TOKENIZER_FILE};
use super::folder::{is_free, write_synced, OnDrop, PartialFolder, SHARD_EXTENSION};
use super::header::{self, Tensor, DATA_START};
use super::index::CREATOR;
use super::layout::BLOCK_BYTES;
use super::special_tokens::SpecialTokens;
use super::token_index::{token_dtype, TokenIndex, TokenShard};
use crate::batches::DType;
use crate::cast::{to_u64, to_usize};
use crate::error::{Error, Result};
use crate::fingerprint::Fingerprint;

/// Writes a prepared folder.
///
/// The folder appears under its name when [`finish`](Self::finish) succeeds, complete and synced to
/// disk; until then, and if the writer is dropped, nothing is there. Two writers must not write to
/// the same target at once. Memory: 8 bytes for each document of a shard.
///
/// ```
/// use phalanx_data::format::{SpecialTokens, TokenStream, TokenWriter, Tokens};
/// use phalanx_data::Access;
///
/// # fn main() -> phalanx_data::Result<()> {
/// # let folder = tempfile::tempdir().unwrap();
/// # let target = folder.path().join("corpus");
/// let special = SpecialTokens::bert(0, 1, 2, 3, 4);
/// let mut writer = TokenWriter::create(&target, b"{}", 100, special, 1 << 20)?;
/// for document in [[7, 8, 9, 3], [10, 11, 12, 3]] {
///     writer.tokens(&document)?;
///     writer.end_document()?;
/// }
/// writer.finish(0)?;
/// assert_eq!(TokenStream::open(&target, Access::Read)?.token_count(), 8);
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct TokenWriter {
    partial: PartialFolder,
    about: ShardInfo,
    current: Option<ShardWriter>,
    done: Vec<TokenShard>,
}

impl TokenWriter {
    /// Starts a folder that will be renamed to `target`. What an earlier writer of the same target
    /// left half done is removed.
    ///
    /// A shard is closed at the first end of a document after `shard_bytes` of tokens and of the
    /// places of documents (8 bytes each).
    ///
    /// # Errors
    /// [`Error::OutputExists`] if `target` is there and no empty folder,
    /// [`Error::CacheNotWritable`] and [`Error::Io`].
    pub fn create(
        target: &Path,
        tokenizer_json: &[u8],
        vocab_size: u32,
        special: SpecialTokens,
        shard_bytes: u64,
    ) -> Result<Self> {
        let words = (vocab_size, special);
        Self::resume(target, tokenizer_json, words, shard_bytes, Vec::new(), OnDrop::Remove)
    }

    /// Goes on with what an earlier writer of the same target left half done: these shards are
    /// whole, any others are removed. Without any it begins anew.
    pub(crate) fn resume(
        target: &Path,
        tokenizer_json: &[u8],
        (vocab_size, special): (u32, SpecialTokens),
        shard_bytes: u64,
        done: Vec<TokenShard>,
        on_drop: OnDrop,
    ) -> Result<Self> {
        if done.is_empty() && !is_free(target)? {
            return Err(Error::OutputExists { path: target.to_path_buf() });
        }
        let partial = PartialFolder::open(target, &done, on_drop)?;
        if done.is_empty() {
            write_synced(&partial.path().join(TOKENIZER_FILE), tokenizer_json)?;
        }
        let tokenizer = fingerprint_of(tokenizer_json);
        let about = ShardInfo { vocab_size, special, tokenizer, shard_bytes };
        Ok(TokenWriter { partial, about, current: None, done })
    }

    /// Where shards gather until the folder is complete.
    pub(crate) fn folder(&self) -> &Path {
        self.partial.path()
    }

    /// The shards that are closed.
    pub(crate) fn shards(&self) -> &[TokenShard] {
        &self.done
    }

    /// Appends tokens to the current document. Its last token should be the one that closes
    /// documents ([`SpecialTokens::document_end`]).
    ///
    /// # Errors
    /// [`Error::Io`], and [`Error::BadValue`] for a token outside the vocabulary.
    pub fn tokens(&mut self, tokens: &[u32]) -> Result<()> {
        let dtype = token_dtype(self.about.vocab_size);
        let shard = match &mut self.current {
            Some(shard) => shard,
            none => none.insert(ShardWriter::create(self.partial.path(), self.done.len(), dtype)?),
        };
        shard.tokens(tokens, self.about.vocab_size)
    }

    /// Closes the current document, and the shard if it is large enough.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn end_document(&mut self) -> Result<()> {
        let Some(shard) = &mut self.current else { return Ok(()) };
        shard.end_document();
        if shard.bytes() >= self.about.shard_bytes {
            self.close_shard()?;
        }
        Ok(())
    }

    /// Writes the index and moves the folder to its place. `source_bytes` of text went into it.
    ///
    /// # Errors
    /// [`Error::OutputExists`] if something came to lie there meanwhile: it stays, and the complete
    /// folder is beside it as `.NAME.partial`. [`Error::Io`].
    pub fn finish(mut self, source_bytes: u64) -> Result<TokenIndex> {
        self.close_shard()?;
        let ShardInfo { vocab_size, special, tokenizer, .. } = self.about;
        let index = TokenIndex::new(vocab_size, special, tokenizer, source_bytes, self.done);
        self.partial.finish(&index)?;
        Ok(index)
    }

    /// Closes the current shard, however small it is.
    pub(crate) fn close_shard(&mut self) -> Result<()> {
        if let Some(shard) = self.current.take() {
            self.done.push(shard.finish(&self.about)?);
        }
        Ok(())
    }
}

/// What all shards of a folder have in common.
#[derive(Clone, Debug)]
struct ShardInfo {
    vocab_size: u32,
    special: SpecialTokens,
    tokenizer: Fingerprint,
    shard_bytes: u64,
}

#[derive(Debug)]
struct ShardWriter {
    name: String,
    path: PathBuf,
    file: BufWriter<File>,
    dtype: DType,
    token_count: u64,
    doc_offsets: Vec<u64>,
    buffer: Vec<u8>,
}

impl ShardWriter {
    fn create(folder: &Path, number: usize, dtype: DType) -> Result<Self> {
        let name = format!("tokens-{number:05}.{SHARD_EXTENSION}");
        let path = folder.join(&name);
        let file = OpenOptions::new()
            .create_new(true)
            .read(true)
            .write(true)
            .open(&path)
            .map_err(Error::io("create", &path))?;
        let mut file = BufWriter::with_capacity(BLOCK_BYTES, file);
        // The header goes here when the sizes are known.
        file.write_all(&[b' '; DATA_START]).map_err(Error::io("write", &path))?;
        Ok(ShardWriter {
            name,
            path,
            file,
            dtype,
            token_count: 0,
            doc_offsets: vec![0],
            buffer: Vec::new(),
        })
    }

    fn tokens(&mut self, tokens: &[u32], vocab_size: u32) -> Result<()> {
        if let Some(position) = tokens.iter().position(|&token| token >= vocab_size) {
            return Err(Error::BadValue {
                path: self.path.clone(),
                sample: self.token_count,
                position,
                value: i64::from(tokens[position]),
                reason: format!("the vocabulary has {vocab_size} entries"),
            });
        }
        self.buffer.clear();
        for &token in tokens {
            // Little-endian: the lower bytes come first.
            self.buffer.extend_from_slice(&token.to_le_bytes()[..self.dtype.bytes()]);
        }
        self.token_count += to_u64(tokens.len());
        self.file.write_all(&self.buffer).map_err(Error::io("write", &self.path))
    }

    /// Bytes of its tokens and of the offsets of its documents.
    fn bytes(&self) -> u64 {
        let offsets = to_u64(self.doc_offsets.len() - 1) * to_u64(size_of::<u64>());
        self.token_count * to_u64(self.dtype.bytes()) + offsets
    }

    fn end_document(&mut self) {
        if self.doc_offsets.last() != Some(&self.token_count) {
            self.doc_offsets.push(self.token_count);
        }
    }

    fn finish(mut self, about: &ShardInfo) -> Result<TokenShard> {
        self.end_document();
        let offsets: &[u8] = bytemuck::cast_slice(&self.doc_offsets);
        self.file.write_all(offsets).map_err(Error::io("write", &self.path))?;
        let special = about.special;
        let tokens = Tensor {
            name: "tokens".to_owned(),
            dtype: self.dtype.name(),
            shape: vec![to_usize(self.token_count)],
            element_bytes: self.dtype.bytes(),
        };
        let offsets_tensor = Tensor {
            name: "doc_offsets".to_owned(),
            dtype: "U64",
            shape: vec![self.doc_offsets.len()],
            element_bytes: size_of::<u64>(),
        };
        let element = to_u64(self.dtype.bytes());
        let data_bytes = self.token_count * element + to_u64(offsets.len());
        let header = header::encode_sealed(
            &mut vec![tokens, offsets_tensor],
            &[
                ("creator", CREATOR.to_owned()),
                ("tokenizer", about.tokenizer.to_string()),
                ("vocab_size", about.vocab_size.to_string()),
                (
                    "sep_token_id",
                    special.document_end().map_or_else(String::new, |id| id.to_string()),
                ),
            ],
            data_bytes,
        );
        if header.len() != DATA_START {
            let reason = format!("a header of {} bytes does not fit {DATA_START}", header.len());
            return Err(Error::BadHeader { path: self.path, reason });
        }
        let failed = |cause| Error::Io { action: "write", path: self.path.clone(), cause };
        let mut file = self.file.into_inner().map_err(|error| failed(error.into_error()))?;
        file.rewind().map_err(failed)?;
        file.write_all(&header).map_err(failed)?;
        let (file_bytes, crc32c) = seal(&mut file, &self.path)?;
        Ok(TokenShard {
            file: self.name,
            file_bytes,
            token_count: self.token_count,
            document_count: to_u64(self.doc_offsets.len()) - 1,
            crc32c,
        })
    }
}
