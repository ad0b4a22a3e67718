//! A collective of tensors that is under way.

use phalanx_comm::Work;
use tch::Tensor;

use super::TensorGroup;
use crate::store::flat::Flat;
use crate::{Error, Result};

/// Makes the tensor of the memory that has the result.
type Take = dyn FnOnce(&Flat) -> Result<Tensor> + Send;

/// A collective that was started, and the tensor that it leads to.
#[must_use = "a collective that is not waited for has no result, and its error is lost"]
pub struct Pending {
    state: PendingState,
}

enum PendingState {
    Ready(Tensor),
    /// The last of `flats` has the result.
    Started {
        work: Work<'static>,
        flats: Vec<Flat>,
        group: TensorGroup,
        take: Box<Take>,
    },
}

impl Pending {
    pub(super) fn ready(tensor: Tensor) -> Self {
        Self { state: PendingState::Ready(tensor) }
    }

    pub(super) fn started(
        work: Work<'static>,
        flats: Vec<Flat>,
        group: TensorGroup,
        take: Box<Take>,
    ) -> Self {
        Self { state: PendingState::Started { work, flats, group, take } }
    }

    /// Waits for the result. On a GPU it orders the caller's stream after it and returns at once.
    ///
    /// # Errors
    /// Those of the group; libtorch's own.
    pub fn wait(self) -> Result<Tensor> {
        match self.state {
            PendingState::Ready(tensor) => Ok(tensor),
            PendingState::Started { work, flats, group, take } => {
                work.wait()?;
                let result = flats.last().map_or(Err(Error::BackwardAbandoned), take)?;
                group.give_back(flats);
                Ok(result)
            }
        }
    }
}

impl std::fmt::Debug for Pending {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Pending").finish_non_exhaustive()
    }
}
