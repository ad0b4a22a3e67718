//! Memory that a group registers.

use std::time::{Duration, Instant};

use super::Group;
use crate::dtype::Element;
use crate::error::{Error, Result};
use crate::fingerprint::Op;
use crate::gpu::memory::{await_freed, DeviceMemory};
use crate::memory::region::RegionMemory;
use crate::order::setup;
use crate::region::Region;

/// How long a failed allocation waits for memory of the GPU that was let go before.
const FREED: Duration = Duration::from_secs(5);

impl Group {
    /// Registers memory where the group's backend works best (of the GPU with NCCL or
    /// [`GroupOptions::gpu_memory`](crate::GroupOptions::gpu_memory), else of the host): every rank gets a [`Region`] of `len` elements, all zero. Collective.
    ///
    /// # Errors
    ///
    /// The lengths or types differ between ranks, the group is dead, or there is no memory left.
    #[track_caller]
    pub fn allocate<T: Element>(&mut self, len: usize) -> Result<Region<T>> {
        let Some(gpu) = self.transport.gpu().cloned() else { return self.allocate_on_host(len) };
        let bytes = self.region_bytes::<T>(len)?;
        self.agree(Op::Allocate, T::DTYPE, len)?;
        self.regions += 1;
        let rank = self.rank();
        let device = DeviceMemory::new(&gpu, rank, bytes).or_else(|error| {
            // What was let go is free only after the device is done with it.
            let deadline = Instant::now() + FREED;
            let ended = self.transport.lane(true).is_none_or(|lane| lane.wait_idle(deadline));
            match ended && await_freed(deadline) {
                true => DeviceMemory::new(&gpu, rank, bytes),
                false => Err(error),
            }
        });
        let device = device.map_err(|error| self.core.peers.fail(error))?;
        let (id, group) = (self.regions, self.number);
        let memory = RegionMemory { id, group, rank, parts: Vec::new(), device: Some(device) };
        Ok(Region::new(memory, len))
    }

    /// Whether all ranks are on one machine and see each other's regions of host memory: see [`Region::part_of`].
    #[must_use]
    pub fn shares_memory(&self) -> bool {
        self.core.topology.is_one_machine() && self.transport.shares_regions()
    }

    /// As [`Group::allocate`], but memory of the host with every backend. With MPI it lies in huge pages: from 32 KiB
    /// on a region takes whole pages of 2 MiB.
    ///
    /// # Errors
    ///
    /// As [`Group::allocate`].
    #[track_caller]
    pub fn allocate_on_host<T: Element>(&mut self, len: usize) -> Result<Region<T>> {
        let deadline = Instant::now() + self.next.timeout.unwrap_or(self.options.timeout);
        let bytes = self.region_bytes::<T>(len)?;
        self.agree(Op::Allocate, T::DTYPE, len)?;
        self.regions += 1;
        let (core, number, id) = (&self.core, self.number, self.regions);
        let memory = if self.transport.shares_regions() {
            setup::share_region(core, number, id, bytes, deadline)
        } else {
            setup::own_region(core, number, id, bytes)
        };
        Ok(Region::new(memory.map_err(|error| self.core.peers.fail(error))?, len))
    }

    /// The length in bytes of a region of so many elements.
    fn region_bytes<T: Element>(&mut self, len: usize) -> Result<usize> {
        let bytes = len.checked_mul(T::DTYPE.size_bytes());
        let bytes = bytes.filter(|bytes| isize::try_from(*bytes).is_ok());
        bytes.ok_or_else(|| {
            let expected = isize::MAX.unsigned_abs() / T::DTYPE.size_bytes();
            let op = Op::Allocate.name();
            self.argument(Error::LengthMismatch { op, what: "the region", expected, actual: len })
        })
    }
}
