//! `index.json` of a folder of tokens.

use std::path::Path;

use serde::{Deserialize, Serialize};

use super::index::{self, check_count, FolderIndex, IndexHead, ShardEntry, ShardFile, CREATOR};
use super::layout::BLOCK_BYTES;
use super::special_tokens::SpecialTokens;
use crate::batches::DType;
use crate::cast::to_u64;
use crate::error::Result;
use crate::fingerprint::{Fingerprint, Fingerprinter};
use crate::source::{Access, Folder, LocalFolder};

/// The smallest type on disk that holds every entry of a vocabulary: 16 bits for at most 65 536.
pub(crate) fn token_dtype(vocab_size: u32) -> DType {
    if vocab_size <= 1 << 16 {
        DType::U16
    } else {
        DType::U32
    }
}

/// One shard.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TokenShard {
    /// File name in the folder.
    pub file: String,
    /// Size of the file.
    pub file_bytes: u64,
    /// Tokens in it.
    pub token_count: u64,
    /// Documents in it.
    pub document_count: u64,
    /// CRC-32C of each 4096 bytes of the file's last tensor, which holds the CRC-32C of each block
    /// of the file before it.
    pub crc32c: Vec<u32>,
}

impl ShardEntry for TokenShard {
    fn listed(&self) -> ShardFile<'_> {
        ShardFile { file: &self.file, file_bytes: self.file_bytes, crc32c: &self.crc32c }
    }
}

/// What a prepared folder holds.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TokenIndex {
    /// Always `phalanx-tokens`.
    pub format: String,
    /// Version of the format.
    pub version: u32,
    /// Program and version that wrote it.
    pub creator: String,
    /// Element type of the tokens: U16 for vocabularies of at most 65 536 entries, else U32.
    pub dtype: DType,
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
    pub shards: Vec<TokenShard>,
    /// Fingerprint of the content: equal on machines that prepared the same text alike.
    pub fingerprint: Fingerprint,
}

impl TokenIndex {
    /// An index of `shards`; counts and fingerprint are taken from them.
    pub(crate) fn new(
        vocab_size: u32,
        special: SpecialTokens,
        tokenizer: Fingerprint,
        source_bytes: u64,
        shards: Vec<TokenShard>,
    ) -> Self {
        let index = TokenIndex {
            format: Self::FORMAT.to_owned(),
            version: Self::VERSION,
            creator: CREATOR.to_owned(),
            dtype: token_dtype(vocab_size),
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
        index.with_right_fingerprint()
    }

    /// Whether `folder` looks like a prepared folder.
    pub fn is_in(folder: &Path) -> bool {
        folder.join(index::INDEX_FILE).is_file()
    }

    /// Reads and checks the index of a prepared folder.
    ///
    /// # Errors
    /// [`Error::Io`](crate::Error::Io) if it cannot be read,
    /// [`Error::BadIndex`](crate::Error::BadIndex) if it contradicts itself or has another version.
    pub fn read(folder: &Path) -> Result<Self> {
        index::read(&LocalFolder::new(folder, Access::Read))
    }

    /// Reads and checks the index of a prepared folder, wherever it lies.
    ///
    /// # Errors
    /// As [`read`](Self::read), and what the folder says.
    pub(crate) fn read_from(folder: &dyn Folder) -> Result<Self> {
        index::read(folder)
    }
}

impl FolderIndex for TokenIndex {
    const FORMAT: &'static str = index::TOKENS_FORMAT;
    const VERSION: u32 = 2;
    type Shard = TokenShard;

    fn head(&self) -> IndexHead<'_> {
        let TokenIndex { ref format, version, block_bytes, fingerprint, .. } = *self;
        IndexHead { format, version, block_bytes, fingerprint }
    }

    fn shards(&self) -> &[TokenShard] {
        &self.shards
    }

    fn fingerprint_mut(&mut self) -> &mut Fingerprint {
        &mut self.fingerprint
    }

    fn check_kind(&self) -> std::result::Result<(), String> {
        if self.dtype != token_dtype(self.vocab_size) {
            let (dtype, size) = (self.dtype.name(), self.vocab_size);
            return Err(format!("dtype {dtype} does not fit a vocabulary of {size}"));
        }
        if self.special.all().any(|id| id >= self.vocab_size) {
            return Err("a special token lies outside the vocabulary".to_owned());
        }
        Ok(())
    }

    fn check_counts(&self) -> std::result::Result<(), String> {
        let shards = self.shards.iter();
        check_count("token", self.token_count, shards.clone().map(|shard| shard.token_count))?;
        check_count("document", self.document_count, shards.map(|shard| shard.document_count))
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cast::to_usize;
    use crate::format::layout::{BlockLayout, PAGE_BLOCKS};

    fn index(documents: u64, file_bytes: u64, shards: usize) -> TokenIndex {
        let pages =
            BlockLayout::of(file_bytes).map_or(0, |layout| layout.blocks.div_ceil(PAGE_BLOCKS));
        let shard = TokenShard {
            file: "a".to_owned(),
            file_bytes,
            token_count: 1,
            document_count: documents,
            crc32c: vec![0; to_usize(pages)],
        };
        TokenIndex::new(100, SpecialTokens::default(), Fingerprint(1), 1, vec![shard; shards])
    }

    #[test]
    fn counts_of_documents_agree_with_the_shards() {
        let mut index = index(3, 5000, 2);
        index::check(&index).unwrap();
        index.document_count = 7;
        assert_eq!(index::check(&index).unwrap_err(), "7 documents, its shards have 6");
    }
}
