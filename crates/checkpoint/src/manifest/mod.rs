//! The manifest: what a checkpoint consists of, with a checksum for every block of every file.
//!
//! It is one line of JSON whose last field is the CRC-32C of everything before that field, so that it guards itself. Checksums are
//! of blocks of whole files, headers included: there is no byte of a checkpoint that no checksum covers.
//!
//! Parsing is bounded: the text has a greatest size, the program's values stay text until they are asked for, and every number is
//! compared with what it counts before anything is allocated by it.

mod check;
mod sums;

use std::path::Path;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;
use serde_json::Value;

pub(crate) use sums::Sums;

use crate::extent::Extent;
use crate::{Dtype, Error, Result};

/// The file of a checkpoint without which it is none.
pub(crate) const FILE: &str = "manifest.json";

/// Bytes that have a checksum of their own.
pub const BLOCK_BYTES: usize = 1 << 20;

/// No manifest is larger.
pub(crate) const BYTES_MAX: u64 = 1 << 28;

const FORMAT: &str = "phalanx-checkpoint";

/// Of the format; others are refused.
const VERSION: u32 = 1;

#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Manifest {
    format: String,
    version: u32,
    pub(crate) step: u64,
    /// The ranks that saved; as many as `rank_values` has entries.
    pub(crate) world_size: usize,
    block_bytes: u64,
    pub(crate) files: Vec<FileEntry>,
    /// Sorted by name.
    pub(crate) tensors: Vec<TensorEntry>,
    pub(crate) values: Box<RawValue>,
    pub(crate) rank_values: Vec<Box<RawValue>>,
}

/// A shard.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct FileEntry {
    pub(crate) name: String,
    pub(crate) bytes: u64,
    /// Of each block.
    pub(crate) crc32c: Sums,
}

/// A tensor, and where its pieces lie.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct TensorEntry {
    pub(crate) name: String,
    pub(crate) dtype: Dtype,
    pub(crate) shape: Vec<u64>,
    pub(crate) pieces: Vec<Piece>,
}

/// A box of a tensor in a file.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Piece {
    /// Its place in the list of files.
    pub(crate) file: usize,
    /// From the file's beginning.
    pub(crate) offset: u64,
    #[serde(rename = "box")]
    pub(crate) extent: Extent,
}

impl Manifest {
    pub(crate) fn new(
        step: u64,
        files: Vec<FileEntry>,
        tensors: Vec<TensorEntry>,
        values: Box<RawValue>,
        rank_values: Vec<Box<RawValue>>,
    ) -> Self {
        Manifest {
            format: FORMAT.to_owned(),
            version: VERSION,
            step,
            world_size: rank_values.len(),
            block_bytes: crate::cast::to_u64(BLOCK_BYTES),
            files,
            tensors,
            values,
            rank_values,
        }
    }

    /// The text of the file.
    pub(crate) fn encode(&self) -> Result<Vec<u8>> {
        seal_json(self, "the manifest")
    }

    /// Parses and checks a text. `path` is for errors.
    pub(crate) fn decode(text: &[u8], path: &Path) -> Result<Self> {
        let bad = |reason: String| Error::BadManifest { path: path.to_path_buf(), reason };
        let manifest: Manifest = unseal_json(text, path)?;
        if (manifest.format.as_str(), manifest.version) != (FORMAT, VERSION) {
            let Manifest { format, version, .. } = &manifest;
            return Err(bad(format!("it is {format} {version}, expected {FORMAT} {VERSION}")));
        }
        manifest.check().map_err(bad)?;
        Ok(manifest)
    }

    pub(crate) fn tensor(&self, name: &str) -> Option<&TensorEntry> {
        let at = self.tensors.binary_search_by(|tensor| tensor.name.as_str().cmp(name)).ok()?;
        self.tensors.get(at)
    }

    /// The bytes of all files.
    pub(crate) fn file_bytes(&self) -> u64 {
        self.files.iter().map(|file| file.bytes).sum()
    }
}

/// An object as JSON that guards itself.
pub(crate) fn seal_json(object: &impl Serialize, what: &str) -> Result<Vec<u8>> {
    let bad = |error: serde_json::Error| Error::BadValue {
        what: what.to_owned(),
        reason: error.to_string(),
    };
    let mut text = serde_json::to_vec(object).map_err(bad)?;
    // The closing brace comes after the seal.
    text.pop();
    let seal = seal(&text);
    text.extend_from_slice(seal.as_bytes());
    Ok(text)
}

/// The object of a text that guards itself.
pub(crate) fn unseal_json<T: DeserializeOwned>(text: &[u8], path: &Path) -> Result<T> {
    let bad = |reason: String| Error::BadManifest { path: path.to_path_buf(), reason };
    let (content, found) = text.split_at(text.len().saturating_sub(seal(b"").len()));
    if found != seal(content).as_bytes() {
        let reason = "its checksum is not that of its content: it was cut off or written to";
        return Err(bad(reason.to_owned()));
    }
    let mut object = content.to_vec();
    object.push(b'}');
    serde_json::from_slice(&object).map_err(|error| bad(error.to_string()))
}

/// The end of a text with this content.
fn seal(content: &[u8]) -> String {
    format!(",\"manifest_crc32c\":\"{:08x}\"}}\n", crc32c::crc32c(content))
}

/// What [`Value`]s of a text may take besides its size.
const VALUES_BYTES_MAX: usize = 64 << 20;

/// The program's values, unless they would take many times the memory of their text.
pub(crate) fn parse_values(text: &RawValue, what: &str) -> Result<Value> {
    let bad = |reason: String| Error::BadValue { what: what.to_owned(), reason };
    let text = text.get();
    let count = text.bytes().filter(|byte| matches!(byte, b',' | b'[' | b'{')).count();
    if count.saturating_mul(size_of::<Value>()) > text.len().saturating_add(VALUES_BYTES_MAX) {
        return Err(bad(format!("{count} values are too many; save them as a tensor")));
    }
    serde_json::from_str(text).map_err(|error| bad(error.to_string()))
}

/// A program's values as text that [`parse_values`] will take.
pub(crate) fn values_text(values: &Value, what: &str) -> Result<Box<RawValue>> {
    let bad = |error: serde_json::Error| Error::BadValue {
        what: what.to_owned(),
        reason: error.to_string(),
    };
    let text = serde_json::value::to_raw_value(values).map_err(bad)?;
    parse_values(&text, what)?;
    Ok(text)
}

#[cfg(test)]
mod tests;
