//! Who holds what, when: a stage of ZeRO is a value of [`Sharding`], and nobody else asks which one it is.
//!
//! | | gradients after the exchange | who updates a bucket | parameters after the step |
//! |---|---|---|---|
//! | ZeRO-0 | everywhere | every rank, all of it | are there |
//! | ZeRO-1 | a rank's segment | a rank its segment | are gathered |
//!
//! Source: Rajbhandari et al. 2020, "ZeRO: Memory Optimizations Toward Training Trillion Parameter Models".

use std::ops::Range;

use phalanx_comm::{Group, Work};
use tch::{Device, Kind};

use crate::store::flat::{Flat, Scale};
use crate::store::plan::Bucket;
use crate::{shim, Result, Zero};

/// Who holds what, when.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Sharding {
    zero: Zero,
    rank: usize,
    world_size: usize,
}

impl Sharding {
    pub(crate) fn new(zero: Zero, group: &Group) -> Self {
        Self { zero, rank: group.rank(), world_size: group.world_size() }
    }

    /// Into how many parts the optimizer's state is cut.
    pub(crate) fn parts(self) -> usize {
        match self.zero {
            Zero::Off => 1,
            Zero::One => self.world_size,
        }
    }

    /// Which of them this rank has.
    pub(crate) fn part(self) -> usize {
        match self.zero {
            Zero::Off => 0,
            Zero::One => self.rank,
        }
    }

    /// What this rank updates of a bucket: elements of its storage.
    pub(crate) fn segment(self, bucket: &Bucket) -> Range<usize> {
        bucket.segment(self.part(), self.parts())
    }

    /// Whether only this library's optimizer can step on exchanged gradients.
    pub(crate) fn needs_our_optimizer(self) -> bool {
        self.zero == Zero::One
    }

    /// Memory for parameters: the group's where they are gathered in it.
    pub(crate) fn parameter_memory(
        self,
        group: &mut Group,
        kind: Kind,
        device: Device,
        len: usize,
    ) -> Result<Flat> {
        match self.zero {
            Zero::Off => Flat::private(kind, device, len),
            Zero::One => Flat::registered(group, kind, device, len),
        }
    }

    /// Starts the exchange of a bucket of gradients; with `everywhere` every rank gets all of it.
    pub(crate) fn reduce(
        self,
        group: &mut Group,
        gradients: &Flat,
        range: Range<usize>,
        (scale, everywhere): (Scale, bool),
    ) -> Result<Work<'static>> {
        if everywhere || self.zero == Zero::Off {
            return gradients.all_reduce(group, range, scale);
        }
        gradients.reduce_scatter(group, range, scale)
    }

    /// What a rank sends at least, when a bucket of so many bytes is reduced plainly.
    pub(crate) fn bytes_sent(self, bytes: usize, everywhere: bool) -> u64 {
        let share = (bytes - bytes / self.world_size) as u64;
        share * if everywhere || self.zero == Zero::Off { 2 } else { 1 }
    }

    /// Starts what brings a bucket's updated parameters to all ranks, where they are not there already.
    pub(crate) fn gather(
        self,
        group: &mut Group,
        parameters: &Flat,
        (index, range): (usize, Range<usize>),
    ) -> Result<Option<Work<'static>>> {
        if self.zero == Zero::Off {
            return Ok(None);
        }
        let stream = shim::current_stream(parameters.device())?;
        group.set_stream(stream);
        group.tagged(&format!("parameters of bucket {index}"));
        Ok(Some(parameters.all_gather(group, range)?))
    }
}
