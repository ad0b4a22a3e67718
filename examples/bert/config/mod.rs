//! The configuration file: what it may hold, what it holds when something is left out, and what is
//! wrong with it.
//!
//! JSON in seven sections. `model` takes the keys of Hugging Face's `config.json`, so that such a
//! file can be pasted in as it is. An error names the file, the path in it (`optimizer.lr`) and
//! line and column.

mod check;
#[path = "../../shared/config/checkpoint.rs"]
mod checkpoint;
#[path = "../../shared/config/ddp.rs"]
mod ddp;
#[path = "../../shared/config/file.rs"]
pub(crate) mod file;
#[path = "../../shared/config/hook.rs"]
mod hook;
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
pub(crate) use optimizer::{AdjustLr, Optimizer, Rule, Schedule};
pub(crate) use train::{Precision, Train};

use file::Ignored;

/// What the loss is of, for the plot.
pub(crate) const LOSS: &str = "masked-LM loss";

/// The configurations in the source tree, smallest first, as `--config` takes them, and their text.
pub(crate) const SHIPPED: [(&str, &str); 4] = [
    ("configs/bert_tiny.json", include_str!("../../../configs/bert_tiny.json")),
    ("configs/bert_small.json", include_str!("../../../configs/bert_small.json")),
    ("configs/bert_base.json", include_str!("../../../configs/bert_base.json")),
    ("configs/bert_large.json", include_str!("../../../configs/bert_large.json")),
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

impl Model {
    /// The network's name in transformers.
    #[expect(clippy::unused_self, reason = "a trainer of several networks looks at it")]
    pub(crate) fn architecture(&self) -> &'static str {
        "BertForMaskedLM"
    }

    /// As transformers calls the fields.
    pub(crate) fn for_hugging_face(&self) -> serde_json::Result<serde_json::Value> {
        serde_json::to_value(self)
    }

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
