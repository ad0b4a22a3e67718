//! Weights from a file, several and their index, or a folder, as phalanx or transformers wrote them.

use std::path::Path;

use anyhow::Result;
use phalanx_ddp_core::checkpoint::LoadOptions;
use phalanx_ddp_core::Ddp;
use tch::{nn, Device};

use super::config::Model;
use super::model::{BertForMaskedLm, Start};
use super::weights_file;

/// Layer norms as the first BERT called them; files that were converted from TensorFlow still do.
const OLD_NAMES: [(&str, &str); 2] =
    [("LayerNorm.weight", "LayerNorm.gamma"), ("LayerNorm.bias", "LayerNorm.beta")];

/// Compares names and shapes with the model's before anything is started; reads headers alone.
pub(crate) fn check(path: &Path, config: &Model) -> Result<()> {
    // Memory that is never touched is never taken: this costs address space only.
    let vs = nn::VarStore::new(Device::Cpu);
    drop(BertForMaskedLm::new(&vs.root(), config, Start::Unset)?);
    let expected = vs.variables().into_iter().map(|(name, tensor)| (name, tensor.size()));
    weights_file::check(path, expected.collect(), old_name)
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
