//! How a global batch is cut: over the ranks, and over micro-batches inside a rank.
//!
//! `global_batch = world_size × micro_batch × accumulate`, always exactly. What the command line
//! and the configuration leave open is derived; what contradicts itself is an error that says which
//! number to change.

use super::config::{ConfigError, Train};

/// The three numbers as one source gives them.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Wanted {
    pub(crate) global_batch: Option<usize>,
    pub(crate) micro_batch: Option<usize>,
    pub(crate) accumulate: Option<usize>,
}

/// A cut that adds up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Batching {
    /// Samples a step over all ranks.
    pub(crate) global_batch: usize,
    /// Samples that a rank computes at once.
    pub(crate) micro_batch: usize,
    /// Micro-batches a step on each rank.
    pub(crate) accumulate: usize,
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
    /// and the file's `micro_batch` is then what fits a rank's memory, not more.
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
                let limit = file.micro_batch.unwrap_or(usize::MAX);
                let share = global / world_size;
                let micro_batch =
                    (1..=share.min(limit)).rev().find(|micro| share.is_multiple_of(*micro));
                Wanted { micro_batch, ..self }
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
        let divide = |global: usize, by: usize, what: &str| {
            let nearest = (global / by).max(1) * by;
            if global.is_multiple_of(by) && global > 0 {
                return Ok(global / by);
            }
            Err(format!(
                "global batch {global} is not a multiple of {by} ({world_size} ranks{what}); \
                 take {nearest}, or change the others"
            ))
        };
        let Wanted { global_batch, micro_batch, accumulate } = self;
        let (micro_batch, accumulate) = match (global_batch, micro_batch, accumulate) {
            (_, Some(micro), Some(accumulate)) => (micro, accumulate),
            (Some(global), Some(micro), None) => {
                let what = format!(" × micro-batch {micro}");
                (micro, divide(global, world_size * micro, &what)?)
            }
            (Some(global), None, accumulate) => {
                let accumulate = accumulate.unwrap_or(1);
                let what = format!(" × {accumulate} micro-batches");
                (divide(global, world_size * accumulate, &what)?, accumulate)
            }
            (None, micro, accumulate) => (micro.unwrap_or(MICRO_BATCH), accumulate.unwrap_or(1)),
        };
        let product = world_size * micro_batch * accumulate;
        match global_batch {
            Some(global) if global != product => Err(format!(
                "global batch {global} is not {world_size} ranks × micro-batch {micro_batch} × \
                 {accumulate} micro-batches = {product}; give two of the three, or numbers that fit"
            )),
            _ => Ok(Batching { global_batch: product, micro_batch, accumulate }),
        }
    }
}
