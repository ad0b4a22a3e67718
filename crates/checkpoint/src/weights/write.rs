//! Writing files of weights: under names that nobody else has, synced, and renamed, the index last.
//!
//! One file takes the place of another in one step. Several cannot, so a folder that has an index is not written to.

use std::collections::BTreeMap;
use std::hash::{BuildHasher as _, RandomState};
use std::path::{Path, PathBuf};

use serde_json::json;

use super::{FILE, INDEX};
use crate::folder::{ensure_folder, parent_of};
use crate::fs::Fs;
use crate::numbers;
use crate::shard::{header, Entry};
use crate::tensors::{portions, Spec, Tensors};
use crate::{Dtype, Error, Result};

/// Bytes that are read and written at once.
const PORTION_BYTES: u64 = 8 << 20;

/// How weights are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WeightsOptions {
    /// A file of weights has no more bytes of tensors, unless one tensor alone has. That of transformers: 5 GB.
    pub shard_bytes_max: u64,
    /// What floating-point tensors are converted to; none: as they are. Others stay what they are.
    pub dtype: Option<Dtype>,
}

impl Default for WeightsOptions {
    fn default() -> Self {
        WeightsOptions { shard_bytes_max: 5_000_000_000, dtype: None }
    }
}

/// Writes all tensors as weights: to a path that ends in `.safetensors` as this one file, to any other as a folder with
/// `model.safetensors` or, where that would be too large, several files and their index. Gives the files, the index last.
///
/// After an error or a crash there is the old file or the new one. Memory is 8 MiB, whatever the size of tensors.
///
/// # Errors
/// [`Error::Exists`] for a folder that has an index; whatever reading the tensors gives; [`Error::Io`].
pub fn write_weights(
    fs: &dyn Fs,
    path: &Path,
    tensors: &dyn Tensors,
    options: &WeightsOptions,
) -> Result<Vec<PathBuf>> {
    if path.extension().is_some_and(|end| end == "safetensors") {
        ensure_folder(fs, parent_of(path))?;
        return write_weights_file(fs, path, tensors, options.dtype)
            .map(|()| vec![path.to_owned()]);
    }
    let index = path.join(INDEX);
    if fs.open(&index).is_ok() {
        return Err(Error::Exists { path: index });
    }
    let shards = split(entries(tensors, options.dtype), options.shard_bytes_max);
    ensure_folder(fs, path)?;
    write_files(fs, path, tensors, (&names(shards.len()), &shards))
}

/// Writes all tensors to this one file, whatever its name, in a folder that is there; floating-point tensors are converted to `dtype`, if
/// it is given. Several writers of one file, on whatever machines, leave what one of them has written.
///
/// # Errors
/// As [`write_weights`].
pub fn write_weights_file(
    fs: &dyn Fs,
    path: &Path,
    tensors: &dyn Tensors,
    dtype: Option<Dtype>,
) -> Result<()> {
    let name = path.file_name().ok_or_else(|| Error::NotFound { path: path.to_path_buf() })?;
    let names = [name.to_string_lossy().into_owned()];
    let shards = [entries(tensors, dtype)];
    write_files(fs, parent_of(path), tensors, (&names, &shards)).map(drop)
}

/// Writes each file's entries, and the index of several.
fn write_files(
    fs: &dyn Fs,
    folder: &Path,
    tensors: &dyn Tensors,
    (names, shards): (&[String], &[Vec<Entry>]),
) -> Result<Vec<PathBuf>> {
    let nonce = RandomState::new().hash_one(folder);
    let mut files = Files { fs, folder, nonce, written: Vec::new() };
    let written = (|| {
        for (name, entries) in names.iter().zip(shards) {
            files.add(name, |file, partial| write_tensors(file, partial, tensors, entries))?;
        }
        if shards.len() > 1 {
            let text = index_text(names, shards)?;
            files.add(INDEX, |file, partial| {
                file.write(&text).map_err(Error::io("write", partial))
            })?;
        }
        files.publish()
    })();
    if written.is_err() {
        files.remove();
    }
    written
}

/// What is written of each tensor.
fn entries(tensors: &dyn Tensors, dtype: Option<Dtype>) -> Vec<Entry> {
    let entry = |name: &str| {
        let spec = tensors.spec(name)?;
        let dtype = dtype.filter(|_| spec.dtype.is_float()).unwrap_or(spec.dtype);
        Some(Entry { name: name.to_owned(), dtype, shape: spec.shape.to_vec() })
    };
    tensors.names().into_iter().filter_map(entry).collect()
}

