//! What a layer of experts knows of other ranks.

use phalanx_comm::{Group, GroupOptions};
use phalanx_ddp_core::collective::TensorGroup;

use crate::error::Result;
use crate::tensor::TensorParallel;

/// The ranks that have other experts, and those that compute the same tokens.
///
/// # Example
/// ```
/// use phalanx_model_parallel::expert::ExpertParallel;
///
/// let alone = ExpertParallel::alone()?; // a mesh of one rank: all experts
/// assert_eq!(alone.group.world_size(), 1);
/// # Ok::<(), phalanx_model_parallel::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct ExpertParallel {
    /// The group over the axis `ep`.
    pub group: TensorGroup,
    /// That over `tp`: matrices of experts may be cut over it, and with [`sequence`](TensorParallel::sequence) tokens are.
    pub tp: TensorParallel,
}

impl ExpertParallel {
    /// One rank.
    ///
    /// # Errors
    /// The system has no memory or file descriptors left.
    pub fn alone() -> Result<Self> {
        let group = TensorGroup::new(Group::single(GroupOptions::default())?);
        Ok(Self { group, tp: TensorParallel::alone()? })
    }

    /// For the matrices of experts, which take all tokens: `tp` without [`sequence`](TensorParallel::sequence).
    #[must_use]
    pub fn of_experts(&self) -> TensorParallel {
        TensorParallel { group: self.tp.group.clone(), sequence: false }
    }
}
