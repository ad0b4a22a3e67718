//! How a global batch is cut: over the ranks, and over micro-batches inside a rank.
//!
//! What the command line and the configuration leave open is derived from `global_batch =
//! world_size × micro_batch × accumulate`. A global batch that does not divide is cut as evenly as
//! can be: the loss is weighted by tokens, so unequal shares are exact too. Numbers that contradict
//! each other are errors.

use super::config::{ConfigError, Train};

/// The three numbers as one source gives them.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Wanted {
    pub(crate) global_batch: Option<usize>,
    pub(crate) micro_batch: Option<usize>,
    pub(crate) accumulate: Option<usize>,
}

/// How a rank's share becomes micro-batches.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Cut {
    /// So many samples each; the last may hold fewer.
    Samples,
    /// So many parts, as even as can be.
    Parts,
}

/// A cut that adds up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Batching {
    /// Samples a step over all ranks.
    pub(crate) global_batch: usize,
    /// Most samples that a rank computes at once.
    pub(crate) micro_batch: usize,
    /// Most micro-batches a step on a rank.
    pub(crate) accumulate: usize,
    /// Which of the two leads where the global batch does not divide.
    pub(crate) cut: Cut,
}

/// Samples a rank computes at once when nobody says how many.
const MICRO_BATCH: usize = 8;

impl From<&Train> for Wanted {
    fn from(train: &Train) -> Self {
        Wanted {
            global_batch: train.global_batch,
            micro_batch: train.micro_batch,
            accumulate: train.accumulate,
        }
    }
}

impl Batching {
    /// Flags come before the file: a number in the file counts only where the flags leave it open,
    /// and beside a global batch from the flags the file's `micro_batch` is what fits a rank, not
    /// more.
    pub(crate) fn resolve(
        world_size: usize,
        flags: Wanted,
        file: Wanted,
    ) -> Result<Batching, ConfigError> {
        let (wanted, origin) = if flags == Wanted::default() {
            (file, "configuration")
        } else {
            (flags.completed_by(file, world_size), "command line")
        };
        wanted
            .solve(world_size)
            .map_err(|message| ConfigError::Invalid { origin: origin.into(), message })
    }
}

impl Wanted {
    fn completed_by(self, file: Wanted, world_size: usize) -> Wanted {
        match self {
            Wanted { global_batch: Some(global), micro_batch: None, accumulate: None } => {
                let share = global.div_ceil(world_size);
                let limit = file.micro_batch.unwrap_or(share).max(1);
                Wanted { accumulate: Some(share.div_ceil(limit).max(1)), ..self }
            }
            Wanted { global_batch: None, micro_batch: Some(_), accumulate: None } => {
                Wanted { accumulate: file.accumulate, ..self }
            }
            Wanted { global_batch: None, micro_batch: None, accumulate: Some(_) } => {
                let global_batch = file.global_batch.filter(|_| file.micro_batch.is_none());
                Wanted { micro_batch: file.micro_batch, global_batch, ..self }
            }
            _ => self,
        }
    }

    fn solve(self, world_size: usize) -> Result<Batching, String> {
        let Some(global_batch) = self.global_batch else {
            let micro_batch = self.micro_batch.unwrap_or(MICRO_BATCH);
            let accumulate = self.accumulate.unwrap_or(1);
            let global_batch = world_size * micro_batch * accumulate;
            return Ok(Batching { global_batch, micro_batch, accumulate, cut: Cut::Parts });
        };
        let share = global_batch.div_ceil(world_size);
        let (micro_batch, accumulate, cut) = match (self.micro_batch, self.accumulate) {
            (Some(micro), Some(parts)) if world_size * micro * parts != global_batch => {
                let product = world_size * micro * parts;
                return Err(format!(
                    "global batch {global_batch} is not {world_size} ranks × micro-batch {micro} \
                     × {parts} micro-batches = {product}; give two of the three, or numbers that fit"
                ));
            }
            (Some(micro), None) => (micro.min(share), share.div_ceil(micro), Cut::Samples),
            (_, parts) => {
                let parts = parts.unwrap_or(1);
                (share.div_ceil(parts), parts, Cut::Parts)
            }
        };
        enough(Batching { global_batch, micro_batch, accumulate, cut }, world_size)
    }
}

/// Every rank has a sample for every micro-batch.
fn enough(batching: Batching, world_size: usize) -> Result<Batching, String> {
    let Batching { global_batch, accumulate, cut, .. } = batching;
    let parts = if cut == Cut::Parts { accumulate } else { 1 };
    let least = world_size * parts;
    if global_batch >= least {
        return Ok(batching);
    }
    let each = if parts > 1 { format!(" × {parts} micro-batches") } else { String::new() };
    Err(format!(
        "global batch {global_batch} is too small for {world_size} ranks{each}: it must be at \
         least {least}"
    ))
}
