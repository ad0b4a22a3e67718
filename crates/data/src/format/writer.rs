//! Writing a prepared folder so that it is there whole or not at all.
//!
//! Everything is written into a hidden folder beside the final one, synced to disk, and renamed. A crash leaves a hidden
//! folder that nobody reads; the next writer of the same data removes it.

use std::fs::{self, File, OpenOptions};
use std::io::{BufWriter, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use super::header::{self, DATA_START};
use super::index::{
    Index, ShardEntry, SpecialTokens, TokenDType, BLOCK_BYTES, INDEX_FILE, TOKENIZER_FILE,
};
use crate::cast::to_u64;
use crate::error::{Error, Result};
use crate::fingerprint::{Fingerprint, Fingerprinter};

/// A folder being written.
#[derive(Debug)]
pub(crate) struct FolderWriter {
    partial: PathBuf,
    target: PathBuf,
    finished: bool,
}

impl FolderWriter {
    /// Starts a folder that will be renamed to `target`. The caller holds the lock for `target`.
    pub(crate) fn create(target: &Path) -> Result<Self> {
        let partial = partial_path(target);
        let failed = |source| Error::CacheNotWritable { path: partial.clone(), source };
        if partial.exists() {
            fs::remove_dir_all(&partial).map_err(failed)?;
        }
        fs::create_dir_all(&partial).map_err(failed)?;
        Ok(FolderWriter { partial, target: target.to_path_buf(), finished: false })
    }

    /// Writes the tokenizer, and returns its fingerprint.
    pub(crate) fn tokenizer(&self, json: &[u8]) -> Result<Fingerprint> {
        write_synced(&self.partial.join(TOKENIZER_FILE), json)?;
        Ok(Fingerprinter::new(TOKENIZER_FILE).bytes(json).finish())
    }

    pub(crate) fn shards(&self, about: ShardInfo) -> ShardsWriter<'_> {
        ShardsWriter { folder: self, about, current: None, done: Vec::new() }
    }

    /// Writes the index and moves the folder to its place.
    pub(crate) fn finish(mut self, index: &Index) -> Result<()> {
        write_synced(&self.partial.join(INDEX_FILE), &index.to_json())?;
        sync_folder(&self.partial)?;
        if self.target.exists() {
            // Unusable, or the caller would have used it.
            fs::remove_dir_all(&self.target).map_err(Error::io("remove", &self.target))?;
        }
        fs::rename(&self.partial, &self.target).map_err(Error::io("rename", &self.partial))?;
        self.finished = true;
        sync_folder(self.target.parent().unwrap_or(Path::new(".")))
    }
}

impl Drop for FolderWriter {
    fn drop(&mut self) {
        if !self.finished {
            // What cannot be removed is removed by the next writer, or reported by it.
            drop(fs::remove_dir_all(&self.partial));
        }
    }
}

fn partial_path(target: &Path) -> PathBuf {
    let mut name = std::ffi::OsString::from(".");
    name.push(target.file_name().unwrap_or_default());
    name.push(".partial");
    target.with_file_name(name)
}

fn write_synced(path: &Path, content: &[u8]) -> Result<()> {
    let mut file = File::create(path).map_err(Error::io("create", path))?;
    file.write_all(content).map_err(Error::io("write", path))?;
    file.sync_all().map_err(Error::io("sync", path))
}

/// Makes renames and new names in a folder durable.
pub(crate) fn sync_folder(folder: &Path) -> Result<()> {
    let file = File::open(folder).map_err(Error::io("open", folder))?;
    file.sync_all().map_err(Error::io("sync", folder))
}

/// What all shards of a folder have in common.
#[derive(Clone, Debug)]
pub(crate) struct ShardInfo {
    pub(crate) vocab_size: u32,
    pub(crate) special: SpecialTokens,
    pub(crate) tokenizer: Fingerprint,
    /// A shard is closed at the first end of a document after so many bytes of tokens.
    pub(crate) shard_bytes: u64,
}

/// Writes tokens into one shard after another.
#[derive(Debug)]
pub(crate) struct ShardsWriter<'a> {
    folder: &'a FolderWriter,
    about: ShardInfo,
    current: Option<ShardWriter>,
    done: Vec<ShardEntry>,
}

