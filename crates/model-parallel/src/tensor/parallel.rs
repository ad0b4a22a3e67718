//! What a layer knows of the ranks that compute it together.

use phalanx_comm::{Group, GroupOptions};
use phalanx_ddp_core::collective::{Pending, TensorGroup};
use tch::Tensor;

use super::dropout::Place;
use super::rows::Chunks;
use crate::error::{Error, Result};

/// The dimension of tokens in `[batch, tokens, width]`.
pub(super) const TOKENS: i64 = 1;

/// The ranks that compute one batch together, and whether they cut the tokens between blocks.
///
/// # Example
/// ```
/// use phalanx_model_parallel::tensor::TensorParallel;
///
/// let tp = TensorParallel::alone()?; // a mesh of one rank: plain computation
/// assert_eq!(tp.ranks(), 1);
/// # Ok::<(), phalanx_model_parallel::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct TensorParallel {
    /// The group over the axis `tp`.
    pub group: TensorGroup,
    /// Whether the tokens between blocks are cut: rank r of n has tokens [r·T/n, (r+1)·T/n).
    pub sequence: bool,
}

impl TensorParallel {
    /// One rank.
    ///
    /// # Errors
    /// The system has no memory or file descriptors left.
    pub fn alone() -> Result<Self> {
        let group = Group::single(GroupOptions::default())?;
        Ok(Self { group: TensorGroup::new(group), sequence: false })
    }

    /// How many ranks there are.
    #[must_use]
    pub fn ranks(&self) -> usize {
        self.group.world_size()
    }

    /// Whether tokens are cut, over more than one rank.
    #[must_use]
    pub fn cuts_tokens(&self) -> bool {
        self.sequence && self.ranks() > 1
    }

    /// Where `x`, of shape `[batch, tokens(/n), width]`, is between blocks, for dropout.
    #[must_use]
    pub fn between_blocks(&self, x: &Tensor) -> Place {
        let tokens = x.size().get(1).copied().unwrap_or(0);
        let first = if self.cuts_tokens() { self.rank() * tokens } else { 0 };
        Place { first_token: first, first_column: 0 }
    }

    /// How products are cut beside this group's exchanges.
    pub(super) fn chunks(&self) -> Chunks {
        let (nodes, on_gpus) =
            self.group.with_group(|group| (group.node_count(), group.device().is_some()));
        Chunks::of((self.ranks(), nodes), on_gpus)
    }

    pub(super) fn rank(&self) -> i64 {
        signed(self.group.rank())
    }

    pub(super) fn size(&self) -> i64 {
        signed(self.ranks())
    }

    /// All tokens, of which each rank has a part.
    pub(super) fn start_gather(&self, x: &Tensor, tag: &str) -> phalanx_ddp_core::Result<Later> {
        Ok(match self.cuts_tokens() {
            true => Later::Coming(self.group.start_all_gather(x, TOKENS, tag)?),
            false => Later::Here(x.f_detach()?),
        })
    }

    /// The sum over the ranks: of all tokens, or of the rank's own.
    pub(super) fn start_sum(&self, x: &Tensor, tag: &str) -> phalanx_ddp_core::Result<Pending> {
        match self.cuts_tokens() {
            true => self.group.start_reduce_scatter(x, TOKENS, tag),
            false => self.group.start_all_reduce(x, tag),
        }
    }

    /// An error unless the ranks have as many tokens each.
    pub(super) fn check_tokens(&self, layer: &str, x: &Tensor) -> Result<()> {
        let shape = x.size();
        if !self.cuts_tokens() || (shape.len() >= 2 && shape[1] % self.size() == 0) {
            return Ok(());
        }
        Err(Error::BadInput {
            layer: layer.to_owned(),
            actual: format!("an input of shape {shape:?}"),
            expected: format!(
                "tokens (dimension 1) that can be cut over the {} ranks of sequence parallelism",
                self.size()
            ),
        })
    }
}

/// A tensor, or a gather that leads to it.
#[derive(Debug)]
pub(super) enum Later {
    Here(Tensor),
    Coming(Pending),
}

impl Later {
    pub(super) fn wait(self) -> phalanx_ddp_core::Result<Tensor> {
        match self {
            Self::Here(tensor) => Ok(tensor),
            Self::Coming(pending) => pending.wait(),
        }
    }
}

fn signed(number: usize) -> i64 {
    i64::try_from(number).unwrap_or(i64::MAX)
}
