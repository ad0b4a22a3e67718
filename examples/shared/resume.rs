//! Checkpoints of this trainer: where a run begins, and what it leaves for the next one.

use anyhow::{bail, Result};
use phalanx_data::LoaderState;
use phalanx_ddp_core::checkpoint::{Checkpointer, Next};
use phalanx_ddp_core::feed::Feed;
use serde::{Deserialize, Serialize};

use super::config::{Config, Resume};
use super::train::Trainer;

/// What a run knows beside its model and optimizer.
#[derive(Debug, Serialize, Deserialize)]
struct Place {
    data: LoaderState,
    skipped_count: u64,
    /// For people who look into a checkpoint; a later version's may have other fields.
    config: serde_json::Value,
}

/// Where a run begins.
#[derive(Debug, Default)]
pub(crate) struct Start {
    /// Steps that were made before.
    pub(crate) step: u64,
    /// The place in the data.
    pub(crate) data: Option<LoaderState>,
    /// What to say about it.
    pub(crate) note: Option<String>,
}

/// The checkpoints of a run, if it has any.
#[derive(Debug)]
pub(crate) struct Checkpoints {
    checkpointer: Option<Checkpointer>,
}

impl Checkpoints {
    /// Opens the folder that the configuration names and the launcher's memory, and brings the newest checkpoint into the trainer. Collective.
    pub(crate) fn open(config: &Config, trainer: &mut Trainer) -> Result<(Self, Start)> {
        if !config.checkpoint.is_on() {
            return Ok((Self { checkpointer: None }, Start::default()));
        }
        let (ddp, optimizer) = trainer.parts();
        let options = config.checkpoint.options();
        let mut checkpointer = match &config.checkpoint.folder {
            Some(folder) => Checkpointer::new(folder, ddp, options)?,
            None => Checkpointer::in_memory(ddp, options)?,
        };
        let resumed = match config.checkpoint.resume {
            Resume::Never => None,
            Resume::Auto | Resume::Required => checkpointer.resume(Some(optimizer))?,
        };
        let Some(resumed) = resumed else {
            if let (Resume::Required, Some(folder)) =
                (config.checkpoint.resume, &config.checkpoint.folder)
            {
                bail!("{} holds no complete checkpoint; take --resume auto to begin at the first step", folder.display());
            }
            return Ok((Self { checkpointer: Some(checkpointer) }, Start::default()));
        };
        let place: Place = resumed.values()?;
        trainer.go_on(place.skipped_count);
        let note = format!("resume step {} from {}", resumed.step, resumed.path.display());
        let start = Start { step: resumed.step, data: Some(place.data), note: Some(note) };
        Ok((Self { checkpointer: Some(checkpointer) }, start))
    }

    /// After each step. Collective. A signal that asks the run to end, if there was one: the step is saved.
    pub(crate) fn step(
        &mut self,
        step: u64,
        (trainer, feed, config): (&mut Trainer, &Feed, &Config),
    ) -> Result<Option<i32>> {
        let Some(checkpointer) = &mut self.checkpointer else { return Ok(None) };
        let is_last = step == config.train.steps;
        let place = Place {
            data: feed.state(),
            skipped_count: trainer.skipped_count(),
            config: serde_json::to_value(config)?,
        };
        let (_, optimizer) = trainer.parts();
        if is_last && config.checkpoint.folder.is_none() {
            return Ok(None); // nobody would go on from it
        }
        if is_last {
            checkpointer.save(step, Some(optimizer), || place)?;
            checkpointer.finish()?;
            return Ok(None);
        }
        match checkpointer.step(step, Some(optimizer), || place)? {
            Next::Continue => Ok(None),
            Next::Stop { signal } => Ok(Some(signal)),
        }
    }
}
