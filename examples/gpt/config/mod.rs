//! The configuration file: what it may hold, and what it holds when something is left out.
//!
//! JSON in eight sections. `model` takes the keys of Hugging Face's `config.json` of GPT-2, Llama and Mixtral, so that such a file can be pasted in as
//! it is.

mod check;
#[path = "../../shared/config/checkpoint.rs"]
mod checkpoint;
#[path = "../../shared/config/ddp.rs"]
mod ddp;
#[path = "../../shared/config/file.rs"]
pub(crate) mod file;
#[path = "../../shared/config/hook.rs"]
mod hook;
mod mesh;
mod model;
#[path = "../../shared/config/optimizer.rs"]
mod optimizer;
#[path = "../../shared/config/sections.rs"]
mod sections;
#[path = "../../shared/config/train.rs"]
mod train;

use std::path::PathBuf;

use phalanx_comm::environment::NcclSettings;
use phalanx_data::OnDamage;
use serde::{Deserialize, Serialize};

pub(crate) use checkpoint::{Checkpoint, Resume};
pub(crate) use ddp::{Backend, Ddp, FloatKind, NonFinite};
pub(crate) use file::ConfigError;
pub(crate) use hook::Hook;
pub(crate) use mesh::Mesh;
pub(crate) use model::{Experts, Family, Model};
pub(crate) use optimizer::{AdjustLr, Optimizer, Rule, Schedule};
pub(crate) use train::{Precision, Train};

use file::Ignored;

/// What the loss is of, for the plot.
pub(crate) const LOSS: &str = "next-token loss";

/// The configurations in the source tree, smallest first, as `--config` takes them, and their text.
pub(crate) const SHIPPED: [(&str, &str); 4] = [
    ("configs/gpt_tiny.json", include_str!("../../../configs/gpt_tiny.json")),
    ("configs/mixtral_tiny.json", include_str!("../../../configs/mixtral_tiny.json")),
    ("configs/gpt2_small.json", include_str!("../../../configs/gpt2_small.json")),
    ("configs/llama_1b.json", include_str!("../../../configs/llama_1b.json")),
];

/// The whole file.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct Config {
    /// The network.
    pub(crate) model: Model,
    /// What it reads.
    pub(crate) data: Data,
    /// How weights are updated.
    pub(crate) optimizer: Optimizer,
    /// How long and in which portions.
    pub(crate) train: Train,
    /// How the ranks that have the same parameters work together.
    pub(crate) ddp: Ddp,
    /// How the model is cut over ranks.
    pub(crate) mesh: Mesh,
    /// What a later run can go on from.
    pub(crate) checkpoint: Checkpoint,
    /// NCCL's variables, where NCCL is used.
    pub(crate) nccl: NcclSettings,
}

/// What the ranks read.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct Data {
    /// A folder of text files, or of prepared shards.
    pub(crate) path: PathBuf,
    /// Fixed batches (`input_ids`, and `labels`: what follows each) instead of `path`.
    pub(crate) batches: Option<PathBuf>,
    /// Where prepared shards and the vocabulary go; by default a folder of the user's cache.
    pub(crate) cache: Option<PathBuf>,
    /// Tokens a sample.
    pub(crate) sequence_length: usize,
    /// Entries of the vocabulary that is trained on the text; at most the model's.
    pub(crate) vocab_size: usize,
    /// Whether each epoch has an order of its own.
    pub(crate) shuffle: bool,
    /// Threads that make batches ahead of the trainer.
    pub(crate) prefetch_threads: usize,
    /// How long a rank waits for a batch, in seconds, before it gives the storage up.
    pub(crate) timeout_s: u64,
    /// `fail`, or `skip`: samples in blocks that `phalanx data verify --record` has listed are left out.
    pub(crate) on_damage: OnDamage,
}

impl Default for Data {
    fn default() -> Self {
        Data {
            path: "third_party/text/shakespeare".into(),
            batches: None,
            cache: None,
            sequence_length: 128,
            vocab_size: 8192,
            shuffle: true,
            prefetch_threads: 1,
            timeout_s: 300,
            on_damage: OnDamage::Fail,
        }
    }
}
