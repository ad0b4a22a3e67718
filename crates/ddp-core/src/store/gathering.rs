//! The parts of a store that need other ranks: gathering parameters, or their updates, among the
//! ranks that share one copy.

use std::ops::Range;
use std::time::Duration;

use phalanx_comm::{Group, Work};
use tch::Kind;

use super::flat::Flat;
use super::plan::Plan;
use super::{norm, Held, Storage, Store};
use crate::shard::gather::{Described, Gatherer};
use crate::{DdpOptions, Error, Result};

impl Store {
    /// The ranks that have everything once together.
    pub(crate) fn sharers(&mut self) -> &mut Group {
        sharing(&mut self.within, &mut self.group)
    }

    /// Every rank has written its parameters: see [`Sharding::settled`]. Collective.
    pub(crate) fn settled(&mut self) -> Result<()> {
        self.sharding.settled(sharing(&mut self.within, &mut self.group))
    }

    /// Nobody reads parameters any more: see [`Sharding::await_readers`]. Collective.
    pub(crate) fn await_readers(&mut self) -> Result<()> {
        self.sharding.await_readers(sharing(&mut self.within, &mut self.group))
    }

    /// The values of what this rank has a part of: see [`Sharding::over_ranks`]. Collective.
    pub(crate) fn over_ranks(&mut self, own: norm::Own) -> Result<Vec<f64>> {
        self.sharding.over_ranks(sharing(&mut self.within, &mut self.group), own)
    }

    /// As [`over_ranks`](Self::over_ranks), exact still. Collective.
    pub(crate) fn summed(&mut self, own: norm::Own) -> Result<norm::Own> {
        self.sharding.summed(sharing(&mut self.within, &mut self.group), own)
    }

