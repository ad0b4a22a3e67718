//! Folders of checked files: written whole or not at all, and listed in an index.

use std::fs::{self, File};
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use super::index::BLOCK_BYTES;
use crate::cast::to_u64;
use crate::error::{Error, Result};
use crate::fingerprint::Fingerprinter;

/// A file with the checksums of its blocks, as an index names it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Listed<'a> {
    pub(crate) file: &'a str,
    pub(crate) file_bytes: u64,
    pub(crate) crc32c: &'a [u32],
}

impl Listed<'_> {
    /// What contradicts itself in the entry.
    pub(crate) fn check(&self) -> std::result::Result<(), String> {
        let Listed { file, file_bytes, crc32c } = self;
        if Path::new(file).file_name().is_none_or(|name| name != *file) {
            return Err(format!("shard `{file}` is not a plain file name"));
        }
        let (blocks, found) = (file_bytes.div_ceil(to_u64(BLOCK_BYTES)), crc32c.len());
        if to_u64(found) != blocks {
            return Err(format!("shard `{file}` has {found} checksums, expected {blocks}"));
        }
        Ok(())
    }

    pub(crate) fn add_checksums(&self, sum: Fingerprinter) -> Fingerprinter {
        self.crc32c.iter().fold(sum, |sum, &crc| sum.number(u64::from(crc)))
    }
}

/// Where what will be `target` is written.
pub(crate) fn partial_path(target: &Path) -> PathBuf {
    let mut name = std::ffi::OsString::from(".");
    name.push(target.file_name().unwrap_or_default());
    name.push(".partial");
    target.with_file_name(name)
}

/// Moves a complete folder to its place and makes that durable.
pub(crate) fn publish(partial: &Path, target: &Path) -> Result<()> {
    sync_folder(partial)?;
    if target.exists() {
        fs::remove_dir_all(target).map_err(Error::io("remove", target))?;
    }
    fs::rename(partial, target).map_err(Error::io("rename", partial))?;
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

/// Size and block checksums of a file, as they are read back.
pub(crate) fn checksums(file: &mut File, path: &Path) -> Result<(u64, Vec<u32>)> {
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
