//! `index.json`: what a prepared folder holds.

use std::path::{Path, PathBuf};

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::bytes::Bytes;
use super::files::Listed;
use super::json;
use crate::cast::{to_u64, to_usize};
use crate::error::{Error, Result};
use crate::fingerprint::{Fingerprint, Fingerprinter};
use crate::source::{Access, Folder, LocalFolder};

/// The index of a prepared folder.
pub(crate) const INDEX_FILE: &str = "index.json";

/// The tokenizer of a prepared folder.
pub(crate) const TOKENIZER_FILE: &str = "tokenizer.json";

const FORMAT: &str = "phalanx-tokens";
/// What the index of a folder of records says.
pub(crate) const RECORDS_FORMAT: &str = "phalanx-records";
const VERSION: u32 = 2;

/// Bytes of a block with a checksum of its own: small enough to verify on first touch.
pub(crate) const BLOCK_BYTES: usize = 1 << 20;

/// An index has some hundred bytes a shard; more is not an index.
pub(crate) const INDEX_BYTES_MAX: u64 = 64 << 20;

/// A value of an index takes no more memory; a shard has twelve, with names and brackets.
pub(crate) const VALUE_BYTES: usize = 20;

/// Element type of tokens on disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum TokenDType {
    /// 16 bits: vocabularies of at most 65 536 entries.
    U16,
    /// 32 bits.
    U32,
}

impl TokenDType {
    /// The smallest type that holds every entry.
    pub fn for_vocabulary(vocab_size: u32) -> Self {
        if vocab_size <= 1 << 16 {
            TokenDType::U16
        } else {
            TokenDType::U32
        }
    }

    /// Bytes of one token.
    pub fn bytes(self) -> usize {
        match self {
            TokenDType::U16 => 2,
            TokenDType::U32 => 4,
        }
    }

    pub(crate) fn name(self) -> &'static str {
        match self {
            TokenDType::U16 => "U16",
            TokenDType::U32 => "U32",
        }
    }
}

/// Ids of the special tokens. A vocabulary need not have all of them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct SpecialTokens {
    /// `[PAD]`: fills rows up.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pad: Option<u32>,
    /// `[UNK]`: stands for what the vocabulary lacks.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub unk: Option<u32>,
    /// `[CLS]`: begins a sample.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cls: Option<u32>,
    /// `[SEP]`: ends a sample, and a document.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub sep: Option<u32>,
    /// `[MASK]`: hides a token.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mask: Option<u32>,
    /// Ends a document, where that is not `[SEP]`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub eos: Option<u32>,
}

impl SpecialTokens {
    /// The five of BERT: `[PAD]`, `[UNK]`, `[CLS]`, `[SEP]`, `[MASK]`.
    pub const fn bert(pad: u32, unk: u32, cls: u32, sep: u32, mask: u32) -> Self {
        SpecialTokens {
            pad: Some(pad),
            unk: Some(unk),
            cls: Some(cls),
            sep: Some(sep),
            mask: Some(mask),
            eos: None,
        }
    }

    /// Those that there are.
    pub fn all(&self) -> impl Iterator<Item = u32> {
        self.slots().into_iter().flatten()
    }

    /// Whether `id` is one of them.
    pub fn contains(&self, id: i64) -> bool {
        self.all().any(|special| i64::from(special) == id)
    }

    /// The token that closes each document: `eos`, or else `[SEP]`.
    pub fn document_end(&self) -> Option<u32> {
        self.eos.or(self.sep)
    }

    fn slots(&self) -> [Option<u32>; 6] {
        [self.pad, self.unk, self.cls, self.sep, self.mask, self.eos]
    }

    /// BERT's five are numbered as they always were; of others it is also said which there are.
    pub(super) fn add_to(&self, sum: Fingerprinter) -> Fingerprinter {
        let is_bert =
            self.slots().map(|slot| slot.is_some()) == [true, true, true, true, true, false];
        if is_bert {
            return self.all().fold(sum, |sum, id| sum.number(u64::from(id)));
        }
        let slot = |id: Option<u32>| id.map_or(0, |id| u64::from(id) + 1);
        let sum = sum.bytes(b"special");
        self.slots().into_iter().fold(sum, |sum, id| sum.number(slot(id)))
    }
}

