//! Where batches come from: text that is prepared on first use, or a file of fixed batches.

use std::sync::Arc;

use anyhow::Result;
use phalanx_data::progress::Progress;
use phalanx_data::{Access, MaskedText, Masking, Samples as _};
use phalanx_ddp_core::feed::TensorBatch;
use tch::{Kind, Tensor};

use super::config::{Config, Data};
use super::source::Source;
use super::source::{open_batches, prepare};

/// Opens the data; text is prepared first unless that was done before. Any number of processes may
/// call this at once.
pub(crate) fn open(config: &Config, progress: &dyn Progress) -> Result<Source> {
    match &config.data.batches {
        Some(path) => open_batches(path, config),
        None => open_text(&config.data, config, progress),
    }
}

fn open_text(data: &Data, config: &Config, progress: &dyn Progress) -> Result<Source> {
    let prepared = prepare(data, &config.model, progress)?;
    let masking = Masking { probability: data.mask_probability, ..Default::default() };
    let length = data.sequence_length;
    let samples = MaskedText::open(&prepared.folder, length, masking, Access::Auto)?;
    let description = format!(
        "{} tokens in {} documents from {}, vocabulary {}, {} samples of {length} tokens",
        prepared.token_count,
        prepared.document_count,
        data.path.display(),
        prepared.vocab_size,
        samples.sample_count(),
    );
    Ok(Source { samples: Arc::new(samples), description })
}

/// A micro-batch as tensors.
#[derive(Debug)]
pub(crate) struct Tensors {
    pub(crate) ids: Tensor,
    pub(crate) labels: Tensor,
    pub(crate) attention_mask: Option<Tensor>,
    /// Positions that are no padding.
    pub(crate) token_count: usize,
}

impl Tensors {
    /// The tensors of a batch.
    pub(crate) fn of(batch: &TensorBatch) -> Result<Tensors> {
        let column = |name: &str| batch.get(name).map(Tensor::shallow_clone);
        let ids = column("input_ids")?;
        let (mut attention_mask, mut token_count) = (None, ids.numel());
        if let Ok(mask) = batch.get("attention_mask") {
            let seen = i64::try_from(mask.f_sum(Kind::Int64)?)?;
            token_count = usize::try_from(seen)?;
            // A mask of ones is left out: attention without a mask takes the fast path.
            attention_mask = (token_count != mask.numel()).then(|| mask.shallow_clone());
        }
        Ok(Tensors { ids, labels: column("labels")?, attention_mask, token_count })
    }
}
