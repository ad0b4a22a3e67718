//! What ranks need to agree on a checkpoint: one collective.

use crate::error::Cause;
use crate::{Error, Result};

/// The ranks that save together. A trainer implements it over its process group.
pub trait Ranks {
    /// This rank's number.
    fn rank(&self) -> usize;

    /// How many there are.
    fn world_size(&self) -> usize;

    /// Gives each rank's bytes to every rank, in the order of ranks. Their lengths may differ. All ranks call it in the same order.
    ///
    /// # Errors
    /// When the group failed; it is not used again for this checkpoint.
    fn all_gather(&mut self, bytes: &[u8]) -> std::result::Result<Vec<Vec<u8>>, Cause>;
}

/// One rank by itself.
#[derive(Clone, Copy, Debug, Default)]
pub struct Alone;

impl Ranks for Alone {
    fn rank(&self) -> usize {
        0
    }

    fn world_size(&self) -> usize {
        1
    }

    fn all_gather(&mut self, bytes: &[u8]) -> std::result::Result<Vec<Vec<u8>>, Cause> {
        Ok(vec![bytes.to_vec()])
    }
}

/// Gathers, and compares the number of answers with that of ranks.
pub(crate) fn all_gather(ranks: &mut dyn Ranks, bytes: &[u8]) -> Result<Vec<Vec<u8>>> {
    let all = ranks.all_gather(bytes).map_err(Error::Group)?;
    if all.len() != ranks.world_size() || all.is_empty() {
        let (answers, size) = (all.len(), ranks.world_size());
        return Err(Error::Group(format!("{answers} answers of {size} ranks").into()));
    }
    Ok(all)
}
