//! Weights that do not train, where parameters are sharded (ZeRO-3): a rank has its segments of them as it has of parameters,
//! in buckets of their own, without gradients, masters or state. Where ranks share no memory they are gathered when an
//! operation takes one, and go after.
//!
//! One that begins to train moves to the parameters' plan ([`Store::adopt`]). Its place stays empty, and a bucket that all
//! have left goes when the step is over: until then the graph may have views of it.

use std::collections::BTreeMap;
use std::ops::Range;

use tch::Device;

use super::gathering::sharing;
use super::model::{Named, KINDS};
use super::plan::{Caps, Extent, Plan};
use super::{flat, Held, Store};
use crate::shard::gather::{Described, Gatherer};
use crate::shim;
use crate::{DdpOptions, Result};

/// Where the weights lie that do not train.
#[derive(Debug)]
pub(super) struct Frozen {
    plan: Plan,
    /// By place: which variable lay there first.
    variables: Vec<usize>,
    /// By variable that lies here: its place.
    places: BTreeMap<usize, usize>,
    /// By bucket: what this rank has of it, until all have left it.
    homes: Vec<Option<Held>>,
    /// Who gathers them, where that is needed. Its buckets have the same numbers.
    gatherer: Option<Gatherer>,
}

/// Where a variable is kept.
#[derive(Debug)]
pub(crate) struct Home<'a> {
    /// The memory of its bucket.
    pub(crate) memory: &'a Held,
    /// Its elements of the bucket.
    pub(crate) range: Range<usize>,
    /// This rank's.
    pub(crate) segment: Range<usize>,
}

impl Frozen {
    /// Without weights yet.
    pub(super) fn new(device: Device, gathers: bool) -> Self {
        Self {
            plan: Plan { buckets: Vec::new(), places: Vec::new(), storage_lens: Vec::new() },
            variables: Vec::new(),
            places: BTreeMap::new(),
            homes: Vec::new(),
            gatherer: gathers.then(|| Gatherer::new(device, None)),
        }
    }

    /// What this rank keeps of them, in bytes.
    pub(super) fn bytes(&self) -> usize {
        self.homes.iter().flatten().map(Held::bytes).sum()
    }

    /// Who gathers them.
    pub(super) fn gatherer(&mut self) -> Option<&mut Gatherer> {
        self.gatherer.as_mut()
    }

    /// Bytes of the buffers in which they are gathered.
    pub(super) fn gathered_bytes(&self) -> usize {
        self.gatherer.as_ref().map_or(0, Gatherer::bytes)
    }

    /// What operations know the one by that gathers them.
    pub(super) fn gatherer_id(&self) -> Option<u64> {
        self.gatherer.as_ref().map(Gatherer::id)
    }

    /// Whether a bucket can be read.
    pub(super) fn is_here(&self, bucket: usize) -> bool {
        self.gatherer.as_ref().is_none_or(|gatherer| gatherer.is_here(bucket))
    }

    /// The bucket of a variable that lies here.
    pub(super) fn bucket_of(&self, variable: usize) -> Option<usize> {
        self.places.get(&variable).map(|&place| self.plan.places[place].bucket)
    }

    /// A variable has moved to the parameters.
    fn leave(&mut self, variable: usize) {
        self.places.remove(&variable);
    }

    /// Buckets go that all have left.
    pub(super) fn release_empty(&mut self) -> Result<()> {
        for (index, bucket) in self.plan.buckets.iter().enumerate() {
            let is_left = |&place: &usize| !self.places.contains_key(&self.variables[place]);
            if self.homes[index].is_none() || !bucket.parameters.iter().all(is_left) {
                continue;
            }
            self.homes[index] = None;
            if let Some(gatherer) = &mut self.gatherer {
                gatherer.release(index)?;
            }
        }
        Ok(())
    }
}

impl Store {
    /// Lays weights that do not train and have no place yet, where parameters are sharded. Collective.
    pub(super) fn lay_frozen(&mut self, options: &DdpOptions) -> Result<()> {
        let known = &self.frozen.places;
        let is_new = |&variable: &usize| {
            self.model.slot(variable).is_none() && !known.contains_key(&variable)
        };
        let new: Vec<usize> = (0..self.model.variables.len()).filter(is_new).collect();
        if new.is_empty() || !self.sharding.shards_parameters() {
            return Ok(());
        }
        let later = self.planned_frozen(&new, options);
        let (first, from) = (self.frozen.variables.len(), self.frozen.homes.len());
        for bucket in &later.buckets {
            let group = sharing(&mut self.within, &mut self.group);
            let kind = KINDS[bucket.kind];
            let home = self.sharding.parameter_memory(group, kind, self.device, bucket)?;
            self.frozen.homes.push(Some(home));
        }
        self.frozen.plan.append(later);
        self.frozen.variables.extend(&new);
        self.gather_frozen(from, options)?;
        for (place, variable) in (first..).zip(new) {
            self.settle_frozen(place, variable)?;
            self.frozen.places.insert(variable, place);
        }
        self.settled()?;
        self.approve()
    }

