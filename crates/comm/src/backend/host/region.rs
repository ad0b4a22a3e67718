//! Registered memory: one memfd of each rank of a machine, mapped by all of them.

use super::mapping::Mapping;

/// The mappings behind a [`Region`](crate::Region): this rank's part and those of its machine.
#[derive(Debug)]
#[expect(unnameable_types, reason = "inside a sealed trait")]
pub struct RegionMemory {
    /// The same number on every rank: how many regions the group had allocated, from 1.
    pub(crate) id: u64,
    /// Which group it belongs to.
    pub(crate) group: u64,
    pub(crate) rank: usize,
    /// By rank; `None` for ranks of other machines.
    pub(crate) parts: Vec<Option<Mapping>>,
}

impl RegionMemory {
    /// This rank's part.
    pub(crate) fn base(&self) -> *mut u8 {
        self.part(self.rank).unwrap_or(std::ptr::null_mut())
    }

    /// The part of `rank`, where that rank is on this machine.
    pub(crate) fn part(&self, rank: usize) -> Option<*mut u8> {
        self.parts.get(rank)?.as_ref().map(Mapping::base)
    }
}
