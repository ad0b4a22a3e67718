//! How many ranks each axis has.

use std::fmt;

use super::Axis;
use crate::error::{Error, Result};

/// The sizes of the axes. Axes that are not named have one rank.
///
/// # Example
///
/// ```
/// use phalanx_model_parallel::{Axis, Shape};
///
/// let shape = Shape { pp: 2, tp: 4, ..Shape::default() }.filling(Axis::DpShard, 32)?;
/// assert_eq!(shape.to_string(), "pp 2 × dp_shard 4 × tp 4 = 32 ranks");
/// # Ok::<(), phalanx_model_parallel::Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Shape {
    /// Pipeline stages.
    pub pp: usize,
    /// Replicas.
    pub dp_replicate: usize,
    /// Ranks that read different samples and cut the state of training among them.
    pub dp_shard: usize,
    /// Parts of a sequence.
    pub cp: usize,
    /// Parts of a matrix.
    pub tp: usize,
    /// Ranks, of `dp_shard` × `cp`, that have different experts. Divides that product.
    pub ep: usize,
}

impl Default for Shape {
    fn default() -> Self {
        Self { pp: 1, dp_replicate: 1, dp_shard: 1, cp: 1, tp: 1, ep: 1 }
    }
}

impl Shape {
    /// This shape, with the axis (`dp_shard`, most often) as large as makes it fill the world.
    ///
    /// # Errors
    ///
    /// [`Error::WorldMismatch`] where no size does; [`Error::NotAFactor`] for `ep` and `expert_shard`.
    pub fn filling(self, axis: Axis, world_size: usize) -> Result<Self> {
        let one = self.with(axis, 1)?;
        one.check_axes(world_size)?;
        match one.rank_count() {
            Some(others) if world_size.is_multiple_of(others) => {
                one.with(axis, world_size / others)
            }
            _ => {
                let possible = super::possible::shapes(&one, world_size);
                Err(Error::WorldMismatch { shape: one, world_size, possible })
            }
        }
    }

    /// How many ranks have this coordinate in common, along the axis.
    #[must_use]
    pub const fn size(&self, axis: Axis) -> usize {
        match axis {
            Axis::Pp => self.pp,
            Axis::DpReplicate => self.dp_replicate,
            Axis::DpShard => self.dp_shard,
            Axis::Cp => self.cp,
            Axis::ExpertShard => self.dp_shard.saturating_mul(self.cp) / one_at_least(self.ep),
            Axis::Ep => self.ep,
            Axis::Tp => self.tp,
        }
    }

    fn with(mut self, axis: Axis, size: usize) -> Result<Self> {
        match axis {
            Axis::Pp => self.pp = size,
            Axis::DpReplicate => self.dp_replicate = size,
            Axis::DpShard => self.dp_shard = size,
            Axis::Cp => self.cp = size,
            Axis::Tp => self.tp = size,
            Axis::ExpertShard | Axis::Ep => return Err(Error::NotAFactor { axis }),
        }
        Ok(self)
    }

    /// The product of the axes, if a number can hold it.
    pub(super) fn rank_count(&self) -> Option<usize> {
        Axis::DENSE.iter().try_fold(1_usize, |ranks, axis| ranks.checked_mul(self.size(*axis)))
    }

    pub(super) fn check_axes(&self, world_size: usize) -> Result<()> {
        let sizes = [
            ("world", world_size),
            ("pp", self.pp),
            ("dp_replicate", self.dp_replicate),
            ("dp_shard", self.dp_shard),
            ("cp", self.cp),
            ("tp", self.tp),
            ("ep", self.ep),
        ];
        match sizes.into_iter().find(|(_, size)| *size == 0) {
            Some((axis, _)) => Err(Error::EmptyAxis { axis }),
            None => Ok(()),
        }
    }

    pub(super) fn check_experts(&self) -> Result<()> {
        let (ep, dp_shard_cp) = (self.ep, self.dp_shard * self.cp);
        if dp_shard_cp.is_multiple_of(ep) {
            return Ok(());
        }
        let possible = (1..=dp_shard_cp).filter(|size| dp_shard_cp.is_multiple_of(*size)).collect();
        Err(Error::ExpertMismatch { ep, dp_shard_cp, possible })
    }
}

/// Shapes are looked at before they are known to be whole.
const fn one_at_least(size: usize) -> usize {
    if size == 0 {
        1
    } else {
        size
    }
}

impl fmt::Display for Shape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let used = Axis::DENSE.iter().filter(|axis| self.size(**axis) != 1);
        let used: Vec<String> = used.map(|axis| format!("{axis} {}", self.size(*axis))).collect();
        match (self.rank_count(), used.len()) {
            (Some(1), _) => f.write_str("1 rank")?,
            (Some(ranks), 2..) => write!(f, "{} = {ranks} ranks", used.join(" × "))?,
            (Some(_), _) => f.write_str(&used.join(" × "))?,
            (None, _) => write!(f, "{} (more ranks than a number holds)", used.join(" × "))?,
        }
        if self.ep > 1 {
            write!(f, ", ep {}", self.ep)?;
        }
        Ok(())
    }
}
