//! Who holds what, when: a stage of ZeRO is a value of [`Sharding`], and nobody else asks which one it is.
//!
//! | | gradients between steps | who updates a bucket | parameters after the step |
//! |---|---|---|---|
//! | ZeRO-0 | everywhere | every rank, all of it | are there |
//! | ZeRO-1 | everywhere, a rank's segment is right | a rank its segment | are gathered |
//! | ZeRO-2 | a rank's segment | a rank its segment | are gathered |
//! | ZeRO-3 | a rank's segment | a rank its segment | a rank's segment |
//!
//! Segments are those of all ranks, or of fewer ([`DdpOptions::shard_ranks`](crate::DdpOptions::shard_ranks)): then each group of so many ranks
//! has everything once, gradients are reduced over all ranks as without sharding, and parameters are gathered inside the group.
//!
//! Ranks of one machine that share memory have the segments of a ZeRO-3 bucket side by side in one memory that all of them see:
//! nothing need be gathered there, only nobody may write while others read.
//!
//! Source: Rajbhandari et al. 2020, "ZeRO: Memory Optimizations Toward Training Trillion Parameter Models".

pub(crate) mod access;
pub(crate) mod gather;
mod trace;

use std::ops::Range;

use phalanx_comm::{Group, Work};
use tch::{Device, Kind};

use crate::store::flat::{Flat, Scale};
use crate::store::plan::Bucket;
use crate::store::{norm, Held};
use crate::{shim, Result, Zero};

/// Who holds what, when.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[expect(clippy::struct_excessive_bools, reason = "facts that have nothing to do with each other")]
pub(crate) struct Sharding {
    zero: Zero,
    /// Of the ranks that have everything once together, which this one is, and how many there are.
    rank: usize,
    ranks: usize,
    /// Whether there are more ranks than those.
    is_replicated: bool,
    /// Whether ranks see each other's memory, and the model is in it.
    shares_memory: bool,
}

impl Sharding {
    /// `group` has all ranks, `within` those that have everything once, if they are fewer. Collective.
    pub(crate) fn new(
        zero: Zero,
        (group, within): (&mut Group, Option<&Group>),
        device: Device,
    ) -> Result<Self> {
        let ranks = within.unwrap_or(group);
        let (rank, count) = (ranks.rank(), ranks.world_size());
        let mut shares_memory = ranks.shares_memory() && device == Device::Cpu;
        if within.is_some() {
            // Some parts may be on one machine and some not: all do alike.
            let told =
                group.tagged("who shares memory").all_gather_bytes(&[shares_memory.into()])?;
            shares_memory = told.iter().all(|of_rank| *of_rank == [1]);
        }
        let is_replicated = count < group.world_size();
        Ok(Self { zero, rank, ranks: count, is_replicated, shares_memory })
    }

    /// Whether parameters are gathered when an operation needs them.
    pub(crate) fn gathers_on_access(self) -> bool {
        self.zero == Zero::Three && !self.shares_memory
    }

    /// Whether a rank has only its segments of parameters, or ranks have them together.
    pub(crate) fn shards_parameters(self) -> bool {
        self.zero == Zero::Three
    }

    /// Whether all ranks have one memory for parameters.
    fn shares_parameters(self) -> bool {
        self.zero == Zero::Three && self.shares_memory
    }

    /// Into how many parts the optimizer's state is cut.
    pub(crate) fn parts(self) -> usize {
        match self.zero {
            Zero::Off => 1,
            _ => self.ranks,
        }
    }

    /// Which of them this rank has.
    fn part(self) -> usize {
        match self.zero {
            Zero::Off => 0,
            _ => self.rank,
        }
    }

    /// What this rank updates of a bucket: elements of its storage.
    pub(crate) fn segment(self, bucket: &Bucket) -> Range<usize> {
        bucket.segment(self.part(), self.parts())
    }

    /// Whether only this library's optimizer can step on exchanged gradients.
    pub(crate) fn needs_our_optimizer(self) -> bool {
        self.zero != Zero::Off
    }

    /// Whether every rank has memory for all gradients; else for its segments, and gradients stay where libtorch made
    /// them until their bucket is exchanged.
    pub(crate) fn has_whole_gradients(self) -> bool {
        matches!(self.zero, Zero::Off | Zero::One)
    }

