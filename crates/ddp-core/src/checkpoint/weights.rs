//! Model weights as safetensors files.
//!
//! A file is written under a name that nobody else has, flushed to disk and renamed, and the folder is flushed as well, so
//! that a crash leaves the old file or the new one, never a part; and of several writers, on whatever machines,
//! one has written all of it.
#![expect(unsafe_code, reason = "gate: maps a weights file")]

use std::borrow::Cow;
use std::fmt::Write as _;
use std::fs::{self, File};
use std::hash::{BuildHasher as _, RandomState};
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use safetensors::{Dtype, SafeTensors, View};
use tch::{nn, Kind, Tensor};

use crate::{Error, Result};

/// A tensor on its way into a file: its bytes are copied out one tensor at a time.
struct Saved {
    tensor: Tensor,
    dtype: Dtype,
    shape: Vec<usize>,
}

impl View for Saved {
    fn dtype(&self) -> Dtype {
        self.dtype
    }

    fn shape(&self) -> &[usize] {
        &self.shape
    }

    fn data(&self) -> Cow<'_, [u8]> {
        let mut bytes = vec![0; self.data_len()];
        self.tensor.copy_data_u8(&mut bytes, self.tensor.numel());
        Cow::Owned(bytes)
    }

    fn data_len(&self) -> usize {
        self.tensor.numel() * self.tensor.kind().elt_size_in_bytes()
    }
}

/// Writes named tensors to `path`, sorted by name, with the metadata that transformers asks for.
///
/// # Errors
/// [`Error::Io`] when the file cannot be written; [`Error::UnsupportedKind`].
pub fn save_safetensors(path: &Path, tensors: &[(String, Tensor)]) -> Result<()> {
    let mut saved = Vec::with_capacity(tensors.len());
    for (name, tensor) in tensors {
        let dtype = dtype_of(name, tensor.kind())?;
        let shape = tensor.size().iter().map(|&size| usize::try_from(size).unwrap_or(0)).collect();
        let tensor =
            tch::no_grad(|| tensor.f_detach()?.f_to_device(tch::Device::Cpu)?.f_contiguous())?;
        saved.push((name.clone(), Saved { tensor, dtype, shape }));
    }
    saved.sort_by(|a, b| a.0.cmp(&b.0));
    replace(path, |partial| {
        let format = Some([("format".to_owned(), "pt".to_owned())].into_iter().collect());
        safetensors::serialize_to_file(saved, format, partial)
            .map_err(|error| std::io::Error::other(error.to_string()))
    })
    .map_err(|source| Error::Io { doing: "writing", path: path.to_owned(), source })
}

/// Puts the file that `write` makes at the name that it is given in the place of `path`: all of it or, after an error or a
/// crash, nothing. It has the mode of any file that this process creates, whatever `write` gave it.
fn replace(path: &Path, write: impl FnOnce(&Path) -> std::io::Result<()>) -> std::io::Result<()> {
    let (partial, plain) = reserve(path)?;
    let replaced = (|| {
        let permissions = plain.metadata()?.permissions();
        write(&partial)?;
        let file = File::open(&partial)?;
        file.set_permissions(permissions)?;
        file.sync_all()?;
        fs::rename(&partial, path)?;
        // Without this a power cut may take the new name back.
        let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty());
        File::open(folder.unwrap_or(Path::new(".")))?.sync_all()
    })();
    if replaced.is_err() {
        // The first error is the one to tell; the partial file may have its place already.
        drop(fs::remove_file(&partial));
    }
    replaced
}

/// Creates a file beside `path` that no other thread, process or machine has.
fn reserve(path: &Path) -> std::io::Result<(PathBuf, File)> {
    loop {
        let mut name = path.as_os_str().to_owned();
        name.push(format!(".{:016x}.partial", RandomState::new().hash_one(std::process::id())));
        match File::create_new(&name) {
            Ok(file) => return Ok((name.into(), file)),
            // One of 2^64, or a server that answers a create that it was asked twice.
            Err(error) if error.kind() == ErrorKind::AlreadyExists => {}
            Err(error) => return Err(error),
        }
    }
}