/// One shard.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ShardEntry {
    /// File name in the folder.
    pub file: String,
    /// Size of the file.
    pub file_bytes: u64,
    /// Tokens in it.
    pub token_count: u64,
    /// Documents in it.
    pub document_count: u64,
    /// CRC-32C of each 4096 bytes of the file's last tensor, which holds the CRC-32C of each block of the file before it.
    pub crc32c: Vec<u32>,
}

impl ShardEntry {
    pub(crate) fn listed(&self) -> Listed<'_> {
        Listed { file: &self.file, file_bytes: self.file_bytes, crc32c: &self.crc32c }
    }
}

/// What a prepared folder holds.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Index {
    /// Always `phalanx-tokens`.
    pub format: String,
    /// Version of the format.
    pub version: u32,
    /// Program and version that wrote it.
    pub creator: String,
    /// Element type of the tokens.
    pub dtype: TokenDType,
    /// Entries of the vocabulary.
    pub vocab_size: u32,
    /// Ids of the special tokens.
    pub special: SpecialTokens,
    /// Fingerprint of `tokenizer.json`.
    pub tokenizer: Fingerprint,
    /// Tokens in all shards.
    pub token_count: u64,
    /// Documents in all shards.
    pub document_count: u64,
    /// Bytes of text that they were made from.
    pub source_bytes: u64,
    /// Bytes of a block with a checksum of its own.
    pub block_bytes: u64,
    /// The shards, in order.
    pub shards: Vec<ShardEntry>,
    /// Fingerprint of the content: equal on machines that prepared the same text alike.
    pub fingerprint: Fingerprint,
}

impl Index {
    /// An index of `shards`; counts and fingerprint are taken from them.
    pub(crate) fn new(
        vocab_size: u32,
        special: SpecialTokens,
        tokenizer: Fingerprint,
        source_bytes: u64,
        shards: Vec<ShardEntry>,
    ) -> Self {
        let mut index = Index {
            format: FORMAT.to_owned(),
            version: VERSION,
            creator: concat!("phalanx-data ", env!("CARGO_PKG_VERSION")).to_owned(),
            dtype: TokenDType::for_vocabulary(vocab_size),
            vocab_size,
            special,
            tokenizer,
            token_count: shards.iter().map(|shard| shard.token_count).sum(),
            document_count: shards.iter().map(|shard| shard.document_count).sum(),
            source_bytes,
            block_bytes: to_u64(BLOCK_BYTES),
            shards,
            fingerprint: Fingerprint(0),
        };
        index.fingerprint = index.content_fingerprint();
        index
    }

    /// Whether `folder` looks like a prepared folder.
    pub fn is_in(folder: &Path) -> bool {
        folder.join(INDEX_FILE).is_file()
    }

    /// Reads and checks the index of a prepared folder.
    ///
    /// # Errors
    /// [`Error::Io`] if it cannot be read, [`Error::BadIndex`] if it contradicts itself or has another version.
    pub fn read(folder: &Path) -> Result<Self> {
        Self::read_from(&LocalFolder::new(folder, Access::Read))
    }

    /// Reads and checks the index of a prepared folder, wherever it lies.
    ///
    /// # Errors
    /// As [`read`](Self::read), and what the folder says.
    pub fn read_from(folder: &dyn Folder) -> Result<Self> {
        let (index, path): (Self, _) = read_json(folder)?;
        index.check().map_err(|reason| Error::BadIndex { path, reason })?;
        Ok(index)
    }

    #[cfg(feature = "testing")]
    pub(crate) fn with_right_fingerprint(mut self) -> Self {
        self.fingerprint = self.content_fingerprint();
        self
    }

    pub(crate) fn to_json(&self) -> Vec<u8> {
        let mut json = serde_json::to_vec_pretty(self).unwrap_or_default();
        json.push(b'\n');
        json
    }

