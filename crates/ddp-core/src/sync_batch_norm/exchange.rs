//! The exchange of batch statistics: a few numbers a channel from each rank to all, in registered
//! memory.

use phalanx_comm::Group;
use tch::Tensor;

use crate::store::flat::Flat;
use crate::{shim, Error, Result};

/// A group, and memory for its exchanges, one of each kind and device.
#[derive(Debug)]
pub(super) struct Exchange {
    group: Group,
    memory: Vec<(Flat, usize)>,
}

impl Exchange {
    pub(super) fn new(group: Group) -> Self {
        Self { group, memory: Vec::new() }
    }

    /// Every rank's `mine`, a vector, as the rows of a matrix in rank order. Collective.
    pub(super) fn all(&mut self, mine: &Tensor, tag: &str) -> Result<Tensor> {
        let (len, rank, world_size) = (mine.numel(), self.group.rank(), self.group.world_size());
        let (kind, device) = (mine.kind(), mine.device());
        let total = len * world_size;
        let fits = |(flat, room): &(Flat, usize)| {
            flat.kind() == kind && flat.device() == device && *room >= total
        };
        let at = match self.memory.iter().position(fits) {
            Some(at) => at,
            None => {
                // The others come to the same channels, or hear that they differ.
                self.group.tagged(tag);
                let flat = Flat::registered(&mut self.group, kind, device, total)?;
                self.memory.retain(|(old, _)| old.kind() != kind || old.device() != device);
                self.memory.push((flat, total));
                self.memory.len() - 1
            }
        };
        let (flat, _) = &self.memory[at];
        flat.range(&(rank * len..(rank + 1) * len))?.f_copy_(mine)?;
        self.group.set_stream(shim::current_stream(device)?);
        self.group.tagged(tag);
        flat.all_gather(&mut self.group, 0..total)?.wait()?;
        let rows =
            i64::try_from(world_size).map_err(|_many| Error::TooLarge { elements: total })?;
        // The next exchange writes over it.
        Ok(flat.range(&(0..total))?.f_view([rows, -1])?.f_detach_copy()?)
    }
}
