//! Weights that a model begins with, in a file, several and their index, or a folder: whether they fit.

use std::io;
use std::path::{Path, PathBuf};

use anyhow::Result;
use phalanx_checkpoint::{Error as FileError, Tensors as _, Weights};

/// A file that cannot fill the model.
#[derive(Debug, thiserror::Error)]
pub(crate) enum WeightsError {
    /// Not a safetensors file.
    #[error("{path} is not a safetensors file: {reason}")]
    IllFormed {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// Tensors are missing or of other shapes.
    #[error("{path} does not fit the model: {differences}; take the configuration that these weights were made with")]
    Misfit {
        /// The file.
        path: PathBuf,
        /// The first few, and how many there are.
        differences: String,
    },
}

/// Compares names and shapes with what is `expected`; reads headers alone. A name may stand in the file as its `old_name`.
pub(crate) fn check(
    path: &Path,
    mut expected: Vec<(String, Vec<i64>)>,
    old_name: impl Fn(&str) -> String,
) -> Result<()> {
    const SHOWN: usize = 4;
    let weights = open(path)?;
    let mut differences = Vec::new();
    expected.sort_by(|a, b| a.0.cmp(&b.0));
    for (name, shape) in expected {
        let shape: Vec<u64> = shape.into_iter().map(i64::unsigned_abs).collect();
        match weights.spec(&name).or_else(|| weights.spec(&old_name(&name))) {
            None => differences.push(format!("{name} is missing")),
            Some(spec) if spec.shape != shape => {
                differences.push(format!("{name} is {:?}, the model has {shape:?}", spec.shape));
            }
            Some(_) => {}
        }
    }
    if differences.is_empty() {
        return Ok(());
    }
    let more = differences.len().saturating_sub(SHOWN);
    differences.truncate(SHOWN);
    let mut differences = differences.join(", ");
    if more > 0 {
        differences = format!("{differences} and {more} more");
    }
    Err(WeightsError::Misfit { path: path.into(), differences }.into())
}

fn open(given: &Path) -> Result<Weights> {
    let unreadable = |file: &Path, cause: io::Error| {
        anyhow::Error::from(cause).context(format!("cannot read the weights {}", file.display()))
    };
    Weights::open(given).map_err(|error| match error {
        FileError::BadWeights { path, reason } => WeightsError::IllFormed { path, reason }.into(),
        FileError::Io { path, cause, .. } => unreadable(&path, cause),
        FileError::NotFound { path } => {
            let lacks = "no safetensors file, and no folder with one";
            unreadable(&path, io::Error::new(io::ErrorKind::NotFound, lacks))
        }
        other => other.into(),
    })
}
