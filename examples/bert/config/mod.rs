//! The configuration file: what it may hold, what it holds when something is left out, and what is
//! wrong with it.
//!
//! JSON in seven sections. `model` takes the keys of Hugging Face's `config.json`, so that such a
//! file can be pasted in as it is. An error names the file, the path in it (`optimizer.lr`) and
//! line and column.

mod check;
mod checkpoint;
mod ddp;
mod hook;
mod optimizer;

use std::path::{Path, PathBuf};

use phalanx_comm::environment::NcclSettings;
use phalanx_data::OnDamage;
use serde::{Deserialize, Serialize};

pub(crate) use checkpoint::{Checkpoint, Resume};
pub(crate) use ddp::{Backend, Ddp, FloatKind, NonFinite};
pub(crate) use hook::Hook;
pub(crate) use optimizer::{AdjustLr, Optimizer, Rule, Schedule};

/// The configurations in the source tree, smallest first, as `--config` takes them, and their text.
pub(crate) const SHIPPED: [(&str, &str); 4] = [
    ("configs/bert_tiny.json", include_str!("../../../configs/bert_tiny.json")),
    ("configs/bert_small.json", include_str!("../../../configs/bert_small.json")),
    ("configs/bert_base.json", include_str!("../../../configs/bert_base.json")),
    ("configs/bert_large.json", include_str!("../../../configs/bert_large.json")),
];

/// [`SHIPPED`], read.
pub(crate) fn shipped() -> Result<Vec<(&'static str, Config)>, ConfigError> {
    SHIPPED.iter().map(|(name, text)| Ok((*name, Config::parse(text, Path::new(name))?))).collect()
}

/// A file that cannot be used, in one message.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ConfigError {
    /// Not there, or not readable.
    #[error(
        "cannot read the configuration {path}: {reason}; those that come with phalanx are {}",
        SHIPPED.map(|(name, _)| name).join(", ")
    )]
    Unreadable {
        /// What was to be read.
        path: PathBuf,
        /// What the system said.
        reason: std::io::Error,
    },
    /// Not JSON, or a field of an unknown name or another type.
    #[error("{path}: {field}{reason}")]
    IllFormed {
        /// The file.
        path: PathBuf,
        /// The path of the field and a colon, or nothing where the file is not JSON at all.
        field: String,
        /// What serde said, with line and column.
        reason: serde_json::Error,
    },
    /// Fields that cannot stand together, or values out of range.
    #[error("{origin}: {message}")]
    Invalid {
        /// The file, or the flags.
        origin: String,
        /// The field, what is wrong with it and what to do.
        message: String,
    },
}

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
    /// How the ranks work together.
    pub(crate) ddp: Ddp,
    /// What a later run can go on from.
    pub(crate) checkpoint: Checkpoint,
    /// NCCL's variables, where NCCL is used.
    pub(crate) nccl: NcclSettings,
}

/// Hugging Face's `BertConfig`; what is left out is BERT-base, as there.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct Model {
    /// Rows of the word embedding; may be more than the tokenizer has.
    pub(crate) vocab_size: i64,
    /// Width of the residual stream.
    pub(crate) hidden_size: i64,
    /// Encoder layers.
    pub(crate) num_hidden_layers: i64,
    /// Attention heads a layer; divides `hidden_size`.
    pub(crate) num_attention_heads: i64,
    /// Width inside the feed-forward block.
    pub(crate) intermediate_size: i64,
    /// `gelu` only: the exact one.
    pub(crate) hidden_act: String,
    /// Dropout after embeddings, attention and feed-forward.
    pub(crate) hidden_dropout_prob: f64,
    /// Dropout of the attention probabilities.
    pub(crate) attention_probs_dropout_prob: f64,
    /// Longest sequence.
    pub(crate) max_position_embeddings: i64,
    /// Kinds of segments.
    pub(crate) type_vocab_size: i64,
    /// Standard deviation of the first weights.
    pub(crate) initializer_range: f64,
    /// Added to the variance in layer norms.
    pub(crate) layer_norm_eps: f64,
    /// The token whose embedding stays zero.
    pub(crate) pad_token_id: Option<i64>,
    /// `bert` only.
    pub(crate) model_type: String,
    /// `absolute` only.
    pub(crate) position_embedding_type: String,
    /// Whether the decoder is the word embedding; `true` only.
    pub(crate) tie_word_embeddings: bool,
    // What else transformers writes; pre-training does not use it.
    #[serde(skip_serializing)]
    architectures: Ignored,
    #[serde(skip_serializing)]
    classifier_dropout: Ignored,
    #[serde(skip_serializing)]
    gradient_checkpointing: Ignored,
    #[serde(skip_serializing)]
    use_cache: Ignored,
    #[serde(skip_serializing)]
    transformers_version: Ignored,
    #[serde(skip_serializing)]
    torch_dtype: Ignored,
    #[serde(skip_serializing)]
    dtype: Ignored,
    #[serde(skip_serializing)]
    bos_token_id: Ignored,
    #[serde(skip_serializing)]
    eos_token_id: Ignored,
    #[serde(skip_serializing)]
    is_decoder: Ignored,
    #[serde(skip_serializing)]
    add_cross_attention: Ignored,
}

/// A value of any type that is read over.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
struct Ignored;

impl<'de> Deserialize<'de> for Ignored {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        serde::de::IgnoredAny::deserialize(deserializer).map(|_| Ignored)
    }
}

