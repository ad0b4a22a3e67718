//! What ranks tell each other about a checkpoint: short records, the same number of them on every rank.

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::ranks::{all_gather, Ranks};
use crate::{Error, Result};

/// Said at the beginning of a save.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Opening {
    pub(super) step: u64,
    /// Whether this rank's tensors are not those of its last save.
    pub(super) is_new: bool,
    /// Rank 0's names the folder.
    pub(super) nonce: u64,
    /// Why this rank cannot save at all.
    pub(super) trouble: Option<String>,
}

/// How far a rank is with what it has to do in this phase.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum Status {
    Working,
    Done,
    Failed(String),
}

/// Said at every poll while a checkpoint is pending.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Report {
    pub(super) status: Status,
    /// Whether this rank has waited as long as it may.
    pub(super) is_late: bool,
}

/// Said when all have written.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Written {
    pub(super) crc32c: crate::manifest::Sums,
    /// As text, which rank 0 puts into the manifest as it is.
    pub(super) rank_values: Box<serde_json::value::RawValue>,
}

/// Gathers a record of each rank.
pub(super) fn gather<T: Serialize + DeserializeOwned>(
    ranks: &mut dyn Ranks,
    record: &T,
) -> Result<Vec<T>> {
    let bad = |error: serde_json::Error| Error::OutOfStep { reason: error.to_string() };
    let all = all_gather(ranks, &serde_json::to_vec(record).map_err(bad)?)?;
    let parse = |(rank, text): (usize, &Vec<u8>)| {
        serde_json::from_slice(text).map_err(|error| {
            let reason = format!("rank {rank} sent something else than was expected: {error}");
            Error::OutOfStep { reason }
        })
    };
    all.iter().enumerate().map(parse).collect()
}

/// Whether all ranks save the same step, and can.
pub(super) fn check(openings: &[Opening]) -> Result<()> {
    let first = openings.first().map(|opening| opening.step);
    for (rank, opening) in openings.iter().enumerate() {
        if Some(opening.step) != first {
            let reason = format!(
                "rank {rank} saves step {}, rank 0 step {}",
                opening.step,
                first.unwrap_or_default()
            );
            return Err(Error::OutOfStep { reason });
        }
        if let Some(reason) = opening.trouble.clone() {
            return Err(Error::SaveFailed { step: opening.step, rank, reason });
        }
    }
    Ok(())
}
