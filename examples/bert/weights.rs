//! Weights from a file, as phalanx or transformers wrote it.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Read as _;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use phalanx_ddp_core::checkpoint;
use serde::Deserialize;
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

/// What a safetensors header says about a tensor, as far as it matters here.
#[derive(Deserialize)]
struct Entry {
    #[serde(default)]
    shape: Vec<i64>,
}

/// Compares names and shapes with the model's before anything is started; reads the header alone.
pub(crate) fn check(path: &Path, config: &Model) -> Result<()> {
    const SHOWN: usize = 4;
    let ill_formed = |reason| WeightsError::IllFormed { path: path.into(), reason };
    let header = header(path)?;
    let entries: BTreeMap<String, Entry> =
        serde_json::from_str(&header).map_err(|error| ill_formed(error.to_string()))?;
    // Memory that is never touched is never taken: this costs address space only.
    let vs = nn::VarStore::new(Device::Cpu);
    drop(BertForMaskedLm::new(&vs.root(), config, Start::Unset)?);
    let mut differences = Vec::new();
    let mut expected: Vec<_> = vs.variables().into_iter().collect();
    expected.sort_by(|a, b| a.0.cmp(&b.0));
    for (name, tensor) in expected {
        let entry = entries.get(&name).or_else(|| entries.get(&old_name(&name)));
        let shape = tensor.size();
        match entry {
            None => differences.push(format!("{name} is missing")),
            Some(entry) if entry.shape != shape => {
                differences.push(format!("{name} is {:?}, the model has {shape:?}", entry.shape));
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

/// Overwrites every variable. Returns the names in the file that the model does not have (a pooler,
/// the head for next sentences).
pub(crate) fn load(path: &Path, vs: &nn::VarStore) -> Result<Vec<String>> {
    if !header(path)?.contains(OLD_NAMES[0].1) {
        return Ok(checkpoint::load_safetensors(path, vs)?);
    }
    // The same tensors under the file's names.
    let renamed = nn::VarStore::new(vs.device());
    if let Ok(mut store) = renamed.variables_.lock() {
        for (name, tensor) in vs.variables() {
            store.named_variables.insert(old_name(&name), tensor);
        }
    }
    Ok(checkpoint::load_safetensors(path, &renamed)?)
}

/// The JSON at the beginning of a safetensors file; empty where there is none, which loading
/// reports.
fn header(path: &Path) -> Result<String> {
    /// As the format has it.
    const LENGTH_MAX: u64 = 100_000_000;
    let explain = || format!("cannot read the weights {}", path.display());
    let mut file = File::open(path).with_context(explain)?;
    let mut length = [0; 8];
    if file.read_exact(&mut length).is_err() {
        return Ok(String::new());
    }
    let mut bytes = Vec::new();
    let length_bytes = u64::from_le_bytes(length).min(LENGTH_MAX);
    file.take(length_bytes).read_to_end(&mut bytes).with_context(explain)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}