    /// Starts to gather a bucket's updated parameters, where they are not everywhere. Collective.
    pub(crate) fn gather(&mut self, bucket: usize) -> Result<Option<Work<'static>>> {
        let planned = &self.plan.buckets[bucket];
        let Some(parameters) = self.storages[planned.storage].parameters.whole() else {
            return Ok(None);
        };
        let group = sharing(&mut self.within, &mut self.group);
        self.sharding.gather(group, parameters, (bucket, planned.range.clone()))
    }

    /// Every rank has written its segments of the parameters: they come to all that hold more, and what was gathered before goes.
    /// Collective.
    pub(crate) fn gather_all(&mut self) -> Result<()> {
        let mut works = Vec::new();
        for bucket in 0..self.plan.buckets.len() {
            works.extend(self.gather(bucket)?);
        }
        works.into_iter().try_for_each(|work| Ok::<(), Error>(work.wait()?))?;
        self.settled()?;
        self.forget_gathered().map(drop)
    }

    /// As [`gather_all`](Self::gather_all), of weights that were loaded: masters follow. Collective.
    pub(crate) fn renew(&mut self) -> Result<()> {
        self.renewals += 1;
        self.gather_all()
    }

    /// Buckets from the `from`th on are gathered when an operation needs them, where they are sharded so. Collective.
    pub(super) fn add_gathered(&mut self, from: usize, options: &DdpOptions) -> Result<()> {
        let Some(mut gatherer) = self.gatherer.take() else { return Ok(()) };
        let mut described = Vec::new();
        for (index, storage) in self.storages.iter_mut().enumerate().skip(from) {
            storage.gathered = gatherer.bucket_count() + index - from;
        }
        for (index, bucket) in self.plan.buckets.iter().enumerate().skip(from) {
            let Held::Segment(home) = &self.storages[bucket.storage].parameters else { continue };
            let first = bucket.parameters.first().map(|&slot| &self.model.parameter(slot).name);
            let unit = first.and_then(|name| options.unit_of(name));
            described.push(Described {
                kind: home.kind(),
                len: bucket.range.len(),
                segment: self.sharding.segment(bucket),
                home,
                name: match unit {
                    Some(unit) => format!("parameters of {unit}, bucket {index}"),
                    None => format!("parameters of bucket {index}"),
                },
                stays: unit.is_some_and(|unit| options.stays_gathered(unit)),
            });
        }
        gatherer.add(sharing(&mut self.within, &mut self.group), described)?;
        self.gatherer = Some(gatherer);
        Ok(())
    }

    /// The bucket of a variable of which this rank has only its segments: parameters' first, then those of what does not train.
    pub(crate) fn cut_bucket(&self, variable: usize) -> Option<usize> {
        if !self.is_cut(variable) {
            return None;
        }
        match self.model.slot(variable) {
            Some(slot) => Some(self.plan.places[slot].bucket),
            None => self.frozen.bucket_of(variable).map(|bucket| self.plan.buckets.len() + bucket),
        }
    }

    /// A bucket with a number as [`cut_bucket`](Self::cut_bucket) says it is to be here. Collective.
    pub(crate) fn bring_bucket(&mut self, bucket: usize) {
        let count = self.plan.buckets.len();
        match bucket.checked_sub(count) {
            None => self.bring(false, &[self.storages[bucket].gathered]),
            Some(frozen) => self.bring(true, &[frozen]),
        }
    }

    /// Whether a bucket with such a number can be read.
    pub(crate) fn is_here(&self, bucket: usize) -> bool {
        if let Some(frozen) = bucket.checked_sub(self.plan.buckets.len()) {
            return self.frozen.is_here(frozen);
        }
        let number = self.storages[bucket].gathered;
        self.gatherer.as_ref().is_none_or(|gatherer| gatherer.is_here(number))
    }

    /// Buckets are to be here, by their gatherer's numbers: of what does not train, or of parameters. Collective.
    pub(super) fn bring(&mut self, are_frozen: bool, buckets: &[usize]) {
        let gatherer = if are_frozen { self.frozen.gatherer() } else { self.gatherer.as_mut() };
        if let Some(gatherer) = gatherer {
            gatherer.bring(sharing(&mut self.within, &mut self.group), buckets);
        }
    }

    /// Zeroed memory for this rank's segments of parameters in half precision as they are before they are rounded, by storage.
    pub(crate) fn new_unrounded(&self) -> Result<Vec<Option<Flat>>> {
        let mut flats: Vec<Option<Flat>> = self.storages.iter().map(|_| None).collect();
        for bucket in &self.plan.buckets {
            let kind = self.storages[bucket.storage].parameters.kind();
            if matches!(kind, Kind::Half | Kind::BFloat16) {
                let len = self.sharding.segment(bucket).len();
                flats[bucket.storage] = Some(Flat::private(Kind::Float, self.device, len)?);
            }
        }
        Ok(flats)
    }

    /// What parameters are before they are rounded, by storage, where it is known.
    pub(crate) fn keep_unrounded(&mut self, flats: Vec<Option<Flat>>) {
        for (storage, flat) in self.storages.iter_mut().zip(flats) {
            storage.unrounded = flat;
        }
    }

    /// An optimizer has stepped: what parameters were before is of no account any more.
    pub(crate) fn forget_unrounded(&mut self) {
        self.storages.iter_mut().for_each(|storage| storage.unrounded = None);
    }

    /// Brings what parameters were before they were rounded from an earlier plan to the present one. Collective.
    pub(super) fn carry_unrounded(&mut self, old: &mut [Storage], plan: &Plan) -> Result<()> {
        for bucket in &plan.buckets {
            let Some(own) = old[bucket.storage].unrounded.take() else { continue };
            let (segment, len) = (self.sharding.segment(bucket), bucket.range.len());
            let whole =
                if segment.len() == len { own } else { self.whole_of(&own, &segment, len)? };
            for &slot in &bucket.parameters {
                let values = whole.range(&plan.places[slot].range)?;
                let place = &self.plan.places[slot];
                let own_now = self.sharding.segment(&self.plan.buckets[place.bucket]);
                self.storages[place.storage].keep_unrounded(&values, &place.range, &own_now)?;
            }
        }
        Ok(())
    }

    /// All `len` elements of what this rank has a segment of. Collective.
    fn whole_of(&mut self, own: &Flat, segment: &Range<usize>, len: usize) -> Result<Flat> {
        let device = self.device;
        let group = self.sharers();
        let whole = Flat::registered(group, own.kind(), device, len)?;
        let values = own.range(&(0..own.len()))?;
        tch::no_grad(|| whole.range(segment)?.f_copy_(&values).map_err(Error::from))?;
        whole.all_gather(group, 0..len)?.wait()?;
        Ok(whole)
    }

    /// The numbers of those who gather parameters and what does not train, if somebody does.
    pub(crate) fn gatherer_ids(&self) -> Vec<u64> {
        let ids = [self.gatherer.as_ref().map(Gatherer::id), self.frozen.gatherer_id()];
        ids.into_iter().flatten().collect()
    }

    /// Those who gather.
    pub(super) fn gatherers(&mut self) -> impl Iterator<Item = &mut Gatherer> {
        self.gatherer.iter_mut().chain(self.frozen.gatherer())
    }

    /// What the program wrote to parameters that were gathered counts from here on.
    pub(crate) fn heed_written(&mut self) -> Result<()> {
        self.gatherers().try_for_each(Gatherer::bring_all_home)
    }

    /// Parameters have changed where they are kept; says what operations waited for them since the last time.
    pub(crate) fn forget_gathered(&mut self) -> Result<Duration> {
        let mut waited = Duration::ZERO;
        for gatherer in self.gatherers() {
            gatherer.forget()?;
            waited += gatherer.take_waited();
        }
        self.frozen.release_empty()?;
        Ok(waited)
    }

    /// Whether this rank has only its segments of a variable.
    pub(crate) fn is_cut(&self, variable: usize) -> bool {
        self.home(variable).is_some_and(|home| matches!(home.memory, Held::Segment(_)))
    }
}

/// The ranks that have everything once together: `within`, or all.
pub(super) fn sharing<'a>(within: &'a mut Option<Group>, all: &'a mut Group) -> &'a mut Group {
    within.as_mut().unwrap_or(all)
}