    /// Whether everything may be laid anew while there are gradients.
    pub(crate) fn can_be_laid_anew(self) -> bool {
        self.has_whole_gradients()
    }

    /// Memory for a bucket's gradients between steps.
    pub(crate) fn gradient_memory(
        self,
        group: &mut Group,
        kind: Kind,
        device: Device,
        bucket: &Bucket,
    ) -> Result<Held> {
        if self.has_whole_gradients() {
            let whole = Flat::registered(group, kind, device, bucket.range.len())?;
            return Ok(Held::Whole(whole));
        }
        Ok(Held::Segment(Flat::private(kind, device, self.segment(bucket).len())?))
    }

    /// Memory for a bucket's parameters: the group's where they are gathered in it.
    pub(crate) fn parameter_memory(
        self,
        group: &mut Group,
        kind: Kind,
        device: Device,
        bucket: &Bucket,
    ) -> Result<Held> {
        let len = bucket.range.len();
        Ok(match self.zero {
            Zero::Off => Held::Whole(Flat::private(kind, device, len)?),
            Zero::One | Zero::Two => Held::Whole(Flat::registered(group, kind, device, len)?),
            Zero::Three if self.shares_memory => Held::Whole(Flat::shared(group, kind, len)?),
            Zero::Three => Held::Segment(Flat::private(kind, device, self.segment(bucket).len())?),
        })
    }

    /// Where parameters are shared: every rank has come here, so none reads them any more. Collective.
    pub(crate) fn await_readers(self, group: &mut Group) -> Result<()> {
        if self.shares_parameters() {
            group.tagged("parameters that are shared, before the step").barrier()?.wait()?;
        }
        Ok(())
    }

    /// Parameters were written on every rank: where they are shared, nobody goes on before all have. Collective.
    pub(crate) fn settled(self, group: &mut Group) -> Result<()> {
        if self.shares_parameters() {
            group.tagged("parameters that are shared").barrier()?.wait()?;
        }
        Ok(())
    }

    /// Starts the exchange of a bucket of gradients; `to_all` every rank gets all of it.
    pub(crate) fn reduce(
        self,
        group: &mut Group,
        gradients: &Flat,
        range: Range<usize>,
        (scale, to_all): (Scale, bool),
    ) -> Result<Work<'static>> {
        if to_all {
            return gradients.all_reduce(group, range, scale);
        }
        gradients.reduce_scatter(group, range, scale)
    }

    /// What a rank sends at least, when a bucket of so many bytes is reduced plainly.
    pub(crate) fn bytes_sent(self, bytes: usize, (world_size, to_all): (usize, bool)) -> u64 {
        let share = (bytes - bytes / world_size) as u64;
        share * if to_all { 2 } else { 1 }
    }

    /// Whether every rank gets all of a bucket of gradients.
    pub(crate) fn reduces_to_all(self) -> bool {
        self.zero == Zero::Off || self.is_replicated
    }

    /// Starts what brings a bucket's updated parameters to all ranks, where they are not there already.
    pub(crate) fn gather(
        self,
        group: &mut Group,
        parameters: &Flat,
        (index, range): (usize, Range<usize>),
    ) -> Result<Option<Work<'static>>> {
        if matches!(self.zero, Zero::Off | Zero::Three) {
            return Ok(None);
        }
        let stream = shim::current_stream(parameters.device())?;
        group.set_stream(stream);
        group.tagged(&format!("parameters of bucket {index}"));
        Ok(Some(parameters.all_gather(group, range)?))
    }

    /// The values of sums of which this rank has what its segments give. Collective under ZeRO.
    pub(crate) fn over_ranks(self, group: &mut Group, own: norm::Own) -> Result<Vec<f64>> {
        Ok(self.summed(group, own)?.values())
    }

    /// As [`over_ranks`](Self::over_ranks), exact still. Collective under ZeRO.
    pub(crate) fn summed(self, group: &mut Group, own: norm::Own) -> Result<norm::Own> {
        if self.parts() == 1 {
            return Ok(own);
        }
        norm::summed(group, own)
    }
}