impl ShardsWriter<'_> {
    /// Appends tokens to the current document.
    pub(crate) fn tokens(&mut self, tokens: &[u32]) -> Result<()> {
        let dtype = TokenDType::for_vocabulary(self.about.vocab_size);
        let shard = match &mut self.current {
            Some(shard) => shard,
            none => none.insert(ShardWriter::create(&self.folder.partial, self.done.len(), dtype)?),
        };
        shard.tokens(tokens)
    }

    /// Closes the current document, and the shard if it is large enough.
    pub(crate) fn end_document(&mut self) -> Result<()> {
        let Some(shard) = &mut self.current else { return Ok(()) };
        shard.doc_offsets.push(shard.token_count);
        if shard.token_count * to_u64(shard.dtype.bytes()) >= self.about.shard_bytes {
            self.close_shard()?;
        }
        Ok(())
    }

    pub(crate) fn finish(mut self) -> Result<Vec<ShardEntry>> {
        self.close_shard()?;
        Ok(self.done)
    }

    fn close_shard(&mut self) -> Result<()> {
        if let Some(shard) = self.current.take() {
            self.done.push(shard.finish(&self.about)?);
        }
        Ok(())
    }
}

#[derive(Debug)]
struct ShardWriter {
    name: String,
    path: PathBuf,
    file: BufWriter<File>,
    dtype: TokenDType,
    token_count: u64,
    doc_offsets: Vec<u64>,
    bytes: Vec<u8>,
}

impl ShardWriter {
    fn create(folder: &Path, number: usize, dtype: TokenDType) -> Result<Self> {
        let name = format!("tokens-{number:05}.safetensors");
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
            bytes: Vec::new(),
        })
    }

    fn tokens(&mut self, tokens: &[u32]) -> Result<()> {
        self.bytes.clear();
        for &token in tokens {
            match self.dtype {
                TokenDType::U16 => {
                    let token = u16::try_from(token).map_err(|_too_large| Error::BadValue {
                        path: self.path.clone(),
                        sample: 0,
                        position: 0,
                        value: i64::from(token),
                        reason: "it does not fit 16 bits".to_owned(),
                    })?;
                    self.bytes.extend_from_slice(&token.to_le_bytes());
                }
                TokenDType::U32 => self.bytes.extend_from_slice(&token.to_le_bytes()),
            }
        }
        self.token_count += to_u64(tokens.len());
        self.file.write_all(&self.bytes).map_err(Error::io("write", &self.path))
    }

    fn finish(mut self, about: &ShardInfo) -> Result<ShardEntry> {
        if self.doc_offsets.last() != Some(&self.token_count) {
            self.doc_offsets.push(self.token_count);
        }
        let offsets: Vec<u8> = self.doc_offsets.iter().flat_map(|at| at.to_le_bytes()).collect();
        self.file.write_all(&offsets).map_err(Error::io("write", &self.path))?;
        let special = about.special;
        let header = header::encode(
            &[
                (
                    "tokens",
                    self.dtype.name(),
                    crate::cast::to_usize(self.token_count),
                    self.dtype.bytes(),
                ),
                ("doc_offsets", "U64", self.doc_offsets.len(), size_of::<u64>()),
            ],
            &[
                ("creator", concat!("phalanx-data ", env!("CARGO_PKG_VERSION")).to_owned()),
                ("tokenizer", about.tokenizer.to_string()),
                ("vocab_size", about.vocab_size.to_string()),
                ("sep_token_id", special.sep.to_string()),
            ],
        );
        if header.len() != DATA_START {
            let reason = format!("a header of {} bytes does not fit {DATA_START}", header.len());
            return Err(Error::BadHeader { path: self.path, reason });
        }
        let failed = |source| Error::Io { action: "write", path: self.path.clone(), source };
        let mut file = self.file.into_inner().map_err(|error| failed(error.into_error()))?;
        file.rewind().map_err(failed)?;
        file.write_all(&header).map_err(failed)?;
        file.sync_all().map_err(Error::io("sync", &self.path))?;
        let (file_bytes, crc32c) = checksums(&mut file, &self.path)?;
        Ok(ShardEntry {
            file: self.name,
            file_bytes,
            token_count: self.token_count,
            document_count: to_u64(self.doc_offsets.len()) - 1,
            crc32c,
        })
    }
}

/// Size and block checksums of a file, as they are read back.
fn checksums(file: &mut File, path: &Path) -> Result<(u64, Vec<u32>)> {
    file.seek(SeekFrom::Start(0)).map_err(Error::io("read", path))?;
    let (mut total, mut sums, mut block) = (0, Vec::new(), Vec::with_capacity(BLOCK_BYTES));
    loop {
        block.clear();
        let read = Read::by_ref(file).take(to_u64(BLOCK_BYTES)).read_to_end(&mut block);
        let read = read.map_err(Error::io("read", path))?;
        if read == 0 {
            return Ok((total, sums));
        }
        total += to_u64(read);
        sums.push(crc32c::crc32c(&block));
    }
}
