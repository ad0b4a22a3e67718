//! Checkpoints of this trainer: where a run begins, and what it leaves for the next one.

use anyhow::{bail, Result};
use phalanx_data::LoaderState;
use phalanx_ddp_core::checkpoint::{Checkpointer, Next, Resumed};
use phalanx_ddp_core::feed::Feed;
use phalanx_ddp_core::{Ddp, Optimizer};
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

/// What is saved by itself: a model, its optimizer, and the folder inside of that of checkpoints, or `""` for this itself, which comes first.
pub(crate) type Part<'t> = (&'static str, &'t Ddp, &'t mut Optimizer);

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
    /// One for each of the trainer's parts.
    checkpointers: Vec<Checkpointer>,
}

impl Checkpoints {
    /// Opens the folder that the configuration names and the launcher's memory, and brings the newest checkpoint into the trainer. Collective.
    pub(crate) fn open(config: &Config, trainer: &mut Trainer) -> Result<(Self, Start)> {
        if !config.checkpoint.is_on() {
            return Ok((Self { checkpointers: Vec::new() }, Start::default()));
        }
        let mut checkpointers = Vec::new();
        let parts = trainer.parts();
        let count = parts.len();
        for (inside, ddp, _) in parts {
            let mut options = config.checkpoint.options();
            // One may be written when another is not yet: what they have in common must not be gone.
            options.keep.last += usize::from(count > 1);
            // The first tells of signals.
            options.heed_signals &= checkpointers.is_empty();
            checkpointers.push(match &config.checkpoint.folder {
                Some(folder) if inside.is_empty() => Checkpointer::new(folder, ddp, options)?,
                Some(folder) => Checkpointer::new(folder.join(inside), ddp, options)?,
                None => Checkpointer::in_memory(ddp, options)?,
            });
        }
        let resumed = match config.checkpoint.resume {
            Resume::Never => None,
            Resume::Auto | Resume::Required => resume(&mut checkpointers, trainer)?,
        };
        let Some(resumed) = resumed else {
            if let (Resume::Required, Some(folder)) =
                (config.checkpoint.resume, &config.checkpoint.folder)
            {
                bail!("{} holds no complete checkpoint; take --resume auto to begin at the first step", folder.display());
            }
            return Ok((Self { checkpointers }, Start::default()));
        };
        let place: Place = resumed.values()?;
        trainer.go_on(place.skipped_count);
        let note = format!("resume step {} from {}", resumed.step, resumed.path.display());
        let start = Start { step: resumed.step, data: Some(place.data), note: Some(note) };
        Ok((Self { checkpointers }, start))
    }

    /// After each step. Collective. A signal that asks the run to end, if there was one: the step is saved.
    pub(crate) fn step(
        &mut self,
        step: u64,
        (trainer, feed, config): (&mut Trainer, &Feed, &Config),
    ) -> Result<Option<i32>> {
        let Some((first, others)) = self.checkpointers.split_first_mut() else { return Ok(None) };
        let is_last = step == config.train.steps;
        let place = Place {
            data: feed.state(),
            skipped_count: trainer.skipped_count(),
            config: serde_json::to_value(config)?,
        };
        let mut parts = trainer.parts();
        let Some(((_, _, optimizer), rest)) = parts.split_first_mut() else { return Ok(None) };
        if is_last && config.checkpoint.folder.is_none() {
            return Ok(None); // nobody would go on from it
        }
        let next = match is_last {
            true => {
                first.save(step, Some(optimizer), || place)?;
                None
            }
            false => match first.step(step, Some(optimizer), || place)? {
                Next::Continue => None,
                Next::Stop { signal } => Some(signal),
            },
        };
        for (checkpointer, (_, _, of_other)) in others.iter_mut().zip(rest) {
            // The place in the data is the first's.
            match is_last || next.is_some() {
                true => checkpointer.save(step, Some(of_other), || ())?,
                false => _ = checkpointer.step(step, Some(of_other), || ())?,
            }
        }
        if is_last || next.is_some() {
            self.checkpointers.iter_mut().try_for_each(Checkpointer::finish)?;
        }
        Ok(next)
    }
}

/// Brings the newest step that all parts have into the trainer; what came of the first. Collective.
fn resume(checkpointers: &mut [Checkpointer], trainer: &mut Trainer) -> Result<Option<Resumed>> {
    let mut parts = trainer.parts();
    if let ([checkpointer], [(_, _, optimizer)]) = (&mut *checkpointers, &mut parts[..]) {
        return Ok(checkpointer.resume(Some(optimizer))?);
    }
    let mut before = None;
    loop {
        let steps: Vec<Option<u64>> = checkpointers
            .iter_mut()
            .map(|checkpointer| checkpointer.newest_step(before))
            .collect::<Result<_, _>>()?;
        // None is below every step: a part without any has none in common with the others.
        let Some(common) = steps.iter().copied().min().flatten() else { return Ok(None) };
        before = Some(common + 1);
        if steps.iter().any(|step| *step != Some(common)) {
            continue;
        }
        let mut all = Vec::new();
        for (checkpointer, (_, _, optimizer)) in checkpointers.iter_mut().zip(&mut parts) {
            all.push(checkpointer.resume_before(common + 1, Some(optimizer))?);
        }
        // One that was damaged has given an older one.
        let oldest = all.iter().map(|one| one.as_ref().map(|resumed| resumed.step)).min().flatten();
        if oldest == Some(common) {
            return Ok(all.swap_remove(0));
        }
        let Some(oldest) = oldest else { bail!("a part of the checkpoints is damaged") };
        before = Some(oldest + 1);
    }
}
