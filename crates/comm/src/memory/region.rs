//! Registered memory: one memfd of each rank of a machine, mapped by all of them.

use super::mapping::Mapping;
use crate::gpu::memory::DeviceMemory;

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
    /// This rank's memory, when it is a GPU's; then there are no parts.
    pub(crate) device: Option<DeviceMemory>,
}

impl RegionMemory {
    /// This rank's part: an address of the GPU's where it is there.
    pub(crate) fn base(&self) -> *mut u8 {
        if let Some(device) = &self.device {
            let address = usize::try_from(device.pointer()).unwrap_or(0);
            return std::ptr::without_provenance_mut(address);
        }
        self.part(self.rank).unwrap_or(std::ptr::null_mut())
    }

    /// The part of `rank`, where that rank is on this machine.
    pub(crate) fn part(&self, rank: usize) -> Option<*mut u8> {
        self.parts.get(rank)?.as_ref().map(Mapping::base)
    }
}