fn entry_bytes(entry: &Entry) -> u64 {
    Spec { dtype: entry.dtype, shape: &entry.shape }.bytes()
}

/// The tensors of each file, in their order.
fn split(entries: Vec<Entry>, bytes_max: u64) -> Vec<Vec<Entry>> {
    let mut shards = vec![Vec::new()];
    let mut taken = 0_u64;
    for entry in entries {
        let bytes = entry_bytes(&entry);
        if taken > 0 && taken.saturating_add(bytes) > bytes_max {
            shards.push(Vec::new());
            taken = 0;
        }
        taken = taken.saturating_add(bytes);
        if let Some(shard) = shards.last_mut() {
            shard.push(entry);
        }
    }
    shards
}

fn names(count: usize) -> Vec<String> {
    match count {
        1 => vec![FILE.to_owned()],
        _ => (1..=count).map(|n| format!("model-{n:05}-of-{count:05}.safetensors")).collect(),
    }
}

fn index_text(names: &[String], shards: &[Vec<Entry>]) -> Result<Vec<u8>> {
    let total: u64 = shards.iter().flatten().map(entry_bytes).sum();
    let mut map = BTreeMap::new();
    for (name, entries) in names.iter().zip(shards) {
        map.extend(entries.iter().map(|entry| (entry.name.as_str(), name.as_str())));
    }
    let index = json!({ "metadata": { "total_size": total }, "weight_map": map });
    let bad = |error: serde_json::Error| Error::BadValue {
        what: "the index".to_owned(),
        reason: error.to_string(),
    };
    serde_json::to_vec_pretty(&index).map_err(bad)
}

fn write_tensors(
    file: &mut dyn crate::fs::Output,
    path: &Path,
    tensors: &dyn Tensors,
    entries: &[Entry],
) -> Result<()> {
    let mut entries: Vec<&Entry> = entries.iter().collect();
    // Largest elements first, so that each tensor is aligned.
    entries.sort_by_key(|entry| std::cmp::Reverse(entry.dtype.bytes()));
    let listed: Vec<Entry> = entries.iter().map(|entry| (*entry).clone()).collect();
    file.write(&header(&listed, &[("format", "pt")])?).map_err(Error::io("write", path))?;
    let mut buffer = Vec::new();
    for entry in entries {
        let Some(spec) = tensors.spec(&entry.name) else { continue };
        for extent in portions(spec, PORTION_BYTES) {
            buffer.resize(crate::cast::to_usize(crate::plan::byte_count(&extent, spec.dtype)), 0);
            tensors.read(&entry.name, &extent, &mut buffer)?;
            let bytes = numbers::convert(&buffer, spec.dtype, entry.dtype);
            file.write(&bytes).map_err(Error::io("write", path))?;
        }
    }
    Ok(())
}

/// Files that are written before any of them has its name.
struct Files<'a> {
    fs: &'a dyn Fs,
    folder: &'a Path,
    nonce: u64,
    /// Where each is, and where it is to be.
    written: Vec<(PathBuf, PathBuf)>,
}

impl Files<'_> {
    fn add(
        &mut self,
        name: &str,
        write: impl FnOnce(&mut dyn crate::fs::Output, &Path) -> Result<()>,
    ) -> Result<()> {
        let partial = self.folder.join(format!(".{name}.{:016x}.partial", self.nonce));
        let mut file = self.fs.create(&partial).map_err(Error::io("create", &partial))?;
        self.written.push((partial.clone(), self.folder.join(name)));
        write(&mut *file, &partial)?;
        file.sync().map_err(Error::io("sync", &partial))
    }

    fn publish(&mut self) -> Result<Vec<PathBuf>> {
        for (from, to) in &self.written {
            self.fs.rename(from, to).map_err(Error::io("rename", from))?;
        }
        self.fs.sync_folder(self.folder).map_err(Error::io("sync", self.folder))?;
        Ok(std::mem::take(&mut self.written).into_iter().map(|(_, to)| to).collect())
    }

    /// After an error, which is the one to tell.
    fn remove(&mut self) {
        for (partial, _) in self.written.drain(..) {
            drop(self.fs.remove_file(&partial));
        }
    }
}
