//! Weights from a file, several and their index, or a folder, as phalanx or transformers wrote them.

use std::io;
use std::path::{Path, PathBuf};

use anyhow::Result;
use phalanx_checkpoint::{Error as FileError, Tensors as _, Weights};
use phalanx_ddp_core::checkpoint::LoadOptions;
use phalanx_ddp_core::Ddp;
use tch::{nn, Device};

use super::config::Model;
use super::model::{BertForMaskedLm, Start};

/// Layer norms as the first BERT called them; files that were converted from TensorFlow still do.
const OLD_NAMES: [(&str, &str); 2] =
    [("LayerNorm.weight", "LayerNorm.gamma"), ("LayerNorm.bias", "LayerNorm.beta")];

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

/// Compares names and shapes with the model's before anything is started; reads headers alone.
pub(crate) fn check(path: &Path, config: &Model) -> Result<()> {
    const SHOWN: usize = 4;
    let weights = open(path)?;
    // Memory that is never touched is never taken: this costs address space only.
    let vs = nn::VarStore::new(Device::Cpu);
    drop(BertForMaskedLm::new(&vs.root(), config, Start::Unset)?);
    let mut differences = Vec::new();
    let mut expected: Vec<_> = vs.variables().into_iter().collect();
    expected.sort_by(|a, b| a.0.cmp(&b.0));
    for (name, tensor) in expected {
        let shape: Vec<u64> = tensor.size().into_iter().map(i64::unsigned_abs).collect();
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

fn old_name(name: &str) -> String {
    OLD_NAMES.iter().fold(name.to_owned(), |name, (new, old)| name.replace(new, old))
}

/// Overwrites every variable of the wrapped model. Returns the names in the file that it does not have (a pooler, the head for next
/// sentences). Collective.
pub(crate) fn load(path: &Path, ddp: &Ddp) -> Result<Vec<String>> {
    let names = |name: &str| {
        let (new, old) = (name.to_owned(), old_name(name));
        if new == old {
            vec![new]
        } else {
            vec![new, old]
        }
    };
    Ok(ddp.load_weights(path, &LoadOptions::with_names(names))?)
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