    fn check(&self) -> std::result::Result<(), String> {
        if self.format != FORMAT || self.version != VERSION {
            return Err(format!(
                "format {} version {}, this program reads {FORMAT} version {VERSION}",
                self.format, self.version
            ));
        }
        if self.block_bytes != to_u64(BLOCK_BYTES) {
            return Err(format!("blocks of {} bytes, expected {BLOCK_BYTES}", self.block_bytes));
        }
        if self.dtype != TokenDType::for_vocabulary(self.vocab_size) {
            let (dtype, size) = (self.dtype.name(), self.vocab_size);
            return Err(format!("dtype {dtype} does not fit a vocabulary of {size}"));
        }
        if self.special.all().any(|id| id >= self.vocab_size) {
            return Err("a special token lies outside the vocabulary".to_owned());
        }
        super::files::check_total(self.shards.iter().map(|shard| shard.file_bytes))?;
        let (mut tokens, mut documents) = (0_u64, 0_u64);
        for shard in &self.shards {
            shard.listed().check()?;
            documents = documents
                .checked_add(shard.document_count)
                .ok_or_else(|| "the document counts overflow".to_owned())?;
            let sum = tokens.checked_add(shard.token_count);
            tokens = sum.ok_or_else(|| "the token counts overflow".to_owned())?;
        }
        if tokens != self.token_count {
            return Err(format!("{} tokens, its shards have {tokens}", self.token_count));
        }
        if documents != self.document_count {
            let have = self.document_count;
            return Err(format!("{have} documents, its shards have {documents}"));
        }
        let fingerprint = self.content_fingerprint();
        if fingerprint != self.fingerprint {
            return Err(format!("fingerprint {}, expected {fingerprint}", self.fingerprint));
        }
        Ok(())
    }

    fn content_fingerprint(&self) -> Fingerprint {
        let mut sum = Fingerprinter::new("phalanx-tokens 2")
            .number(u64::from(self.vocab_size))
            .number(self.tokenizer.0);
        sum = self.special.add_to(sum);
        for shard in &self.shards {
            sum =
                sum.number(shard.file_bytes).number(shard.token_count).number(shard.document_count);
            sum = shard.listed().add_checksums(sum);
        }
        sum.finish()
    }
}

/// Whether a folder's index says that this crate wrote it: tokens or records, of any version.
pub(crate) fn is_output(folder: &Path) -> bool {
    /// The only part of an index that is read for this.
    #[derive(Deserialize)]
    struct Kind {
        format: String,
    }
    let index = read_json::<Kind>(&LocalFolder::new(folder, Access::Read));
    index.is_ok_and(|(kind, _)| [FORMAT, RECORDS_FORMAT].contains(&&*kind.format))
}

/// The index of a folder, of whatever kind, and what errors call it.
pub(crate) fn read_json<T: DeserializeOwned>(folder: &dyn Folder) -> Result<(T, PathBuf)> {
    let file = Bytes::of(folder.open(INDEX_FILE)?, None)?;
    let bad = |reason: String| Error::BadIndex { path: file.path().to_path_buf(), reason };
    let len = file.len();
    if len > INDEX_BYTES_MAX {
        return Err(bad(format!("{len} bytes are too many for an index")));
    }
    let mut scratch = Vec::new();
    let text = file.read(0, to_usize(len), &mut scratch)?;
    let index = json::parse(text, VALUE_BYTES);
    file.check(0..len)?;
    let index = index.map_err(|error| bad(format!("not an index: {error}")))?;
    Ok((index, file.path().to_path_buf()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn index(documents: u64, file_bytes: u64, shards: usize) -> Index {
        let pages = super::super::files::Layout::of(file_bytes)
            .map_or(0, |layout| layout.blocks.div_ceil(super::super::files::PAGE_BLOCKS));
        let shard = ShardEntry {
            file: "a".to_owned(),
            file_bytes,
            token_count: 1,
            document_count: documents,
            crc32c: vec![0; to_usize(pages)],
        };
        Index::new(100, SpecialTokens::default(), Fingerprint(1), 1, vec![shard; shards])
    }

    #[test]
    fn counts_of_documents_agree_with_the_shards() {
        let mut index = index(3, 5000, 2);
        index.check().unwrap();
        index.document_count = 7;
        assert_eq!(index.check().unwrap_err(), "7 documents, its shards have 6");
    }

    #[test]
    fn sizes_that_no_sum_holds_are_refused() {
        let total = super::super::files::check_total([u64::MAX, 1].into_iter());
        assert_eq!(total.unwrap_err(), "the sizes of its shards overflow");
    }
}
