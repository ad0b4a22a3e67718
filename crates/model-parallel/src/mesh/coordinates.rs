//! From a rank to its coordinates and back.

use super::{Axis, Mesh};
use crate::error::{Error, Result};

/// Where a rank is on each axis, counted from 0.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Coordinates {
    /// Its stage of the pipeline.
    pub pp: usize,
    /// Its replica.
    pub dp_replicate: usize,
    /// Its shard.
    pub dp_shard: usize,
    /// Its part of the sequence.
    pub cp: usize,
    /// Its part of the matrices.
    pub tp: usize,
}

impl Coordinates {
    const fn on(&self, axis: Axis) -> usize {
        match axis {
            Axis::Pp => self.pp,
            Axis::DpReplicate => self.dp_replicate,
            Axis::DpShard => self.dp_shard,
            Axis::Cp => self.cp,
            Axis::Tp => self.tp,
            Axis::ExpertShard | Axis::Ep => 0,
        }
    }
}

impl Mesh {
    /// Where the rank is.
    ///
    /// # Errors
    ///
    /// [`Error::NoSuchRank`].
    pub fn coordinates(&self, rank: usize) -> Result<Coordinates> {
        self.check_rank(rank)?;
        let on = |axis| self.digit(rank, axis, Axis::DENSE);
        let (pp, dp_replicate, dp_shard) = (on(Axis::Pp), on(Axis::DpReplicate), on(Axis::DpShard));
        Ok(Coordinates { pp, dp_replicate, dp_shard, cp: on(Axis::Cp), tp: on(Axis::Tp) })
    }

    /// Where the rank is on one axis, `ep` and `expert_shard` among them.
    ///
    /// # Errors
    ///
    /// [`Error::NoSuchRank`].
    pub fn coordinate(&self, rank: usize, axis: Axis) -> Result<usize> {
        self.check_rank(rank)?;
        let view = if Axis::DENSE.contains(&axis) { Axis::DENSE } else { Axis::EXPERT };
        Ok(self.digit(rank, axis, view))
    }

    /// Who is there.
    ///
    /// # Errors
    ///
    /// [`Error::NoSuchCoordinate`].
    pub fn rank(&self, coordinates: &Coordinates) -> Result<usize> {
        Axis::DENSE.iter().try_fold(0, |rank, &axis| {
            let (index, size) = (coordinates.on(axis), self.shape().size(axis));
            if index < size {
                return Ok(rank * size + index);
            }
            Err(Error::NoSuchCoordinate { axis, index, size })
        })
    }

    /// The rank and where it is on the axes that have more than one rank, as messages name it.
    ///
    /// # Errors
    ///
    /// [`Error::NoSuchRank`].
    pub fn named(&self, rank: usize) -> Result<String> {
        let role = self.role(rank)?;
        Ok(if role.is_empty() { format!("rank {rank}") } else { format!("rank {rank} ({role})") })
    }

    /// Where the rank is on the axes that have more than one rank: `pp 1, dp_shard 0, tp 1`; nothing on a mesh of one rank.
    ///
    /// # Errors
    ///
    /// [`Error::NoSuchRank`].
    pub(crate) fn role(&self, rank: usize) -> Result<String> {
        self.check_rank(rank)?;
        let used = Axis::DENSE.iter().filter(|axis| self.shape().size(**axis) > 1);
        let mut parts: Vec<String> =
            used.map(|axis| format!("{axis} {}", self.digit(rank, *axis, Axis::DENSE))).collect();
        if self.shape().ep > 1 {
            parts.push(format!("ep {}", self.digit(rank, Axis::Ep, Axis::EXPERT)));
        }
        Ok(parts.join(", "))
    }

    /// The digit of a rank on one axis of five that multiply to the world.
    fn digit(&self, rank: usize, axis: Axis, view: [Axis; 5]) -> usize {
        let inner = view.iter().rev().take_while(|other| **other != axis);
        let stride: usize = inner.map(|other| self.shape().size(*other)).product();
        rank / stride % self.shape().size(axis)
    }
}
