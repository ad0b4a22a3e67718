//! Where a trainer's batches come from: a file of fixed batches, or text that is prepared on first use; and the loader of either.

use std::num::NonZeroUsize;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result};
use phalanx_data::convert::{self, Prepared};
use phalanx_data::progress::Progress;
use phalanx_data::samples::FixedBatches;
use phalanx_data::{LoaderOptions, LoaderState, MicroBatch, Order, Samples};
use phalanx_ddp_core::feed::Feed;
use tch::Device;

use super::batching::{Batching, Cut};
use super::config::{Config, ConfigError, Data, Model};

/// Samples, and what to say about them.
pub(crate) struct Source {
    pub(crate) samples: Arc<dyn Samples>,
    pub(crate) description: String,
}

/// Samples as a file has them.
pub(crate) fn open_batches(path: &Path, config: &Config) -> Result<Source> {
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

/// The text of the section, prepared now or before.
pub(crate) fn prepare(data: &Data, model: &Model, progress: &dyn Progress) -> Result<Prepared> {
    let options = convert::PrepareOptions {
        vocab_size: u32::try_from(data.vocab_size).unwrap_or(u32::MAX),
        cache_dir: data.cache.clone(),
        ..Default::default()
    };
    let prepared = convert::prepare(&data.path, &options, progress)?;
    if i64::from(prepared.vocab_size) > model.vocab_size {
        return Err(invalid(format!(
            "the data in {} was prepared with a vocabulary of {}, model.vocab_size is {}; raise it, \
             or prepare the text anew",
            prepared.folder.display(),
            prepared.vocab_size,
            model.vocab_size
        )));
    }
    Ok(prepared)
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
