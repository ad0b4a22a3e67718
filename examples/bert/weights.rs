//! Weights from a file, as phalanx or transformers wrote it.

use std::fs::File;
use std::io::Read as _;
use std::path::Path;

use anyhow::{Context as _, Result};
use phalanx_ddp_core::checkpoint;
use tch::nn;

/// Layer norms as the first BERT called them; files that were converted from TensorFlow still do.
const OLD_NAMES: [(&str, &str); 2] =
    [("LayerNorm.weight", "LayerNorm.gamma"), ("LayerNorm.bias", "LayerNorm.beta")];

/// Overwrites every variable. Returns the names in the file that the model does not have (a pooler,
/// the head for next sentences).
pub(crate) fn load(path: &Path, vs: &nn::VarStore) -> Result<Vec<String>> {
    if !header(path)?.contains(OLD_NAMES[0].1) {
        return Ok(checkpoint::load_safetensors(path, vs)?);
    }
    // The same tensors under the file's names.
    let renamed = nn::VarStore::new(vs.device());
    if let Ok(mut store) = renamed.variables_.lock() {
        for (mut name, tensor) in vs.variables() {
            for (new, old) in OLD_NAMES {
                name = name.replace(new, old);
            }
            store.named_variables.insert(name, tensor);
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
    let length = u64::from_le_bytes(length).min(LENGTH_MAX);
    file.take(length).read_to_end(&mut bytes).with_context(explain)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}
