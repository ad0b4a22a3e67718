//! A checkpoint that is read.

use std::path::{Path, PathBuf};

use serde_json::value::RawValue;
use serde_json::Value;

use super::Shard;
use crate::cast::{to_u64, to_usize};
use crate::extent::Extent;
use crate::fs::{Fs, Real, Source};
use crate::manifest::{self, Manifest, TensorEntry, BLOCK_BYTES};
use crate::tensors::{check_read, Spec, Tensors};
use crate::{Error, Result};

/// A checkpoint: tensors by name, of which any box can be read on any rank of any world, and the program's values.
///
/// Nothing is mapped, and no block is handed out that does not have the checksum it was written with. It can be shared by threads.
#[derive(Debug)]
pub struct Checkpoint {
    path: PathBuf,
    pub(super) manifest: Manifest,
    pub(super) shards: Vec<Shard>,
}

impl Checkpoint {
    /// Opens the checkpoint in a folder (`…/step-00000120`): reads its manifest and looks at the sizes of its files.
    ///
    /// # Errors
    /// [`Error::NotFound`] when there is no manifest, [`Error::BadManifest`], [`Error::WrongSize`], [`Error::Damaged`] when a file's
    /// header is, [`Error::Io`].
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        Self::open_with(path.as_ref(), &Real)
    }

    /// As [`Checkpoint::open`], on another file system.
    ///
    /// # Errors
    /// As [`Checkpoint::open`].
    pub fn open_with(path: &Path, fs: &dyn Fs) -> Result<Self> {
        let manifest = read_manifest(&path.join(manifest::FILE), fs)?;
        let mut shards = Vec::with_capacity(manifest.files.len());
        for file in &manifest.files {
            let path = path.join(&file.name);
            let source = fs.open(&path).map_err(Error::io("open", &path))?;
            shards.push(Shard::open(path, source, file.bytes, file.crc32c.0.clone())?);
        }
        Self::of_parts(path.to_path_buf(), manifest, shards)
    }

    /// Of a manifest and the shards it names.
    pub(crate) fn of_parts(path: PathBuf, manifest: Manifest, shards: Vec<Shard>) -> Result<Self> {
        let checkpoint = Checkpoint { path, manifest, shards };
        checkpoint.check_headers()?;
        Ok(checkpoint)
    }

    /// Compares the blocks in which no tensor lies, which nothing else would look at.
    fn check_headers(&self) -> Result<()> {
        let mut data_start: Vec<u64> = self.shards.iter().map(|shard| shard.bytes).collect();
        for tensor in &self.manifest.tensors {
            for piece in tensor.pieces.iter().filter(|piece| !piece.extent.is_empty()) {
                let start = &mut data_start[piece.file];
                *start = piece.offset.min(*start);
            }
        }
        let mut buffer = Vec::new();
        for (shard, start) in self.shards.iter().zip(data_start) {
            let until = if start == shard.bytes {
                shard.block_count()
            } else {
                start / to_u64(BLOCK_BYTES)
            };
            (0..until).try_for_each(|block| shard.check(block, &mut buffer, None))?;
        }
        Ok(())
    }

    /// Its folder.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The step after which it was saved.
    pub fn step(&self) -> u64 {
        self.manifest.step
    }

    /// How many ranks saved it.
    pub fn world_size(&self) -> usize {
        self.manifest.world_size
    }

    /// The bytes of its shards.
    pub fn bytes(&self) -> u64 {
        self.manifest.file_bytes()
    }

    /// Its shards: name and bytes.
    pub fn files(&self) -> impl Iterator<Item = (&str, u64)> {
        self.manifest.files.iter().map(|file| (file.name.as_str(), file.bytes))
    }

    /// The boxes in which a tensor lies, and the shard of each by its place in [`Checkpoint::files`].
    pub fn pieces(&self, name: &str) -> Vec<(usize, &Extent)> {
        let pieces = self.manifest.tensor(name).map(|tensor| tensor.pieces.as_slice());
        pieces.unwrap_or_default().iter().map(|piece| (piece.file, &piece.extent)).collect()
    }

    /// The program's values, as rank 0 saved them.
    ///
    /// # Errors
    /// [`Error::BadValue`] when they would take much more memory than their text.
    pub fn values(&self) -> Result<Value> {
        manifest::parse_values(&self.manifest.values, "values")
    }

    /// The values of one rank of those that saved; none if there was no such rank.
    ///
    /// # Errors
    /// As [`Checkpoint::values`].
    pub fn rank_values(&self, rank: usize) -> Result<Option<Value>> {
        let text = self.manifest.rank_values.get(rank);
        text.map(|text| manifest::parse_values(text, &format!("values of rank {rank}"))).transpose()
    }

    /// The values as they stand in the manifest: all ranks' and each rank's.
    pub(crate) fn values_text(&self) -> (Box<RawValue>, Vec<Box<RawValue>>) {
        (self.manifest.values.clone(), self.manifest.rank_values.clone())
    }

    fn entry(&self, name: &str) -> Result<&TensorEntry> {
        let tensor = || name.to_owned();
        self.manifest
            .tensor(name)
            .ok_or_else(|| Error::NoTensor { path: self.path.clone(), tensor: tensor() })
    }
}

impl Tensors for Checkpoint {
    fn names(&self) -> Vec<&str> {
        self.manifest.tensors.iter().map(|tensor| tensor.name.as_str()).collect()
    }

    fn spec(&self, name: &str) -> Option<Spec<'_>> {
        let tensor = self.manifest.tensor(name)?;
        Some(Spec { dtype: tensor.dtype, shape: &tensor.shape })
    }

    /// The cost is that of the blocks that the box touches.
    fn read(&self, name: &str, extent: &Extent, out: &mut [u8]) -> Result<()> {
        let tensor = self.entry(name)?;
        let spec = Spec { dtype: tensor.dtype, shape: &tensor.shape };
        check_read(name, spec, extent, out)?;
        let element_bytes = to_u64(tensor.dtype.bytes());
        for piece in &tensor.pieces {
            let Some(part) = piece.extent.intersection(extent) else { continue };
            let shard = &self.shards[piece.file];
            let runs = Extent::runs(&part, &piece.extent, extent);
            let run_bytes = to_usize(runs.run_len() * element_bytes);
            for (from, to) in runs {
                let to = to_usize(to * element_bytes);
                let out = &mut out[to..to + run_bytes];
                shard.read(piece.offset + from * element_bytes, out, Some(name))?;
            }
        }
        Ok(())
    }
}

/// Reads a manifest of a size that one can have.
fn read_manifest(path: &Path, fs: &dyn Fs) -> Result<Manifest> {
    let source = match fs.open(path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            return Err(Error::NotFound { path: crate::folder::parent_of(path).to_path_buf() });
        }
        opened => opened.map_err(Error::io("open", path))?,
    };
    let text = read_all(&*source, path)?;
    Manifest::decode(&text, path)
}

fn read_all(source: &dyn Source, path: &Path) -> Result<Vec<u8>> {
    let bytes = source.bytes().map_err(Error::io("look at", path))?;
    if bytes > manifest::BYTES_MAX {
        let reason = format!("it has {bytes} bytes; at most {} are read", manifest::BYTES_MAX);
        return Err(Error::BadManifest { path: path.to_path_buf(), reason });
    }
    let mut text = vec![0; to_usize(bytes)];
    source.read_at(0, &mut text).map_err(Error::io("read", path))?;
    Ok(text)
}
