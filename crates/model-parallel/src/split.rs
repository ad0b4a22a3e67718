//! The groups of a mesh, made by all ranks together.

use std::collections::BTreeMap;

use phalanx_comm::Group;

use crate::error::{Error, Result};
use crate::mesh::{Axes, Mesh, Nodes, Shape};

/// This rank's groups, one for each set of axes.
///
/// Groups know nothing of each other: see `Group::split` on the order of collectives of two groups over NCCL.
#[derive(Debug)]
pub struct MeshGroups {
    groups: BTreeMap<Axes, Group>,
}

impl MeshGroups {
    /// The group over these axes.
    ///
    /// # Errors
    ///
    /// [`Error::NoSuchGroup`].
    pub fn get(&mut self, axes: Axes) -> Result<&mut Group> {
        self.groups.get_mut(&axes).ok_or(Error::NoSuchGroup { axes })
    }

    /// The group over these axes, to keep.
    ///
    /// # Errors
    ///
    /// [`Error::NoSuchGroup`].
    pub fn take(&mut self, axes: Axes) -> Result<Group> {
        self.groups.remove(&axes).ok_or(Error::NoSuchGroup { axes })
    }
}

impl Mesh {
    /// Makes all groups of [`Axes::PLAN`]. Collective: all ranks call it, with the same mesh.
    ///
    /// Costs two small all-gathers a group, and the connections of its ranks. Groups of one rank cost none.
    ///
    /// # Errors
    ///
    /// As [`Mesh::split_into`].
    #[track_caller]
    pub fn split(&self, world: &mut Group) -> Result<MeshGroups> {
        self.split_into(world, &Axes::PLAN)
    }

    /// Makes the groups over these sets of axes. Collective: all ranks call it, with the same mesh and sets.
    ///
    /// # Errors
    ///
    /// [`Error::WorldMismatch`]: the group is not the mesh's world. [`Error::MeshesDiffer`], on every rank: the group is still good. [`Error::Comm`]: the group is dead, or
    /// the ranks of a new one could not connect.
    #[track_caller]
    pub fn split_into(&self, world: &mut Group, wanted: &[Axes]) -> Result<MeshGroups> {
        Mesh::new(self.shape(), world.world_size())?;
        self.agree(world, wanted)?;
        let mut groups = BTreeMap::new();
        for &axes in wanted {
            let place = self.place(world.rank(), axes)?;
            // Ranks of a world fit into an i32, as MPI has it.
            let color = u32::try_from(place.color).ok();
            let key = i32::try_from(place.key).unwrap_or(i32::MAX);
            if let Some(group) = world.split(color, key)? {
                groups.insert(axes, group);
            }
        }
        Ok(MeshGroups { groups })
    }

    fn agree(&self, world: &mut Group, wanted: &[Axes]) -> Result<()> {
        let mine = described(&self.shape(), wanted);
        let all = world.all_gather_bytes(mine.as_bytes())?;
        let text = |rank: usize| String::from_utf8_lossy(&all[rank]).into_owned();
        match (1..all.len()).find(|rank| all[*rank] != all[0]) {
            Some(rank) => Err(Error::MeshesDiffer { rank, theirs: text(rank), first: text(0) }),
            None => Ok(()),
        }
    }
}

impl Nodes {
    /// The nodes of the group's ranks, as their launchers have told them. Collective.
    ///
    /// # Errors
    ///
    /// [`Error::Comm`].
    #[track_caller]
    pub fn of_group(world: &mut Group) -> Result<Self> {
        let mine = world.node_rank().to_string();
        let all = world.all_gather_bytes(mine.as_bytes())?;
        let node = |theirs: &Vec<u8>| String::from_utf8_lossy(theirs).parse().unwrap_or(0);
        Ok(Self::of_ranks(all.iter().map(node).collect()))
    }
}

/// What ranks have to have in common.
fn described(shape: &Shape, wanted: &[Axes]) -> String {
    if wanted == Axes::PLAN {
        return shape.to_string();
    }
    let wanted: Vec<String> = wanted.iter().map(ToString::to_string).collect();
    format!("{shape}, groups {}", wanted.join("; "))
}
