//! Reading files of weights. They have no checksums: what is compared is that headers fit files.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::Deserialize;

use super::{FILE, INDEX};
use crate::cast::{to_u64, to_usize};
use crate::extent::Extent;
use crate::folder::parent_of;
use crate::fs::{Fs, Real, Source};
use crate::header::{Described, Header};
use crate::shard::{data_start, LENGTH_BYTES};
use crate::tensors::{check_read, Spec, Tensors};
use crate::{Error, Result};

/// No index is larger.
const INDEX_BYTES_MAX: u64 = 1 << 28;

/// Weights in one file or several.
#[derive(Debug)]
pub struct Weights {
    path: PathBuf,
    /// Sorted by name.
    tensors: BTreeMap<String, (usize, Described)>,
    files: Vec<(PathBuf, Arc<dyn Source>)>,
}

/// What is used of an index.
#[derive(Deserialize)]
struct Index {
    weight_map: BTreeMap<String, String>,
}

impl Weights {
    /// Opens a `.safetensors` file, an index, or a folder with either.
    ///
    /// # Errors
    /// [`Error::NotFound`] when there is nothing of that kind, [`Error::BadWeights`] for a header or an index that cannot be used,
    /// [`Error::Io`].
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let mut weights =
            Weights { path: path.to_path_buf(), tensors: BTreeMap::new(), files: Vec::new() };
        if path.extension().is_some_and(|end| end == "json") {
            weights.add_indexed(path)?;
        } else if path.is_file() {
            weights.add_file(path)?;
        } else if path.join(INDEX).is_file() {
            weights.add_indexed(&path.join(INDEX))?;
        } else if path.join(FILE).is_file() {
            weights.add_file(&path.join(FILE))?;
        } else {
            weights.add_all(path)?;
        }
        Ok(weights)
    }

    /// Every `.safetensors` file of a folder that has neither an index nor parts.
    fn add_all(&mut self, folder: &Path) -> Result<()> {
        let not_found = || Error::NotFound { path: folder.to_path_buf() };
        if !folder.is_dir() {
            return Err(not_found());
        }
        let names = Real.list(folder).map_err(Error::io("list", folder))?;
        let files = || names.iter().filter(|name| name.ends_with(".safetensors"));
        if files().any(|name| name.contains("-of-")) {
            // Some of them may be missing: the index comes last.
            let reason = format!("it has parts of weights and no {INDEX}");
            return Err(Error::BadWeights { path: folder.to_path_buf(), reason });
        }
        files().map(|name| folder.join(name)).try_for_each(|file| self.add_file(&file))?;
        if self.files.is_empty() {
            return Err(not_found());
        }
        Ok(())
    }

    fn add_indexed(&mut self, path: &Path) -> Result<()> {
        let bad = |reason: String| Error::BadWeights { path: path.to_path_buf(), reason };
        let source = Real.open(path).map_err(Error::io("open", path))?;
        let bytes = source.bytes().map_err(Error::io("look at", path))?;
        if bytes > INDEX_BYTES_MAX {
            return Err(bad(format!("it has {bytes} bytes; at most {INDEX_BYTES_MAX} are read")));
        }
        let mut text = vec![0; to_usize(bytes)];
        source.read_at(0, &mut text).map_err(Error::io("read", path))?;
        let index: Index = serde_json::from_slice(&text).map_err(|error| bad(error.to_string()))?;
        let mut names: Vec<&String> = index.weight_map.values().collect();
        names.sort();
        names.dedup();
        for name in names {
            if name.contains(['/', '\\', '\0']) || name == ".." {
                return Err(bad(format!("`{name}` is not a plain file name")));
            }
            self.add_file(&parent_of(path).join(name))?;
        }
        for (tensor, file) in &index.weight_map {
            let found = self.tensors.get(tensor).map(|(at, _)| &self.files[*at].0);
            if found.and_then(|found| found.file_name()) != Some(file.as_ref()) {
                return Err(bad(format!("`{tensor}` is not in {file}")));
            }
        }
        self.tensors.retain(|name, _| index.weight_map.contains_key(name));
        Ok(())
    }

    fn add_file(&mut self, path: &Path) -> Result<()> {
        let bad = |reason: String| Error::BadWeights { path: path.to_path_buf(), reason };
        let source = Real.open(path).map_err(Error::io("open", path))?;
        let bytes = source.bytes().map_err(Error::io("look at", path))?;
        let mut length = [0; LENGTH_BYTES];
        if bytes < to_u64(LENGTH_BYTES) {
            return Err(bad(format!("it has {bytes} bytes, too few for a header")));
        }
        source.read_at(0, &mut length).map_err(Error::io("read", path))?;
        let start = data_start(length, bytes).ok_or_else(|| {
            let claimed = u64::from_le_bytes(length);
            bad(format!("its header claims {claimed} bytes of a file of {bytes}"))
        })?;
        let mut text = vec![0; to_usize(start) - LENGTH_BYTES];
        source.read_at(to_u64(LENGTH_BYTES), &mut text).map_err(Error::io("read", path))?;
        let header = Header::parse(&text, bytes).map_err(bad)?;
        for tensor in header.tensors {
            let name = tensor.name.clone();
            if let Some((other, _)) = self.tensors.insert(name.clone(), (self.files.len(), tensor))
            {
                let other = self.files[other].0.display().to_string();
                return Err(bad(format!("`{name}` is in {other} as well")));
            }
        }
        self.files.push((path.to_path_buf(), source));
        Ok(())
    }
}

impl Tensors for Weights {
    fn names(&self) -> Vec<&str> {
        self.tensors.keys().map(String::as_str).collect()
    }

    fn spec(&self, name: &str) -> Option<Spec<'_>> {
        let (_, tensor) = self.tensors.get(name)?;
        Some(Spec { dtype: tensor.dtype, shape: &tensor.shape })
    }

    fn read(&self, name: &str, extent: &Extent, out: &mut [u8]) -> Result<()> {
        let Some((file, tensor)) = self.tensors.get(name) else {
            let (path, tensor) = (self.path.clone(), name.to_owned());
            return Err(Error::NoTensor { path, tensor });
        };
        let spec = Spec { dtype: tensor.dtype, shape: &tensor.shape };
        check_read(name, spec, extent, out)?;
        if extent.is_empty() {
            return Ok(());
        }
        let (path, source) = &self.files[*file];
        let element_bytes = to_u64(tensor.dtype.bytes());
        let runs = Extent::runs(extent, &Extent::whole(&tensor.shape), extent);
        let run_bytes = to_usize(runs.run_len() * element_bytes);
        for (from, to) in runs {
            let to = to_usize(to * element_bytes);
            let out = &mut out[to..to + run_bytes];
            let offset = tensor.offset + from * element_bytes;
            source.read_at(offset, out).map_err(Error::io("read", path))?;
        }
        Ok(())
    }
}
