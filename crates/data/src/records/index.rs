//! `index.json` of a folder of records.

use std::path::Path;

use serde::{Deserialize, Serialize};

use super::field::{self, Field};
use crate::cast::to_u64;
use crate::error::{Error, Result};
use crate::fingerprint::{Fingerprint, Fingerprinter};
use crate::format::files::{check_total, Listed};
use crate::format::{read_json, BLOCK_BYTES, RECORDS_FORMAT};
use crate::source::{Access, Folder, LocalFolder};

const VERSION: u32 = 2;

/// One shard of records.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RecordShard {
    /// File name in the folder.
    pub file: String,
    /// Size of the file.
    pub file_bytes: u64,
    /// Records in it.
    pub record_count: u64,
    /// CRC-32C of each 4096 bytes of the file's last tensor, which holds the CRC-32C of each block of the file before it.
    pub crc32c: Vec<u32>,
    /// The most elements that a record has in each field. Empty in folders written before this was kept.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub longest: Vec<u64>,
}

impl RecordShard {
    pub(crate) fn listed(&self) -> Listed<'_> {
        Listed { file: &self.file, file_bytes: self.file_bytes, crc32c: &self.crc32c }
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
        let mut index = RecordIndex {
            format: RECORDS_FORMAT.to_owned(),
            version: VERSION,
            creator: concat!("phalanx-data ", env!("CARGO_PKG_VERSION")).to_owned(),
            fields,
            record_count: shards.iter().map(|shard| shard.record_count).sum(),
            block_bytes: to_u64(BLOCK_BYTES),
            shards,
            fingerprint: Fingerprint(0),
        };
        index.fingerprint = index.content_fingerprint();
        index
    }

    /// Whether the index of a folder of this machine says that it holds records.
    pub fn is_in(folder: &Path) -> bool {
        Self::is_in_folder(&LocalFolder::new(folder, Access::Read)).unwrap_or(false)
    }

    /// Whether a folder's index says that it holds records, wherever the folder lies.
    ///
    /// # Errors
    /// If there is no index or it cannot be read, and [`Error::BadIndex`] if it is none.
    pub fn is_in_folder(folder: &dyn Folder) -> Result<bool> {
        /// The only part of any index that is read for this.
        #[derive(Deserialize)]
        struct Kind {
            format: String,
        }
        let (kind, _): (Kind, _) = read_json(folder)?;
        Ok(kind.format == RECORDS_FORMAT)
    }

    /// Reads and checks the index of a folder.
    ///
    /// # Errors
    /// [`Error::Io`] if it cannot be read, [`Error::BadIndex`] if it contradicts itself or has another version.
    pub fn read(folder: &Path) -> Result<Self> {
        Self::read_from(&LocalFolder::new(folder, Access::Read))
    }

    /// Reads and checks the index of a folder, wherever it lies.
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
        let RecordIndex { format, version, block_bytes, .. } = self;
        if format != RECORDS_FORMAT || *version != VERSION {
            let ours = format!("this program reads {RECORDS_FORMAT} version {VERSION}");
            return Err(format!("format {format} version {version}, {ours}"));
        }
        if *block_bytes != to_u64(BLOCK_BYTES) {
            return Err(format!("blocks of {block_bytes} bytes, expected {BLOCK_BYTES}"));
        }
        field::check(&self.fields)?;
        check_total(self.shards.iter().map(|shard| shard.file_bytes))?;
        let mut total = 0_u64;
        for shard in &self.shards {
            shard.listed().check()?;
            if ![0, self.fields.len()].contains(&shard.longest.len()) {
                let (found, fields) = (shard.longest.len(), self.fields.len());
                return Err(format!("`{}` has {found} longest of {fields} fields", shard.file));
            }
            let sum = total.checked_add(shard.record_count);
            total = sum.ok_or_else(|| "the record counts overflow".to_owned())?;
        }
        if total != self.record_count {
            return Err(format!("{} records, its shards have {total}", self.record_count));
        }
        let expected = self.content_fingerprint();
        if expected != self.fingerprint {
            return Err(format!("fingerprint {}, expected {expected}", self.fingerprint));
        }
        Ok(())
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
