//! Where batches come from: text that is prepared on first use, or a file of fixed batches.

use std::num::NonZeroUsize;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result};
use phalanx_data::progress::Progress;
use phalanx_data::samples::FixedBatches;
use phalanx_data::{
    convert, Access, LoaderOptions, LoaderState, MaskedText, Masking, MicroBatch, Order, Samples,
};
use phalanx_ddp_core::feed::{Feed, TensorBatch};
use tch::{Device, Kind, Tensor};

use super::batching::{Batching, Cut};
use super::config::{Config, ConfigError, Data};

/// Samples, and what to say about them.
pub(crate) struct Source {
    pub(crate) samples: Arc<dyn Samples>,
    pub(crate) description: String,
}

/// Opens the data; text is prepared first unless that was done before. Any number of processes may
/// call this at once.
pub(crate) fn open(config: &Config, progress: &dyn Progress) -> Result<Source> {
    match &config.data.batches {
        Some(path) => open_batches(path, config),
        None => open_text(&config.data, config, progress),
    }
}

fn open_batches(path: &Path, config: &Config) -> Result<Source> {
    let batches = FixedBatches::open(path)?;
    let (length, id_max) = (batches.sequence_len(), batches.id_max());
    let model = &config.model;
    let place = path.display();
    if id_max >= model.vocab_size {
        return Err(invalid(format!(
            "{place} holds token {id_max}, model.vocab_size is {}; take batches of the model's \
             vocabulary",
            model.vocab_size
        )));
    }
    if i64::try_from(length).is_ok_and(|length| length > model.max_position_embeddings) {
        return Err(invalid(format!(
            "{place} holds samples of {length} tokens, model.max_position_embeddings is {}; raise it, \
             or cut the samples",
            model.max_position_embeddings
        )));
    }
    let description =
        format!("{} fixed samples of {length} tokens from {place}", batches.sample_count());
    Ok(Source { samples: Arc::new(batches), description })
}

fn open_text(data: &Data, config: &Config, progress: &dyn Progress) -> Result<Source> {
    let options = convert::PrepareOptions {
        vocab_size: u32::try_from(data.vocab_size).unwrap_or(u32::MAX),
        cache_dir: data.cache.clone(),
        ..Default::default()
    };
    let prepared = convert::prepare(&data.path, &options, progress)?;
    if i64::from(prepared.vocab_size) > config.model.vocab_size {
        return Err(invalid(format!(
            "the data in {} was prepared with a vocabulary of {}, model.vocab_size is {}; raise it, \
             or prepare the text anew",
            prepared.folder.display(),
            prepared.vocab_size,
            config.model.vocab_size
        )));
    }
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

fn invalid(message: String) -> anyhow::Error {
    ConfigError::Invalid { origin: "data".into(), message }.into()
}

/// This rank's batches, as tensors on `device`, from where `state` was taken.
pub(crate) fn feed(
    source: &Source,
    config: &Config,
    batching: Batching,
    (rank, world_size): (usize, usize),
    (device, state): (Device, Option<&LoaderState>),
) -> Result<Feed> {
    let count = |n: usize| NonZeroUsize::new(n).unwrap_or(NonZeroUsize::MIN);
    let options = LoaderOptions {
        seed: config.train.seed,
        order: if config.data.shuffle { Order::Shuffled } else { Order::Sequential },
        global_batch: batching.global_batch,
        micro_batch: match batching.cut {
            Cut::Samples => MicroBatch::Size(count(batching.micro_batch)),
            Cut::Parts => MicroBatch::Count(count(batching.accumulate)),
        },
        rank,
        world_size,
        threads: config.data.prefetch_threads,
        on_damage: config.data.on_damage,
        timeout: Duration::from_secs(config.data.timeout_s),
        ..Default::default()
    };
    let samples = Arc::clone(&source.samples);
    let feed = match state {
        Some(state) => Feed::resume(samples, options, state, device),
        None => Feed::new(samples, options, device),
    };
    feed.context("opening the loader")
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
