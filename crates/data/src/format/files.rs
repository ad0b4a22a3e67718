//! Folders of checked files: written whole or not at all, and listed in an index.

use std::fs::{self, File};
use std::io::{ErrorKind, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use super::checked::CHECKSUMS;
use super::header::Tensor;
use super::index::BLOCK_BYTES;
use crate::cast::{to_u64, to_usize};
use crate::error::{Error, Result};
use crate::fingerprint::Fingerprinter;

/// So many checksums of blocks make a page, which has a checksum in the index.
pub(crate) const PAGE_BLOCKS: u64 = 1024;

const CHECKSUM_BYTES: u64 = 4;

/// Where the checksums of a file lie: behind what they are of, to the file's end.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Layout {
    /// Bytes before the checksums.
    pub(crate) content_bytes: u64,
    /// Blocks of these; each has a checksum.
    pub(crate) blocks: u64,
}

impl Layout {
    /// The layout of a file of this size; there are sizes that no file has.
    pub(crate) fn of(file_bytes: u64) -> Option<Self> {
        let block_bytes = to_u64(BLOCK_BYTES);
        let blocks = file_bytes.div_ceil(block_bytes + CHECKSUM_BYTES);
        let content_bytes = file_bytes.checked_sub(blocks * CHECKSUM_BYTES)?;
        let is_whole = content_bytes.div_ceil(block_bytes) == blocks;
        is_whole.then_some(Layout { content_bytes, blocks })
    }

    /// The layout of a file of so many bytes without their checksums.
    pub(crate) fn for_content(content_bytes: u64) -> Self {
        Layout { content_bytes, blocks: content_bytes.div_ceil(to_u64(BLOCK_BYTES)) }
    }
}

/// A file with checksums at its end, as an index names it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Listed<'a> {
    pub(crate) file: &'a str,
    pub(crate) file_bytes: u64,
    /// Of each page of checksums.
    pub(crate) crc32c: &'a [u32],
}

impl Listed<'_> {
    /// What contradicts itself in the entry.
    pub(crate) fn check(&self) -> std::result::Result<(), String> {
        let Listed { file, file_bytes, crc32c } = self;
        if Path::new(file).file_name().is_none_or(|name| name != *file) {
            return Err(format!("shard `{file}` is not a plain file name"));
        }
        let Some(layout) = Layout::of(*file_bytes) else {
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

/// Whether the sizes of files have a sum, which others may then take.
pub(crate) fn check_total(sizes: impl Iterator<Item = u64>) -> std::result::Result<(), String> {
    let mut sizes = sizes;
    let total = sizes.try_fold(0_u64, u64::checked_add);
    total.map(|_| ()).ok_or_else(|| "the sizes of its shards overflow".to_owned())
}

/// Where what will be `target` is written.
pub(crate) fn partial_path(target: &Path) -> PathBuf {
    let mut name = std::ffi::OsString::from(".");
    name.push(target.file_name().unwrap_or_default());
    name.push(".partial");
    target.with_file_name(name)
}

/// Whether a folder can appear at `target`: nothing is there, or a folder that holds nothing.
pub(crate) fn is_free(target: &Path) -> Result<bool> {
    match fs::symlink_metadata(target) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(true),
        Err(error) => return Err(Error::io("look at", target)(error)),
        Ok(metadata) if !metadata.is_dir() => return Ok(false),
        Ok(_) => {}
    }
    Ok(fs::read_dir(target).map_err(Error::io("open", target))?.next().is_none())
}

/// Moves a complete folder to its place and makes that durable. What came to lie there meanwhile stays, and the folder where it is.
pub(crate) fn publish(partial: &Path, target: &Path) -> Result<()> {
    sync_folder(partial)?;
    // An empty folder is replaced by the system, anything else is not.
    fs::rename(partial, target).map_err(|cause| match cause.kind() {
        ErrorKind::DirectoryNotEmpty | ErrorKind::AlreadyExists | ErrorKind::NotADirectory => {
            Error::OutputExists { path: target.to_path_buf() }
        }
        _ => Error::io("rename", partial)(cause),
    })?;
    let parent = target.parent().filter(|parent| !parent.as_os_str().is_empty());
    sync_folder(parent.unwrap_or(Path::new(".")))
}

pub(crate) fn write_synced(path: &Path, content: &[u8]) -> Result<()> {
    let mut file = File::create(path).map_err(Error::io("create", path))?;
    file.write_all(content).map_err(Error::io("write", path))?;
    file.sync_all().map_err(Error::io("sync", path))
}

/// Makes renames and new names in a folder durable.
fn sync_folder(folder: &Path) -> Result<()> {
    let file = File::open(folder).map_err(Error::io("open", folder))?;
    file.sync_all().map_err(Error::io("sync", folder))
}

/// The header's entry for the checksums of a file of `content_bytes`.
pub(crate) fn checksum_tensor(content_bytes: u64) -> Tensor {
    let blocks = to_usize(Layout::for_content(content_bytes).blocks);
    Tensor { name: CHECKSUMS.to_owned(), dtype: "U32", shape: vec![blocks], element_bytes: 4 }
}

/// Reads a file back, appends the checksums of its blocks and syncs it to disk. Gives its size and the checksums of their pages.
pub(crate) fn seal(file: &mut File, path: &Path) -> Result<(u64, Vec<u32>)> {
    file.seek(SeekFrom::Start(0)).map_err(Error::io("read", path))?;
    let (mut total, mut sums, mut block) = (0, Vec::new(), Vec::with_capacity(BLOCK_BYTES));
    loop {
        block.clear();
        let read = Read::by_ref(file).take(to_u64(BLOCK_BYTES)).read_to_end(&mut block);
        let read = read.map_err(Error::io("read", path))?;
        if read == 0 {
            break;
        }
        total += to_u64(read);
        sums.extend_from_slice(&crc32c::crc32c(&block).to_le_bytes());
    }
    file.write_all(&sums).map_err(Error::io("write", path))?;
    file.sync_all().map_err(Error::io("sync", path))?;
    let pages = sums.chunks(to_usize(PAGE_BLOCKS * CHECKSUM_BYTES));
    Ok((total + to_u64(sums.len()), pages.map(crc32c::crc32c).collect()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_size_tells_where_the_checksums_begin() {
        let block = to_u64(BLOCK_BYTES);
        for content in [1, 4095, block - 1, block, block + 1, 7 * block - 3, 7 * block, 3 << 40] {
            let layout = Layout::for_content(content);
            let file_bytes = content + 4 * layout.blocks;
            assert_eq!(Layout::of(file_bytes), Some(layout), "{content}");
        }
        // One block with its checksum, and another checksum of nothing.
        assert_eq!(Layout::of(block + 4 + 4), None);
        assert_eq!(Layout::of(3), None);
        assert_eq!(Layout::of(0), Some(Layout::default()));
        assert!(Layout::of(u64::MAX).is_some());
    }
}
