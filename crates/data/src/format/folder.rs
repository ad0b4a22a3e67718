//! Writing a folder so that it is there whole or not at all.
//!
//! Everything is written into a hidden folder beside the final one, synced to disk, and renamed. A
//! crash leaves a hidden folder that nobody reads; the next writer of the same data removes it.

use std::fs::{self, File};
use std::io::{ErrorKind, Write};
use std::path::{Path, PathBuf};

use serde::Serialize;

use super::index::{ShardEntry, INDEX_FILE};
use super::json;
use crate::error::{Error, Result};

/// What the names of shards end in.
pub(crate) const SHARD_EXTENSION: &str = "safetensors";

/// The hidden folder that will be moved to its place when it is complete.
#[derive(Debug)]
pub(crate) struct PartialFolder {
    path: PathBuf,
    target: PathBuf,
    on_drop: OnDrop,
}

/// What becomes of the hidden folder when it is dropped before it is complete.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum OnDrop {
    Remove,
    /// The next writer goes on with it.
    Keep,
}

impl PartialFolder {
    /// The hidden folder for `target`. Of what an earlier writer left half done it keeps the shards
    /// in `done`, and nothing at all if there are none.
    pub(crate) fn open(target: &Path, done: &[impl ShardEntry], on_drop: OnDrop) -> Result<Self> {
        let path = partial_path(target);
        let failed = |cause| Error::CacheNotWritable { path: path.clone(), cause };
        if done.is_empty() && path.exists() {
            fs::remove_dir_all(&path).map_err(failed)?;
        }
        fs::create_dir_all(&path).map_err(failed)?;
        for entry in fs::read_dir(&path).map_err(Error::io("list", &path))? {
            let entry = entry.map_err(Error::io("list", &path))?;
            let is_shard = entry.path().extension().is_some_and(|end| end == SHARD_EXTENSION);
            let name = entry.file_name();
            if is_shard && !done.iter().any(|shard| name == *shard.listed().file) {
                fs::remove_file(entry.path()).map_err(Error::io("remove", &entry.path()))?;
            }
        }
        Ok(PartialFolder { path, target: target.to_path_buf(), on_drop })
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Writes the index and moves the folder to its place.
    pub(crate) fn finish(mut self, index: &impl Serialize) -> Result<()> {
        write_synced(&self.path.join(INDEX_FILE), &json::to_bytes(index))?;
        // It is complete: if it cannot be moved, it is not thrown away.
        self.on_drop = OnDrop::Keep;
        publish(&self.path, &self.target)
    }
}

impl Drop for PartialFolder {
    fn drop(&mut self) {
        if self.on_drop == OnDrop::Remove {
            // What cannot be removed is removed by the next writer, or reported by it.
            drop(fs::remove_dir_all(&self.path));
        }
    }
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

/// Moves a complete folder to its place and makes that durable. What came to lie there meanwhile
/// stays, and the folder where it is.
fn publish(partial: &Path, target: &Path) -> Result<()> {
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
