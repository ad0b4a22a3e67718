//! Model weights as safetensors files: tch's tensors on one side, `phalanx-checkpoint`'s files on the other.

use std::io::{self, ErrorKind};
use std::path::Path;

use phalanx_checkpoint::fs::Real;
use phalanx_checkpoint::{write_weights_file, Error as FileError, Snapshot, Tensors, Weights};
use tch::{nn, Device, Tensor};

use super::content;
use super::held::{kind_of, Held};
use crate::{Error, Result};

/// Writes named tensors to `path` with the metadata that transformers asks for.
///
/// A crash leaves the old file or the new one, never a part; of several writers, on whatever machines, one has
/// written all of it.
///
/// # Errors
/// [`Error::Io`] when the file cannot be written; [`Error::UnsupportedKind`].
pub fn save_safetensors(path: &Path, tensors: &[(String, Tensor)]) -> Result<()> {
    let mut held = Vec::with_capacity(tensors.len());
    for (name, tensor) in tensors {
        let tensor = tensor.f_detach()?.f_to_device(Device::Cpu)?.f_contiguous()?;
        held.push(Held::whole(name.clone(), &tensor)?);
    }
    let rooms = content::rooms(&held);
    let mut snapshot = Snapshot::new();
    content::offer(&mut snapshot, &held, &rooms)?;
    let written = write_weights_file(&Real, path, &snapshot, None);
    written.map_err(|error| of_file("writing", error))
}

/// Copies the tensors of `path` (a file, the index of several, or a folder with either) into the variables of `vs`
/// with the same names; returns the names that the model does not have.
///
/// # Errors
/// [`Error::Io`], [`Error::Safetensors`]; [`Error::WeightsMismatch`] with every tensor that is missing or
/// has another shape, before any variable was changed.
pub fn load_safetensors(path: &Path, vs: &nn::VarStore) -> Result<Vec<String>> {
    let weights = Weights::open(path).map_err(|error| of_file("reading", error))?;
    let mut variables: Vec<(String, Tensor)> = vs.variables().into_iter().collect();
    variables.sort_by(|a, b| a.0.cmp(&b.0));
    let misfit = |(name, variable): &(String, Tensor)| {
        misfit(&weights, (name, &variable.size()), weights.spec(name).map(|_| name.as_str()))
    };
    let report: String = variables.iter().filter_map(misfit).collect();
    if !report.is_empty() {
        return Err(Error::WeightsMismatch { path: path.to_owned(), report });
    }
    for (name, variable) in &mut variables {
        let Some(kind) = weights.spec(name).and_then(|spec| kind_of(spec.dtype)) else { continue };
        let bytes = weights.read_whole(name).map_err(|error| of_file("reading", error))?;
        let values = Tensor::f_from_data_size(&bytes, &variable.size(), kind)?;
        tch::no_grad(|| variable.f_copy_(&values))?;
    }
    let known = |name: &&str| variables.iter().any(|(other, _)| other == name);
    Ok(weights.names().into_iter().filter(|name| !known(name)).map(ToOwned::to_owned).collect())
}

/// A line for a variable of this shape that the weights' tensor `found` cannot fill.
pub(super) fn misfit(
    weights: &Weights,
    (name, expected): (&str, &[i64]),
    found: Option<&str>,
) -> Option<String> {
    match found.and_then(|found| weights.spec(found)) {
        None => Some(format!("  {name}: missing, the model has {expected:?}\n")),
        Some(spec) if !same_shape(spec.shape, expected) => {
            Some(format!("  {name}: {:?}, the model has {expected:?}\n", spec.shape))
        }
        Some(spec) if kind_of(spec.dtype).is_none() => Some(format!(
            "  {name}: dtype {} cannot be loaded; convert it to F32, F16 or BF16\n",
            spec.dtype
        )),
        Some(_) => None,
    }
}

fn same_shape(left: &[u64], right: &[i64]) -> bool {
    left.len() == right.len() && left.iter().zip(right).all(|(&l, &r)| i64::try_from(l) == Ok(r))
}

/// An error of a file, in this crate's words.
pub(super) fn of_file(doing: &'static str, error: FileError) -> Error {
    match error {
        FileError::Io { path, cause, .. } => Error::Io { doing, path, source: cause },
        FileError::NotFound { path } => {
            let lacks =
                "there is no safetensors file, no index of several, and no folder with either";
            Error::Io { doing, path, source: io::Error::new(ErrorKind::NotFound, lacks) }
        }
        FileError::BadWeights { path, reason } => Error::Safetensors { path, message: reason },
        other => other.into(),
    }
}
