//! This rank's numbers: in the group, on its node, and of its node.

use super::Group;
use crate::environment::Launcher;

impl Group {
    /// This rank's number in the group, from 0.
    #[must_use]
    pub fn rank(&self) -> usize {
        self.world.rank
    }

    /// How many ranks the group has.
    #[must_use]
    pub fn world_size(&self) -> usize {
        self.world.world_size
    }

    /// This rank's number among those of its node.
    #[must_use]
    pub fn local_rank(&self) -> usize {
        self.world.local_rank
    }

    /// How many ranks of the group its node has.
    #[must_use]
    pub fn local_world_size(&self) -> usize {
        self.world.local_world_size
    }

    /// Who started this process.
    #[must_use]
    pub fn launcher(&self) -> Launcher {
        self.world.launcher
    }

    /// The number of its node.
    #[must_use]
    pub fn node_rank(&self) -> usize {
        self.world.node_rank
    }

    /// How many nodes there are.
    #[must_use]
    pub fn node_count(&self) -> usize {
        self.world.node_count
    }
}
