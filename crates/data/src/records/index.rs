//! `index.json` of a folder of records.

use std::path::Path;

use serde::{Deserialize, Serialize};

use super::field::{self, Field};
use crate::cast::to_u64;
use crate::error::Result;
use crate::fingerprint::{Fingerprint, Fingerprinter};
use crate::format::index::{
    self, check_count, FolderIndex, IndexHead, ShardEntry, ShardFile, CREATOR,
};
use crate::format::layout::BLOCK_BYTES;
use crate::source::{Access, Folder, LocalFolder};

/// One shard of records.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RecordShard {
    /// File name in the folder.
    pub file: String,
    /// Size of the file.
    pub file_bytes: u64,
    /// Records in it.
    pub record_count: u64,
    /// CRC-32C of each 4096 bytes of the file's last tensor, which holds the CRC-32C of each block
    /// of the file before it.
    pub crc32c: Vec<u32>,
    /// The most elements that a record has in each field. Empty in folders written before this was
    /// kept.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub longest: Vec<u64>,
}

impl ShardEntry for RecordShard {
    fn listed(&self) -> ShardFile<'_> {
        ShardFile { file: &self.file, file_bytes: self.file_bytes, crc32c: &self.crc32c }
    }
}

/// What a folder of records holds.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RecordIndex {
    /// Always `phalanx-records`.
    pub format: String,
    /// Version of the format.
    pub version: u32,
    /// Program and version that wrote it.
    pub creator: String,
    /// The columns.
    pub fields: Vec<Field>,
    /// Records in all shards.
    pub record_count: u64,
    /// Bytes of a block with a checksum of its own.
    pub block_bytes: u64,
    /// The shards, in order.
    pub shards: Vec<RecordShard>,
    /// Fingerprint of the content.
    pub fingerprint: Fingerprint,
}

impl RecordIndex {
    pub(crate) fn new(fields: Vec<Field>, shards: Vec<RecordShard>) -> Self {
        let index = RecordIndex {
            format: Self::FORMAT.to_owned(),
            version: Self::VERSION,
            creator: CREATOR.to_owned(),
            fields,
            record_count: shards.iter().map(|shard| shard.record_count).sum(),
            block_bytes: to_u64(BLOCK_BYTES),
            shards,
            fingerprint: Fingerprint(0),
        };
        index.with_right_fingerprint()
    }

    /// Whether the index of a folder of this machine says that it holds records.
    pub fn is_in(folder: &Path) -> bool {
        Self::is_in_folder(&LocalFolder::new(folder, Access::Read)).unwrap_or(false)
    }

    /// Whether a folder's index says that it holds records, wherever the folder lies.
    ///
    /// # Errors
    /// If there is no index or it cannot be read, and [`Error::BadIndex`](crate::Error::BadIndex)
    /// if it is none.
    pub(crate) fn is_in_folder(folder: &dyn Folder) -> Result<bool> {
        Ok(index::format_of(folder)? == index::RECORDS_FORMAT)
    }

    /// Reads and checks the index of a folder.
    ///
    /// # Errors
    /// [`Error::Io`](crate::Error::Io) if it cannot be read,
    /// [`Error::BadIndex`](crate::Error::BadIndex) if it contradicts itself or has another version.
    pub fn read(folder: &Path) -> Result<Self> {
        index::read(&LocalFolder::new(folder, Access::Read))
    }

    /// Reads and checks the index of a folder, wherever it lies.
    ///
    /// # Errors
    /// As [`read`](Self::read), and what the folder says.
    pub(crate) fn read_from(folder: &dyn Folder) -> Result<Self> {
        index::read(folder)
    }
}

impl FolderIndex for RecordIndex {
    const FORMAT: &'static str = index::RECORDS_FORMAT;
    const VERSION: u32 = 2;
    type Shard = RecordShard;

    fn head(&self) -> IndexHead<'_> {
        let RecordIndex { ref format, version, block_bytes, fingerprint, .. } = *self;
        IndexHead { format, version, block_bytes, fingerprint }
    }

    fn shards(&self) -> &[RecordShard] {
        &self.shards
    }

    fn fingerprint_mut(&mut self) -> &mut Fingerprint {
        &mut self.fingerprint
    }

    fn check_kind(&self) -> std::result::Result<(), String> {
        field::check(&self.fields)?;
        let fields = self.fields.len();
        match self.shards.iter().find(|shard| ![0, fields].contains(&shard.longest.len())) {
            Some(RecordShard { file, longest, .. }) => {
                Err(format!("`{file}` has {} longest of {fields} fields", longest.len()))
            }
            None => Ok(()),
        }
    }

    fn check_counts(&self) -> std::result::Result<(), String> {
        let counts = self.shards.iter().map(|shard| shard.record_count);
        check_count("record", self.record_count, counts)
    }

    fn content_fingerprint(&self) -> Fingerprint {
        let mut sum = Fingerprinter::new("phalanx-records 2");
        for field in &self.fields {
            sum = sum.bytes(field.name.as_bytes()).bytes(field.dtype.name().as_bytes());
            sum = sum.bytes(format!("{:?}", field.shape).as_bytes());
        }
        for shard in &self.shards {
            sum = sum.number(shard.file_bytes).number(shard.record_count);
            sum = shard.listed().add_checksums(sum);
            sum = shard.longest.iter().fold(sum, |sum, &longest| sum.number(longest));
        }
        sum.finish()
    }
}
