//! The groups of a set of axes, in an order that all ranks agree on.

use super::{Axes, Mesh};
use crate::error::{Error, Result};

/// A rank's place among the groups of a set of axes: what `Group::split` takes, and what it leads to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GroupPlace {
    /// Which group, counted by the smallest rank of each: ranks of one color form a group.
    pub color: usize,
    /// The rank in it.
    pub key: usize,
    /// How many ranks it has.
    pub size: usize,
}

impl Mesh {
    /// The rank's place among the groups over these axes. Costs a few divisions.
    ///
    /// # Errors
    ///
    /// [`Error::NoSuchRank`].
    pub fn place(&self, rank: usize, axes: Axes) -> Result<GroupPlace> {
        self.check_rank(rank)?;
        Ok(self.place_of(rank, axes))
    }

    /// The world's rank of the member `key` of the group over these axes that `rank` is in: errors of a group count its own ranks.
    ///
    /// # Errors
    ///
    /// [`Error::NoSuchRank`] for a rank outside of the mesh, or a key outside of the group.
    pub fn member(&self, rank: usize, axes: Axes, key: usize) -> Result<usize> {
        let color = self.place(rank, axes)?.color;
        let mut groups = self.groups(axes);
        let group = groups.swap_remove(color);
        let missing = Error::NoSuchRank { rank: key, world_size: group.len() };
        group.get(key).copied().ok_or(missing)
    }

    /// All groups over these axes: ordered by their smallest rank, and ranks in each in ascending order, so that the index
    /// of a group is the color of its ranks and the index in it their key.
    #[must_use]
    pub fn groups(&self, axes: Axes) -> Vec<Vec<usize>> {
        let mut groups = vec![Vec::new(); self.world_size() / self.group_size(axes)];
        for rank in 0..self.world_size() {
            groups[self.place_of(rank, axes).color].push(rank);
        }
        groups
    }

    /// Takes a rank's digits from the innermost on: those of the axes make the key, the others the color.
    fn place_of(&self, rank: usize, axes: Axes) -> GroupPlace {
        let (mut key, mut size) = (0, 1);
        let (mut color, mut colors) = (0, 1);
        let mut left = rank;
        for axis in axes.view().into_iter().rev() {
            let len = self.shape().size(axis);
            let digit = left % len;
            left /= len;
            let (number, weight) =
                if axes.contains(axis) { (&mut key, &mut size) } else { (&mut color, &mut colors) };
            *number += digit * *weight;
            *weight *= len;
        }
        GroupPlace { color, key, size }
    }
}