/// Copies the tensors of `path` into the variables of `vs` with the same names; returns the names in the
/// file that the model does not have.
///
/// # Errors
/// [`Error::Io`], [`Error::Safetensors`]; [`Error::WeightsMismatch`] with every tensor that is missing or
/// has another shape, before any variable was changed.
pub fn load_safetensors(path: &Path, vs: &nn::VarStore) -> Result<Vec<String>> {
    let io = |source| Error::Io { doing: "reading", path: path.to_owned(), source };
    let file = File::open(path).map_err(io)?;
    // SAFETY: a private read-only mapping; weights files are replaced by rename, not rewritten in place.
    let bytes = unsafe { memmap2::Mmap::map(&file) }.map_err(io)?;
    let bad = |message: String| Error::Safetensors { path: path.to_owned(), message };
    let tensors = SafeTensors::deserialize(&bytes).map_err(|error| bad(error.to_string()))?;
    let mut variables: Vec<(String, Tensor)> = vs.variables().into_iter().collect();
    variables.sort_by(|a, b| a.0.cmp(&b.0));
    let report = misfits(&tensors, &variables);
    if !report.is_empty() {
        return Err(Error::WeightsMismatch { path: path.to_owned(), report });
    }
    for (name, variable) in &mut variables {
        let view = tensors.tensor(name).map_err(|error| bad(error.to_string()))?;
        let kind = kind_of(view.dtype()).ok_or_else(|| bad(unsupported(name, view.dtype())))?;
        let values = Tensor::f_from_data_size(view.data(), &variable.size(), kind)?;
        tch::no_grad(|| variable.f_copy_(&values))?;
    }
    let known = |name: &&str| variables.iter().any(|(other, _)| other == name);
    Ok(tensors.names().into_iter().filter(|name| !known(name)).map(ToOwned::to_owned).collect())
}

/// One line for each variable that the file cannot fill.
fn misfits(tensors: &SafeTensors<'_>, variables: &[(String, Tensor)]) -> String {
    let mut report = String::new();
    for (name, variable) in variables {
        let expected = variable.size();
        // Writing to a String cannot fail.
        _ = match tensors.tensor(name) {
            Err(_missing) => writeln!(report, "  {name}: missing, the model has {expected:?}"),
            Ok(view) if !same_shape(view.shape(), &expected) => {
                writeln!(report, "  {name}: {:?}, the model has {expected:?}", view.shape())
            }
            Ok(view) if kind_of(view.dtype()).is_none() => {
                writeln!(report, "  {}", unsupported(name, view.dtype()))
            }
            Ok(_) => Ok(()),
        };
    }
    report
}

fn same_shape(left: &[usize], right: &[i64]) -> bool {
    left.len() == right.len() && left.iter().zip(right).all(|(&l, &r)| i64::try_from(l) == Ok(r))
}

fn unsupported(name: &str, dtype: Dtype) -> String {
    format!("{name}: dtype {dtype:?} cannot be loaded; convert it to F32, F16 or BF16")
}

fn dtype_of(name: &str, kind: Kind) -> Result<Dtype> {
    Ok(match kind {
        Kind::Float => Dtype::F32,
        Kind::Double => Dtype::F64,
        Kind::Half => Dtype::F16,
        Kind::BFloat16 => Dtype::BF16,
        Kind::Int64 => Dtype::I64,
        Kind::Int => Dtype::I32,
        Kind::Uint8 => Dtype::U8,
        Kind::Bool => Dtype::BOOL,
        _ => return Err(Error::UnsupportedKind { name: name.to_owned(), kind }),
    })
}

fn kind_of(dtype: Dtype) -> Option<Kind> {
    Some(match dtype {
        Dtype::F32 => Kind::Float,
        Dtype::F64 => Kind::Double,
        Dtype::F16 => Kind::Half,
        Dtype::BF16 => Kind::BFloat16,
        Dtype::I64 => Kind::Int64,
        Dtype::I32 => Kind::Int,
        Dtype::U8 => Kind::Uint8,
        Dtype::BOOL => Kind::Bool,
        _ => return None,
    })
}
