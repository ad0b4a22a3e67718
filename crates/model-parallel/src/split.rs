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
    /// Costs a few small all-gathers for each group, and the connections of its ranks: over NCCL take those that are needed alone
    /// ([`Mesh::split_into`]).
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
    /// On every rank, and the group is still good: [`Error::MeshesDiffer`]; [`Error::WorldMismatch`] where the group is not the mesh's world. [`Error::Comm`] where
    /// the group is dead, or this rank could not connect to those of a new one, and [`Error::PeerFailed`] where another could not.
    #[track_caller]
    pub fn split_into(&self, world: &mut Group, wanted: &[Axes]) -> Result<MeshGroups> {
        self.agree(world, wanted)?;
        Mesh::new(self.shape(), world.world_size())?;
        // Reports of a failure name the rank with it.
        phalanx_comm::recorder::role(&self.role(world.rank())?);
        let (mut groups, mut failure) = (BTreeMap::new(), None);
        for &axes in wanted {
            if groups.contains_key(&axes) {
                continue; // named twice, on every rank
            }
            let place = self.place(world.rank(), axes)?;
            // Ranks of a world fit into an i32, as MPI has it.
            let color = u32::try_from(place.color).unwrap_or(u32::MAX);
            let key = i32::try_from(place.key).unwrap_or(i32::MAX);
            match world.split(Some(color), key) {
                Ok(group) => groups.extend(group.map(|group| (axes, group))),
                Err(error) => failure = failure.or(Some(error)),
            }
        }
        let told = world.all_gather_bytes(&[u8::from(failure.is_some())]);
        if let Some(error) = failure {
            return Err(error.into());
        }
        match told?.iter().position(|failed| *failed != [0]) {
            Some(rank) => Err(Error::PeerFailed { rank }),
            None => Ok(MeshGroups { groups }),
        }
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