/// What the ranks read.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct Data {
    /// A folder of text files, or of prepared shards.
    pub(crate) path: PathBuf,
    /// Fixed batches (`input_ids`, `labels`, optional `attention_mask`) instead of `path`.
    pub(crate) batches: Option<PathBuf>,
    /// Where prepared shards and the vocabulary go; by default a folder of the user's cache.
    pub(crate) cache: Option<PathBuf>,
    /// Tokens a sample, `[CLS]` and `[SEP]` included.
    pub(crate) sequence_length: usize,
    /// Entries of the vocabulary that is trained on the text; at most the model's.
    pub(crate) vocab_size: usize,
    /// Share of the tokens that are predicted.
    pub(crate) mask_probability: f64,
    /// Whether each epoch has an order of its own.
    pub(crate) shuffle: bool,
    /// Threads that make batches ahead of the trainer.
    pub(crate) prefetch_threads: usize,
    /// How long a rank waits for a batch, in seconds, before it gives the storage up.
    pub(crate) timeout_s: u64,
    /// `fail`, or `skip`: samples in blocks that `phalanx data verify --record` has listed are left out.
    pub(crate) on_damage: OnDamage,
}

/// The type that matrix products run in; weights and optimizer state are fp32 always, gradients unless
/// `ddp.gradient_kind` says otherwise.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Precision {
    /// 32-bit floats.
    Fp32,
    /// bfloat16 under autocast.
    Bf16,
}

/// How long and in which portions.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct Train {
    /// Optimizer steps.
    pub(crate) steps: u64,
    /// Samples a step over all ranks.
    pub(crate) global_batch: Option<usize>,
    /// Samples that one rank computes at once.
    pub(crate) micro_batch: Option<usize>,
    /// Micro-batches a step on each rank.
    pub(crate) accumulate: Option<usize>,
    /// `fp32` or `bf16`.
    pub(crate) precision: Precision,
    /// Keep one input a layer for backward and compute the layer again there: less memory for a second forward, same bits.
    pub(crate) recompute: bool,
    /// Of weights, order, masks and dropout.
    pub(crate) seed: u64,
    /// Threads a rank computes with; by default cores ÷ ranks of this machine.
    pub(crate) threads: Option<usize>,
    /// Where weights, plot and metrics go.
    pub(crate) output: Option<PathBuf>,
}

impl Default for Model {
    fn default() -> Self {
        Model {
            vocab_size: 30_522,
            hidden_size: 768,
            num_hidden_layers: 12,
            num_attention_heads: 12,
            intermediate_size: 3072,
            hidden_act: "gelu".into(),
            hidden_dropout_prob: 0.1,
            attention_probs_dropout_prob: 0.1,
            max_position_embeddings: 512,
            type_vocab_size: 2,
            initializer_range: 0.02,
            layer_norm_eps: 1e-12,
            pad_token_id: Some(0),
            model_type: "bert".into(),
            position_embedding_type: "absolute".into(),
            tie_word_embeddings: true,
            architectures: Ignored,
            classifier_dropout: Ignored,
            gradient_checkpointing: Ignored,
            use_cache: Ignored,
            transformers_version: Ignored,
            torch_dtype: Ignored,
            dtype: Ignored,
            bos_token_id: Ignored,
            eos_token_id: Ignored,
            is_decoder: Ignored,
            add_cross_attention: Ignored,
        }
    }
}

impl Default for Data {
    fn default() -> Self {
        Data {
            path: "third_party/text/shakespeare".into(),
            batches: None,
            cache: None,
            sequence_length: 128,
            vocab_size: 8192,
            mask_probability: 0.15,
            shuffle: true,
            prefetch_threads: 1,
            timeout_s: 300,
            on_damage: OnDamage::Fail,
        }
    }
}

impl Default for Train {
    fn default() -> Self {
        Train {
            steps: 100,
            global_batch: None,
            micro_batch: None,
            accumulate: None,
            precision: Precision::Fp32,
            recompute: false,
            seed: 42,
            threads: None,
            output: None,
        }
    }
}

impl Config {
    /// Reads and checks a file.
    pub(crate) fn read(path: &Path) -> Result<Self, ConfigError> {
        let text = std::fs::read_to_string(path)
            .map_err(|reason| ConfigError::Unreadable { path: path.into(), reason })?;
        Self::parse(&text, path)
    }

    pub(crate) fn parse(text: &str, path: &Path) -> Result<Self, ConfigError> {
        let mut json = serde_json::Deserializer::from_str(text);
        let ill_formed =
            |field: String, reason| ConfigError::IllFormed { path: path.into(), field, reason };
        let config: Config = serde_path_to_error::deserialize(&mut json).map_err(|error| {
            let field = error.path().to_string();
            let syntax = matches!(
                error.inner().classify(),
                serde_json::error::Category::Syntax | serde_json::error::Category::Eof
            );
            let field = if syntax || field == "." { String::new() } else { format!("{field}: ") };
            ill_formed(field, error.into_inner())
        })?;
        json.end().map_err(|reason| ill_formed(String::new(), reason))?;
        Ok(config)
    }
}

impl Model {
    /// Number of trained values: the decoder is tied and counts once.
    pub(crate) fn parameter_count(&self) -> u64 {
        let (h, i) = (self.hidden_size, self.intermediate_size);
        let layer = 4 * (h * h + h) + 2 * h + (h * i + i) + (i * h + h) + 2 * h;
        let head = h * h + h + 2 * h + self.vocab_size;
        let others = 2 * h + self.num_hidden_layers * layer + head;
        self.embedding_count() + u64::try_from(others).unwrap_or(0)
    }

    /// Of which of embeddings.
    pub(crate) fn embedding_count(&self) -> u64 {
        let rows = self.vocab_size + self.max_position_embeddings + self.type_vocab_size;
        u64::try_from(rows * self.hidden_size).unwrap_or(0)
    }
}
