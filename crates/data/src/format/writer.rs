//! Writing a prepared folder so that it is there whole or not at all.
//!
//! Everything is written into a hidden folder beside the final one, synced to disk, and renamed. A crash leaves a hidden
//! folder that nobody reads; the next writer of the same data removes it.

use std::fs::{self, File, OpenOptions};
use std::io::{BufWriter, Seek, Write};
use std::path::{Path, PathBuf};

use super::files::{is_free, partial_path, publish, seal, write_synced};
use super::header::{self, Tensor, DATA_START};
use super::index::{
    Index, ShardEntry, SpecialTokens, TokenDType, BLOCK_BYTES, INDEX_FILE, TOKENIZER_FILE,
};
use crate::cast::{to_u64, to_usize};
use crate::error::{Error, Result};
use crate::fingerprint::{Fingerprint, Fingerprinter};

const SHARD_EXTENSION: &str = "safetensors";

/// Writes a prepared folder.
///
/// The folder appears under its name when [`finish`](Self::finish) succeeds, complete and synced to disk; until then, and if
/// the writer is dropped, nothing is there. Two writers must not write to the same target at once. Memory: 8 bytes for each
/// document of a shard.
///
/// ```
/// use phalanx_data::{SpecialTokens, TokenStream, TokenWriter, Access};
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
    partial: PathBuf,
    target: PathBuf,
    about: ShardInfo,
    current: Option<ShardWriter>,
    done: Vec<ShardEntry>,
    on_drop: OnDrop,
}

/// What becomes of the hidden folder when its writer is dropped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum OnDrop {
    Remove,
    Keep,
}

impl TokenWriter {
    /// Starts a folder that will be renamed to `target`. What an earlier writer of the same target left half done is removed.
    ///
    /// A shard is closed at the first end of a document after `shard_bytes` of tokens and of the places of documents (8 bytes each).
    ///
    /// # Errors
    /// [`Error::OutputExists`] if `target` is there and no empty folder, [`Error::CacheNotWritable`] and [`Error::Io`].
    pub fn create(
        target: &Path,
        tokenizer_json: &[u8],
        vocab_size: u32,
        special: SpecialTokens,
        shard_bytes: u64,
    ) -> Result<Self> {
        if !is_free(target)? {
            return Err(Error::OutputExists { path: target.to_path_buf() });
        }
        let partial = partial_path(target);
        let failed = |cause| Error::CacheNotWritable { path: partial.clone(), cause };
        if partial.exists() {
            fs::remove_dir_all(&partial).map_err(failed)?;
        }
        fs::create_dir_all(&partial).map_err(failed)?;
        let tokenizer = Fingerprinter::new(TOKENIZER_FILE).bytes(tokenizer_json).finish();
        let writer = TokenWriter {
            partial,
            target: target.to_path_buf(),
            about: ShardInfo { vocab_size, special, tokenizer, shard_bytes },
            current: None,
            done: Vec::new(),
            on_drop: OnDrop::Remove,
        };
        write_synced(&writer.partial.join(TOKENIZER_FILE), tokenizer_json)?;
        Ok(writer)
    }

    /// Goes on with what an earlier writer of the same target left half done: these shards are whole, any others are removed.
    /// Dropped before it is finished, this writer leaves what is done to the next.
    pub(crate) fn resume(
        target: &Path,
        tokenizer_json: &[u8],
        (vocab_size, special): (u32, SpecialTokens),
        shard_bytes: u64,
        done: Vec<ShardEntry>,
    ) -> Result<Self> {
        if done.is_empty() {
            let mut fresh = Self::create(target, tokenizer_json, vocab_size, special, shard_bytes)?;
            fresh.on_drop = OnDrop::Keep;
            return Ok(fresh);
        }
        let partial = partial_path(target);
        for entry in fs::read_dir(&partial).map_err(Error::io("list", &partial))? {
            let entry = entry.map_err(Error::io("list", &partial))?;
            let is_shard = entry.path().extension().is_some_and(|end| end == SHARD_EXTENSION);
            let name = entry.file_name();
            if is_shard && !done.iter().any(|shard| name == *shard.file) {
                fs::remove_file(entry.path()).map_err(Error::io("remove", &entry.path()))?;
            }
        }
        let tokenizer = Fingerprinter::new(TOKENIZER_FILE).bytes(tokenizer_json).finish();
        let about = ShardInfo { vocab_size, special, tokenizer, shard_bytes };
        let target = target.to_path_buf();
        Ok(TokenWriter { partial, target, about, current: None, done, on_drop: OnDrop::Keep })
    }

    /// Where shards gather until the folder is complete.
    pub(crate) fn folder(&self) -> &Path {
        &self.partial
    }

    /// The shards that are closed.
    pub(crate) fn shards(&self) -> &[ShardEntry] {
        &self.done
    }

    /// Appends tokens to the current document. Its last token should be the one that closes documents
    /// ([`SpecialTokens::document_end`]).
    ///
    /// # Errors
    /// [`Error::Io`], and [`Error::BadValue`] for a token outside the vocabulary.
    pub fn tokens(&mut self, tokens: &[u32]) -> Result<()> {
        let dtype = TokenDType::for_vocabulary(self.about.vocab_size);
        let shard = match &mut self.current {
            Some(shard) => shard,
            none => none.insert(ShardWriter::create(&self.partial, self.done.len(), dtype)?),
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
    /// [`Error::OutputExists`] if something came to lie there meanwhile: it stays, and the complete folder is beside it as
    /// `.NAME.partial`. [`Error::Io`].
    pub fn finish(mut self, source_bytes: u64) -> Result<Index> {
        self.close_shard()?;
        let ShardInfo { vocab_size, special, tokenizer, .. } = self.about;
        let shards = std::mem::take(&mut self.done);
        let index = Index::new(vocab_size, special, tokenizer, source_bytes, shards);
        write_synced(&self.partial.join(INDEX_FILE), &index.to_json())?;
        // It is complete: if it cannot be moved, it is not thrown away.
        self.on_drop = OnDrop::Keep;
        publish(&self.partial, &self.target)?;
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

impl Drop for TokenWriter {
    fn drop(&mut self) {
        if self.on_drop == OnDrop::Remove {
            // What cannot be removed is removed by the next writer, or reported by it.
            drop(fs::remove_dir_all(&self.partial));
        }
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
    dtype: TokenDType,
    token_count: u64,
    doc_offsets: Vec<u64>,
    buffer: Vec<u8>,
}

impl ShardWriter {
    fn create(folder: &Path, number: usize, dtype: TokenDType) -> Result<Self> {
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

    fn finish(mut self, about: &ShardInfo) -> Result<ShardEntry> {
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
                ("creator", concat!("phalanx-data ", env!("CARGO_PKG_VERSION")).to_owned()),
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
        Ok(ShardEntry {
            file: self.name,
            file_bytes,
            token_count: self.token_count,
            document_count: to_u64(self.doc_offsets.len()) - 1,
            crc32c,
        })
    }
}