    /// A plan of weights that do not train, by themselves.
    fn planned_frozen(&self, new: &[usize], options: &DdpOptions) -> Plan {
        let names = new.iter().filter_map(|&at| options.unit_of(&self.model.variables[at].name));
        let mut units: Vec<&str> = Vec::new();
        for unit in names {
            if !units.contains(&unit) {
                units.push(unit);
            }
        }
        let extent = |&variable: &usize| {
            let Named { name, tensor } = &self.model.variables[variable];
            let unit = options.unit_of(name);
            Extent {
                len: tensor.numel(),
                element_bytes: tensor.kind().elt_size_in_bytes(),
                kind: KINDS.iter().position(|&kind| kind == tensor.kind()).unwrap_or(0),
                unit: unit.and_then(|unit| units.iter().position(|other| *other == unit)),
            }
        };
        let extents: Vec<Extent> = new.iter().map(extent).collect();
        let order: Vec<usize> = (0..new.len()).collect();
        // Nothing is gained by a small first bucket: there is no exchange that could start early.
        let last = options.bucket_bytes.len() - 1;
        let bucket_bytes = &options.bucket_bytes[last..];
        Plan::new(&extents, &order, Caps { bucket_bytes, world_size: self.group.world_size() })
    }

    /// Buckets from the `from`th on are gathered when an operation needs them, where they are sharded so. Collective.
    fn gather_frozen(&mut self, from: usize, options: &DdpOptions) -> Result<()> {
        let Frozen { plan, variables, homes, gatherer, .. } = &mut self.frozen;
        let Some(gatherer) = gatherer else { return Ok(()) };
        let mut described = Vec::new();
        for (index, bucket) in plan.buckets.iter().enumerate().skip(from) {
            let Some(Held::Segment(home)) = &homes[index] else { continue };
            let first = bucket.parameters.first();
            let first = first.map(|&place| &self.model.variables[variables[place]].name);
            let unit = first.and_then(|name| options.unit_of(name));
            described.push(Described {
                kind: home.kind(),
                len: bucket.range.len(),
                segment: self.sharding.segment(bucket),
                home,
                name: match unit {
                    Some(unit) => format!("frozen weights of {unit}, bucket {index}"),
                    None => format!("frozen weights of bucket {index}"),
                },
                stays: unit.is_some_and(|unit| options.stays_gathered(unit)),
            });
        }
        gatherer.add(sharing(&mut self.within, &mut self.group), described)
    }

    /// Copies a variable to its place and makes it point there.
    fn settle_frozen(&mut self, place: usize, variable: usize) -> Result<()> {
        let Frozen { plan, homes, gatherer, .. } = &mut self.frozen;
        let place = &plan.places[place];
        let Named { name, tensor } = &self.model.variables[variable];
        let strides = flat::dense_strides(name, tensor)?;
        match (&homes[place.bucket], gatherer) {
            (Some(Held::Whole(whole)), _) => {
                let mut data = whole.view(&place.range, &tensor.size(), &strides)?;
                tch::no_grad(|| data.f_copy_(tensor).map(drop))?;
                shim::set_data(tensor, &data)
            }
            (Some(Held::Segment(_)), Some(gatherer)) => {
                gatherer.settle(place.bucket, tensor, (&place.range, &strides))
            }
            _ => Ok(()),
        }
    }

    /// A variable that begins to train can be read, to be copied to its new place. Collective.
    pub(super) fn bring_frozen_of(&mut self, slot: usize) {
        let Some(bucket) = self.frozen.bucket_of(self.model.variable_of(slot)) else { return };
        if let Some(gatherer) = self.frozen.gatherer() {
            gatherer.bring(sharing(&mut self.within, &mut self.group), &[bucket]);
        }
    }

    /// A parameter lies with the others.
    pub(super) fn leave_frozen(&mut self, slot: usize) {
        self.frozen.leave(self.model.variable_of(slot));
    }

    /// Where a variable is kept, unless each rank has all of it for itself.
    pub(crate) fn home(&self, variable: usize) -> Option<Home<'_>> {
        if let Some(slot) = self.model.slot(variable) {
            let place = &self.plan.places[slot];
            let memory = &self.storages[place.storage].parameters;
            let segment = self.sharding.segment(&self.plan.buckets[place.bucket]);
            return Some(Home { memory, range: place.range.clone(), segment });
        }
        let place = &self.frozen.plan.places[*self.frozen.places.get(&variable)?];
        let memory = self.frozen.homes[place.bucket].as_ref()?;
        let segment = self.sharding.segment(&self.frozen.plan.buckets[place.bucket]);
        Some(Home { memory, range: place.range.clone(), segment })
    }
}
