//! `index.json`: what a folder of tokens or of records holds, and how it is read and checked.

use std::path::{Path, PathBuf};

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::bytes::SizedSource;
use super::json;
use super::layout::{BlockLayout, BLOCK_BYTES, PAGE_BLOCKS};
use crate::cast::to_u64;
use crate::error::{Error, Result};
use crate::fingerprint::{Fingerprint, Fingerprinter};
use crate::source::{Access, Folder, LocalFolder};

/// The index of a prepared folder.
pub(crate) const INDEX_FILE: &str = "index.json";

/// What the index of a folder of tokens says.
pub(crate) const TOKENS_FORMAT: &str = "phalanx-tokens";

/// What the index of a folder of records says.
pub(crate) const RECORDS_FORMAT: &str = "phalanx-records";

/// The program and version that files name as their creator.
pub(crate) const CREATOR: &str = concat!("phalanx-data ", env!("CARGO_PKG_VERSION"));

/// An index has some hundred bytes a shard; more is not an index.
pub(crate) const INDEX_BYTES_MAX: u64 = 64 << 20;

/// Memory that a value of an index takes, at most. A shard has twelve, with names and brackets.
pub(crate) const VALUE_BYTES: usize = 20;

/// An index, whatever its shards hold.
pub(crate) trait FolderIndex: Serialize + DeserializeOwned {
    const FORMAT: &'static str;
    const VERSION: u32;
    type Shard: ShardEntry;

    fn head(&self) -> IndexHead<'_>;

    fn shards(&self) -> &[Self::Shard];

    fn fingerprint_mut(&mut self) -> &mut Fingerprint;

    /// What contradicts itself in the description of all shards.
    fn check_kind(&self) -> std::result::Result<(), String>;

    /// Whether the counts of the shards sum up to those of the folder.
    fn check_counts(&self) -> std::result::Result<(), String>;

    /// The fingerprint that the rest of the index has.
    fn content_fingerprint(&self) -> Fingerprint;

    fn with_right_fingerprint(mut self) -> Self {
        *self.fingerprint_mut() = self.content_fingerprint();
        self
    }
}

/// What every index says.
#[derive(Clone, Copy, Debug)]
pub(crate) struct IndexHead<'a> {
    pub(crate) format: &'a str,
    pub(crate) version: u32,
    pub(crate) block_bytes: u64,
    pub(crate) fingerprint: Fingerprint,
}

/// A shard as an index lists it.
pub(crate) trait ShardEntry: Clone + Serialize + DeserializeOwned {
    fn listed(&self) -> ShardFile<'_>;
}

/// A file with checksums at its end, as an index names it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ShardFile<'a> {
    pub(crate) file: &'a str,
    pub(crate) file_bytes: u64,
    /// Of each page of checksums.
    pub(crate) crc32c: &'a [u32],
}

impl ShardFile<'_> {
    /// What contradicts itself in the entry.
    pub(crate) fn check(&self) -> std::result::Result<(), String> {
        let ShardFile { file, file_bytes, crc32c } = self;
        if Path::new(file).file_name().is_none_or(|name| name != *file) {
            return Err(format!("shard `{file}` is not a plain file name"));
        }
        let Some(layout) = BlockLayout::of(*file_bytes) else {
            return Err(format!("shard `{file}` cannot have {file_bytes} bytes"));
        };
        let (pages, found) = (layout.blocks.div_ceil(PAGE_BLOCKS), crc32c.len());
        if to_u64(found) != pages {
            return Err(format!("shard `{file}` has {found} checksums, expected {pages}"));
        }
        Ok(())
    }

    pub(crate) fn add_checksums(&self, sum: Fingerprinter) -> Fingerprinter {
        self.crc32c.iter().fold(sum, |sum, &crc| sum.number(u64::from(crc)))
    }
}

/// Reads and checks the index of a folder.
pub(crate) fn read<I: FolderIndex>(folder: &dyn Folder) -> Result<I> {
    let (index, path): (I, _) = read_json(folder)?;
    check(&index).map_err(|reason| Error::BadIndex { path, reason })?;
    Ok(index)
}

pub(super) fn check<I: FolderIndex>(index: &I) -> std::result::Result<(), String> {
    let IndexHead { format, version, block_bytes, fingerprint } = index.head();
    if format != I::FORMAT || version != I::VERSION {
        let ours = format!("this program reads {} version {}", I::FORMAT, I::VERSION);
        return Err(format!("format {format} version {version}, {ours}"));
    }
    if block_bytes != to_u64(BLOCK_BYTES) {
        return Err(format!("blocks of {block_bytes} bytes, expected {BLOCK_BYTES}"));
    }
    index.check_kind()?;
    check_total(index.shards().iter().map(|shard| shard.listed().file_bytes))?;
    index.shards().iter().try_for_each(|shard| shard.listed().check())?;
    index.check_counts()?;
    let expected = index.content_fingerprint();
    if fingerprint != expected {
        return Err(format!("fingerprint {fingerprint}, expected {expected}"));
    }
    Ok(())
}

/// Whether the sizes of files have a sum, which others may then take.
fn check_total(sizes: impl Iterator<Item = u64>) -> std::result::Result<(), String> {
    let mut sizes = sizes;
    let total = sizes.try_fold(0_u64, u64::checked_add);
    total.map(|_| ()).ok_or_else(|| "the sizes of its shards overflow".to_owned())
}

/// Whether the counts of shards sum up to that of their folder.
pub(crate) fn check_count(
    what: &str,
    total: u64,
    mut counts: impl Iterator<Item = u64>,
) -> std::result::Result<(), String> {
    match counts.try_fold(0_u64, u64::checked_add) {
        None => Err(format!("the {what} counts overflow")),
        Some(sum) if sum != total => Err(format!("{total} {what}s, its shards have {sum}")),
        Some(_) => Ok(()),
    }
}

/// What a folder's index says that it is, of any version.
pub(crate) fn format_of(folder: &dyn Folder) -> Result<String> {
    /// The only part of an index that is read for this.
    #[derive(Deserialize)]
    struct IndexFormat {
        format: String,
    }
    let (index, _) = read_json::<IndexFormat>(folder)?;
    Ok(index.format)
}

/// Whether a folder's index says that this crate wrote it: tokens or records, of any version.
pub(crate) fn is_output(folder: &Path) -> bool {
    let format = format_of(&LocalFolder::new(folder, Access::Read));
    format.is_ok_and(|format| [TOKENS_FORMAT, RECORDS_FORMAT].contains(&&*format))
}

/// The index of a folder, of whatever kind, and what errors call it.
fn read_json<T: DeserializeOwned>(folder: &dyn Folder) -> Result<(T, PathBuf)> {
    let file = SizedSource::of(folder.open(INDEX_FILE)?, None)?;
    let bad = |reason: String| Error::BadIndex { path: file.path().to_path_buf(), reason };
    let index = json::read(&file, (INDEX_BYTES_MAX, VALUE_BYTES), "an index", bad)?;
    Ok((index, file.path().to_path_buf()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_that_no_sum_holds_are_refused() {
        let total = check_total([u64::MAX, 1].into_iter());
        assert_eq!(total.unwrap_err(), "the sizes of its shards overflow");
    }
}
