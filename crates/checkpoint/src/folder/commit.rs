//! Writing a checkpoint's files, and the one rename that makes it one.
//!
//! 1. Each rank: its shard into `step-N.tmp-…`, synced; the folder synced.
//! 2. When all have: rank 0 the manifest, synced; the folder synced; the folder renamed to `step-N`; its parent synced.
//! 3. Only then old checkpoints are removed, each renamed to a `.tmp-` name first, so that no part of one is ever taken for one.

use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::Arc;

use super::keep::Keep;
use super::names::{self, Kind};
use crate::fs::Fs;
use crate::manifest::{self, Manifest, BLOCK_BYTES};
use crate::{Checkpoint, Error, Result};

/// Where one checkpoint is being written.
#[derive(Clone, Debug)]
pub(crate) struct Target {
    pub(crate) fs: Arc<dyn Fs>,
    pub(crate) root: PathBuf,
    pub(crate) step: u64,
    pub(crate) nonce: u64,
}

impl Target {
    pub(crate) fn partial(&self) -> PathBuf {
        self.root.join(names::partial(self.step, self.nonce))
    }

    pub(crate) fn complete(&self) -> PathBuf {
        self.root.join(names::complete(self.step))
    }

    /// Writes one rank's shard and gives the checksums of its blocks. `needed` is what the whole checkpoint takes.
    pub(crate) fn write_shard(
        &self,
        name: &str,
        bytes: &[u8],
        needed: u64,
        is_cancelled: &AtomicBool,
    ) -> Result<Vec<u32>> {
        let free = self.fs.free_bytes(&self.root).unwrap_or(0);
        let folder = self.partial();
        let written = (|| {
            // The first rank that comes here makes it.
            ensure_folder(&*self.fs, &folder)?;
            let sums = write_file(&*self.fs, &folder.join(name), bytes, is_cancelled)?;
            // Of a file system that machines share, each makes durable what it has created.
            self.fs.sync_folder(&folder).map_err(Error::io("sync", &folder))?;
            Ok(sums)
        })();
        written.map_err(|error| self.explain(error, needed, free))
    }

    /// Makes a checkpoint of what all ranks have written.
    pub(crate) fn commit(&self, manifest: &Manifest) -> Result<PathBuf> {
        let (needed, free) = (manifest.file_bytes(), self.fs.free_bytes(&self.root).unwrap_or(0));
        self.finish(manifest).map_err(|error| self.explain(error, needed, free))
    }

    fn finish(&self, manifest: &Manifest) -> Result<PathBuf> {
        let folder = self.partial();
        for file in &manifest.files {
            self.look_at(&folder.join(&file.name), file.bytes)?;
        }
        let (text, path) = (manifest.encode()?, folder.join(manifest::FILE));
        // What could not be read again is not committed.
        Manifest::decode(&text, &path)?;
        write_file(&*self.fs, &path, &text, &AtomicBool::new(false))?;
        self.fs.sync_folder(&folder).map_err(Error::io("sync", &folder))?;
        self.publish(&folder)
    }

    /// Whether another rank's file is there.
    fn look_at(&self, path: &Path, expected: u64) -> Result<()> {
        let source = match self.fs.open(path) {
            Err(error) if error.kind() == ErrorKind::NotFound => {
                return Err(Error::NotShared { path: path.to_path_buf() });
            }
            opened => opened.map_err(Error::io("open", path))?,
        };
        let actual = source.bytes().map_err(Error::io("look at", path))?;
        if actual != expected {
            return Err(Error::WrongSize { path: path.to_path_buf(), expected, actual });
        }
        Ok(())
    }

    /// The rename. A checkpoint that has the name gets another one first, by which it is found until the new one is in its place.
    fn publish(&self, folder: &Path) -> Result<PathBuf> {
        let target = self.complete();
        let aside = self.root.join(names::replaced(self.step, self.nonce));
        let is_replacing = match self.fs.rename(&target, &aside) {
            Ok(()) => true,
            Err(error) if error.kind() == ErrorKind::NotFound => false,
            Err(error) => return Err(Error::io("rename", &target)(error)),
        };
        if let Err(error) = self.fs.rename(folder, &target) {
            if is_replacing {
                // It is found by either name; the first error is the one to tell.
                drop(self.fs.rename(&aside, &target));
            }
            return Err(Error::io("rename", folder)(error));
        }
        self.fs.sync_folder(&self.root).map_err(Error::io("sync", &self.root))?;
        Ok(target)
    }

    /// Removes what was written, after a failure.
    pub(crate) fn abandon(&self) -> Result<()> {
        match remove_files(&*self.fs, &self.partial()) {
            Err(Error::Io { cause, .. }) if cause.kind() == ErrorKind::NotFound => Ok(()),
            done => done,
        }
    }

