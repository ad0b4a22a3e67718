//! A mesh: every rank's place on named axes, and the groups that follow from it. Pure.
//!
//! Ranks are counted along the axes as digits of a number, `pp` first and `tp` last:
//!
//! ```text
//! rank = (((pp · DP_REPLICATE + dp_replicate) · DP_SHARD + dp_shard) · CP + cp) · TP + tp
//! ```
//!
//! so ranks of one `tp` group are neighbours, which launchers place on one node, and stages of the pipeline, which send least,
//! are farthest from each other.
//!
//! Experts get no ranks of their own: `ep` takes ranks of `dp_shard` × `cp`, which compute different tokens of the same layers.
//! The same ranks are then seen as `expert_shard` × `ep`, `ep` inside. Megatron-LM does so ("parallel folding": two rank
//! generators that share `tp` and `pp`), torchtitan too (`ep` borrows `cp` and a part of `dp_shard`). As with Megatron-LM any divisor of
//! `dp_shard` × `cp` will do, also one that cuts `cp`: a rank sends tokens to experts whatever sequence they are of. As with
//! torchtitan `dp_replicate` is left alone, so that replicas talk to each other about gradients and nothing else; and an expert's matrices are cut over `tp`
//! as all others are (their `etp = tp`).
//!
//! # Source
//!
//! Shoeybi et al. 2019 (tensor parallelism inside a node), Narayanan et al. 2021 (its takeaways on placing `tp` and `pp`); Liu et al. 2025 (parallel folding of
//! mixtures of experts); torchtitan `distributed/parallel_dims.py`.

mod axes;
mod coordinates;
mod groups;
mod placement;
mod possible;
mod shape;
mod table;

pub use axes::{Axes, Axis};
pub use coordinates::Coordinates;
pub use groups::GroupPlace;
pub use placement::{AxisPlacement, Nodes, Placement};
pub use shape::Shape;

use crate::error::{Error, Result};

/// A shape that fits its world.
///
/// # Example
///
/// ```
/// use phalanx_model_parallel::{Axes, Mesh, Shape};
///
/// let mesh = Mesh::new(Shape { pp: 2, dp_shard: 2, tp: 2, ..Shape::default() }, 8)?;
/// assert_eq!(mesh.groups(Axes::TP), [[0, 1], [2, 3], [4, 5], [6, 7]]);
/// assert_eq!(mesh.groups(Axes::PP), [[0, 4], [1, 5], [2, 6], [3, 7]]);
/// assert_eq!(mesh.named(5)?, "rank 5 (pp 1, dp_shard 0, tp 1)");
/// # Ok::<(), phalanx_model_parallel::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mesh {
    shape: Shape,
    world_size: usize,
}

impl Mesh {
    /// The mesh of this shape in a world of so many ranks.
    ///
    /// # Errors
    ///
    /// [`Error::EmptyAxis`]; [`Error::WorldMismatch`], with shapes that fit; [`Error::ExpertMismatch`], with the sizes that `ep` can have.
    pub fn new(shape: Shape, world_size: usize) -> Result<Self> {
        shape.check_axes(world_size)?;
        if shape.rank_count() != Some(world_size) {
            let possible = possible::shapes(&shape, world_size);
            return Err(Error::WorldMismatch { shape, world_size, possible });
        }
        shape.check_experts()?;
        Ok(Self { shape, world_size })
    }

    /// The sizes of its axes.
    #[must_use]
    pub const fn shape(&self) -> Shape {
        self.shape
    }

    /// How many ranks it has.
    #[must_use]
    pub const fn world_size(&self) -> usize {
        self.world_size
    }

    /// How many ranks a group of these axes has.
    #[must_use]
    pub fn group_size(&self, axes: Axes) -> usize {
        axes.iter().map(|axis| self.shape.size(axis)).product()
    }

    fn check_rank(&self, rank: usize) -> Result<()> {
        let world_size = self.world_size;
        if rank < world_size {
            return Ok(());
        }
        Err(Error::NoSuchRank { rank, world_size })
    }
}
