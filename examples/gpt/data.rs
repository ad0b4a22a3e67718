//! Where batches come from: text cut into sequences whose labels are the next tokens, or a file of fixed batches.

use std::path::PathBuf;
use std::sync::Arc;

use anyhow::Result;
use phalanx_data::progress::Progress;
use phalanx_data::samples::Documents;
use phalanx_data::{Access, CausalText, Samples as _};
use phalanx_ddp_core::feed::TensorBatch;
use phalanx_model_parallel::tensor::IGNORED;
use tch::{Kind, Tensor};

use super::config::Config;
use super::source::{open_batches, prepare, Source};
use super::updates::count;

/// Samples, and where the tokenizer is that made them.
pub(crate) struct Text {
    pub(crate) source: Source,
    pub(crate) tokenizer: Option<PathBuf>,
}

/// Opens the data; text is prepared first unless that was done before. Any number of processes may
/// call this at once.
pub(crate) fn open(config: &Config, progress: &dyn Progress) -> Result<Text> {
    let data = &config.data;
    if let Some(path) = &data.batches {
        return Ok(Text { source: open_batches(path, config)?, tokenizer: None });
    }
    let prepared = prepare(data, &config.model, progress)?;
    let length = data.sequence_length;
    let samples = CausalText::open(&prepared.folder, length, Documents::Joined, Access::Auto)?;
    let description = format!(
        "{} tokens in {} documents from {}, vocabulary {}, {} samples of {length} tokens",
        prepared.token_count,
        prepared.document_count,
        data.path.display(),
        prepared.vocab_size,
        samples.sample_count(),
    );
    let source = Source { samples: Arc::new(samples), description };
    Ok(Text { source, tokenizer: Some(prepared.folder) })
}

/// A micro-batch as tensors, whole sequences `[samples, tokens]`.
#[derive(Debug)]
pub(crate) struct Tensors {
    pub(crate) ids: Tensor,
    pub(crate) labels: Tensor,
    /// How many tokens of all of them are to be predicted.
    pub(crate) predicted: f64,
}

impl Tensors {
    /// The tensors of a batch.
    pub(crate) fn of(batch: &TensorBatch) -> Result<Tensors> {
        let column = |name: &str| batch.get(name).map(Tensor::shallow_clone);
        let (ids, labels) = (column("input_ids")?, column("labels")?);
        let predicted = count(label_count(&labels)?);
        Ok(Tensors { ids, labels, predicted })
    }
}

/// How many labels are to be predicted.
pub(crate) fn label_count(labels: &Tensor) -> Result<i64, tch::TchError> {
    i64::try_from(labels.f_ne(IGNORED)?.f_sum(Kind::Int64)?)
}