    /// A full disk, with what was needed.
    fn explain(&self, error: Error, needed: u64, free: u64) -> Error {
        match error {
            Error::Io { cause, .. }
                if matches!(cause.kind(), ErrorKind::StorageFull | ErrorKind::QuotaExceeded) =>
            {
                Error::NoSpace { path: self.root.clone(), needed, free }
            }
            other => other,
        }
    }
}

/// Blocks that are handed to the disk at once: so many that the time between two calls does not count.
const WRITE_BLOCKS: usize = 8;

/// Writes and syncs a new file, and gives the checksums of its blocks.
pub(crate) fn write_file(
    fs: &dyn Fs,
    path: &Path,
    bytes: &[u8],
    is_cancelled: &AtomicBool,
) -> Result<Vec<u32>> {
    let mut file = fs.create(path).map_err(Error::io("create", path))?;
    let mut sums = Vec::with_capacity(bytes.len().div_ceil(BLOCK_BYTES));
    for stretch in bytes.chunks(WRITE_BLOCKS * BLOCK_BYTES) {
        if is_cancelled.load(Ordering::Relaxed) {
            return Err(Error::Cancelled);
        }
        sums.extend(stretch.chunks(BLOCK_BYTES).map(crc32c::crc32c));
        file.write(stretch).map_err(Error::io("write", path))?;
    }
    file.sync().map_err(Error::io("sync", path))?;
    Ok(sums)
}

/// Creates a folder and those above it that are missing, each durable.
pub(crate) fn ensure_folder(fs: &dyn Fs, path: &Path) -> Result<()> {
    let parent = parent_of(path);
    let created = match fs.create_folder(path) {
        Err(error) if error.kind() == ErrorKind::NotFound && parent != path => {
            ensure_folder(fs, parent)?;
            fs.create_folder(path)
        }
        created => created,
    };
    match created {
        Ok(()) => fs.sync_folder(parent).map_err(Error::io("sync", parent)),
        Err(error) if error.kind() == ErrorKind::AlreadyExists => Ok(()),
        Err(error) => Err(Error::io("create", path)(error)),
    }
}

pub(crate) fn parent_of(path: &Path) -> &Path {
    path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

/// Removes what is no longer wanted after a checkpoint was committed: older ones, replaced ones, and what earlier runs left.
///
/// Gives what could not be removed; none of it makes the new checkpoint worse.
pub(crate) fn tidy(target: &Target, keep: &Keep) -> Vec<Error> {
    let mut problems = Vec::new();
    let names = match target.fs.list(&target.root) {
        Ok(names) => names,
        Err(error) => return vec![Error::io("list", &target.root)(error)],
    };
    let known: Vec<(&String, u64, Kind)> = names
        .iter()
        .filter_map(|name| names::parse(name).map(|(step, kind)| (name, step, kind)))
        .collect();
    let plain = good(target, &known, Kind::Complete);
    // Left alone by a crash between two renames, one that was to be replaced is a checkpoint as well.
    let mut all = [good(target, &known, Kind::Replaced), plain.clone()].concat();
    all.sort_unstable();
    all.dedup();
    let unwanted = keep.removed(&all, target.step);
    for (name, step, kind) in known {
        let (is_plain, is_unwanted) = (plain.contains(&step), unwanted.contains(&step));
        let removed = match kind {
            Kind::Partial => remove_files(&*target.fs, &target.root.join(name)),
            Kind::Replaced if is_plain || is_unwanted => remove(target, name, step),
            Kind::Complete if is_plain && is_unwanted => remove(target, name, step),
            Kind::Replaced | Kind::Complete => Ok(()),
        };
        problems.extend(removed.err());
    }
    problems
}

/// The steps of the checkpoints of one kind that can be opened.
fn good(target: &Target, known: &[(&String, u64, Kind)], wanted: Kind) -> Vec<u64> {
    let is_good = |name: &str| Checkpoint::open_with(&target.root.join(name), &*target.fs).is_ok();
    let good = known.iter().filter(|(name, _, kind)| *kind == wanted && is_good(name));
    good.map(|(_, step, _)| *step).collect()
}

/// Removes a checkpoint: from the first step on it is none.
fn remove(target: &Target, name: &str, step: u64) -> Result<()> {
    let from = target.root.join(name);
    // The kind keeps two names of one step apart.
    let to =
        target.root.join(names::partial(step, target.nonce ^ u64::from(name.contains(".old-"))));
    target.fs.rename(&from, &to).map_err(Error::io("rename", &from))?;
    target.fs.sync_folder(&target.root).map_err(Error::io("sync", &target.root))?;
    remove_files(&*target.fs, &to)
}

/// Removes a folder of files.
fn remove_files(fs: &dyn Fs, folder: &Path) -> Result<()> {
    for name in fs.list(folder).map_err(Error::io("list", folder))? {
        let path = folder.join(name);
        fs.remove_file(&path).map_err(Error::io("remove", &path))?;
    }
    fs.remove_folder(folder).map_err(Error::io("remove", folder))
}
