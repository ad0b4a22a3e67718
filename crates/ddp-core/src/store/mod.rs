//! The store: a model, the plan of where its parameters and gradients lie, and the flat memory under both.
//!
//! The parameters of a bucket become views of one flat tensor, their gradients of another with the same layout, in memory
//! that the group registered. What is laid down stays where it is, with two exceptions: parameters that begin to train
//! later are laid behind the others ([`Store::adopt`]), and the whole is laid anew once, in the order
//! in which backward really makes gradients ready ([`Store::lay_anew`]). Where only a rank's segments of gradients are
//! kept, gradients stay where libtorch made them until their bucket is exchanged, in a buffer of a [`Pool`].

pub(crate) mod agree;
pub(crate) mod broadcast;
mod device_norm;
pub(crate) mod exact;
pub(crate) mod flat;
mod frozen;
mod gathering;
mod held;
mod meeting;
pub(crate) mod model;
pub(crate) mod norm;
pub mod plan;
pub(crate) mod pool;

use phalanx_comm::Group;
use tch::{Device, Kind, Tensor};

use crate::part::Part;
use crate::shard::gather::Gatherer;
use crate::shard::Sharding;
use crate::shim::{self, Variable};
use crate::{DdpOptions, Error, Result};
use flat::Flat;
use frozen::Frozen;
pub(crate) use frozen::Home;
use gathering::sharing;
use held::Sums;
pub(crate) use held::{Held, Storage};
use model::Model;
use plan::{Bucket, Caps, Extent, Plan};
use pool::Pool;

/// By how much sooner, as [`Plan::lateness`] counts, buckets must start to be worth a new layout.
const WORTHWHILE: f64 = 0.02;

/// A model and its flat memory.
#[derive(Debug)]
#[expect(
    clippy::struct_excessive_bools,
    reason = "two facts that have nothing to do with each other"
)]
pub(crate) struct Store {
    pub(crate) group: Group,
    /// The ranks that have everything once together, if they are not all.
    within: Option<Group>,
    pub(crate) model: Model,
    pub(crate) plan: Plan,
    pub(crate) storages: Vec<Storage>,
    pub(crate) sharding: Sharding,
    /// By parameter: where its gradient goes; empty where gradients stay where they are until they are exchanged.
    views: Vec<Tensor>,
    /// Buffers for the exchange of gradients that stay where they are.
    pub(crate) pool: Pool,
    /// Who gathers parameters when an operation needs them.
    gatherer: Option<Gatherer>,
    /// Weights that do not train, where they are sharded.
    frozen: Frozen,
    /// Whether ranks meet before what they do together: they may run different operations, and parameters are gathered.
    meets: bool,
    /// By variable: what it was when it was last looked at with approval.
    expected: Vec<Variable>,
    /// Counts the plans: who keeps something by place looks whether it is still that one.
    pub(crate) layout: u64,
    /// How often weights were loaded that no variable counts as a change of its own.
    pub(crate) renewals: u64,
    /// Who of this library steps on the gradients, and how.
    pub(crate) optimizer: Attached,
    device: Device,
    /// Whether ranks train by themselves, so that a step sends nothing.
    pub(crate) trains_locally: bool,
    /// Where the model is a part of a larger one.
    pub(crate) part: Option<Part>,
}

/// Bytes of a rank's flat memory, without what its optimizer keeps. What ranks share counts on each of them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Memory {
    /// Parameters that are kept between steps.
    pub parameters: usize,
    /// Weights that do not train, where they are sharded ([`Zero::Three`](crate::Zero::Three)).
    pub frozen: usize,
    /// Gradients that are kept between steps.
    pub gradients: usize,
    /// Buffers in which gradients are exchanged and parameters gathered.
    pub exchange: usize,
}

/// What a store knows of this library's optimizers.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct Attached {
    /// How many there are.
    pub(crate) count: usize,
    /// Steps made.
    pub(crate) steps: u64,
    /// Learning rate of the last one.
    pub(crate) lr: f64,
    /// A hash of what else the steps were made with.
    pub(crate) settings: u32,
}

impl Store {
    /// Lays `model` flat. Collective.
    pub(crate) fn new(
        (mut group, within): (Group, Option<Group>),
        (model, device): (Model, Device),
        options: &DdpOptions,
    ) -> Result<Self> {
        let sharding = Sharding::new(options.zero, (&mut group, within.as_ref()), device)?;
        let plan = Plan { buckets: Vec::new(), places: Vec::new(), storage_lens: Vec::new() };
        let expected = model.states()?;
        let gathers = sharding.gathers_on_access();
        let mut store = Self {
            group,
            within,
            model,
            plan,
            storages: Vec::new(),
            sharding,
            views: Vec::new(),
            pool: Pool::default(),
            gatherer: gathers.then(|| Gatherer::new(device, None)),
            frozen: Frozen::new(device, gathers),
            meets: false,
            expected,
            layout: 0,
            renewals: 0,
            optimizer: Attached::default(),
            device,
            trains_locally: false,
            part: None,
        };
        let order = store.initial_order(options)?;
        store.lay(&order, options)?;
        store.lay_frozen(options)?;
        store.fit_pool(options)?;
        Ok(store)
    }

    /// Takes in what was added to a model that is built piece by piece. Collective.
    pub(crate) fn extend(&mut self, added: Model, options: &DdpOptions) -> Result<()> {
        let before = self.model.extend(added);
        let count = self.model.parameters().len() - before;
        if count > 0 {
            let order: Vec<usize> = (0..count).rev().collect();
            self.lay(&order, options)?;
        }
        self.lay_frozen(options)?;
        self.approve()
    }

    /// The model is complete: what was built first becomes ready last. Collective.
    pub(crate) fn complete(&mut self, options: &DdpOptions) -> Result<()> {
        self.plan.reverse();
        self.storages.reverse();
        self.layout += 1;
        match &options.ready_order {
            Some(names) => self.lay_in_order(names, options),
            None => self.fit_pool(options),
        }
    }

    /// The order of an earlier run if there is one, else the reverse of registration.
    fn initial_order(&self, options: &DdpOptions) -> Result<Vec<usize>> {
        match &options.ready_order {
            None => Ok((0..self.model.parameters().len()).rev().collect()),
            Some(names) => self.order_of(names),
        }
    }

    /// Parameters as `names` has them, and the others behind, in the reverse of registration.
    fn order_of(&self, names: &[String]) -> Result<Vec<usize>> {
        let reverse = (0..self.model.parameters().len()).rev();
        let mut order = Vec::with_capacity(reverse.len());
        for name in names {
            let at = self.model.parameters().position(|named| named.name == *name);
            match at.filter(|at| !order.contains(at)) {
                Some(at) => order.push(at),
                None => {
                    let (setting, value) = ("ready_order", name.clone());
                    let expected = "names of parameters that train, each once";
                    return Err(Error::BadSetting { setting, value, expected });
                }
            }
        }
        let rest: Vec<usize> = reverse.filter(|at| !order.contains(at)).collect();
        order.extend(rest);
        Ok(order)
    }

    /// Lays the parameters that have no place yet behind those that have, in `order` of their numbers from
    /// the first new one on.
    fn lay(&mut self, order: &[usize], options: &DdpOptions) -> Result<()> {
        let first = self.plan.places.len();
        let later = self.planned(first, order, options);
        let storages = self.allocate(&later, options)?;
        let from = self.storages.len();
        self.plan.append(later);
        self.storages.extend(storages);
        self.add_gathered(from, options)?;
        let count = self.model.parameters().len();
        for index in first..count {
            self.bring_frozen_of(index); // where it was frozen until now
            self.settle(index)?; // a gradient that is there already goes to its view with its hook
        }
        (first..count).for_each(|index| self.leave_frozen(index));
        self.settled()?;
        self.layout += 1;
        self.approve()
    }

    /// Buffers for all buckets, where they are exchanged in such. Collective.
    fn fit_pool(&mut self, options: &DdpOptions) -> Result<()> {
        if self.sharding.has_whole_gradients() {
            return Ok(());
        }
        let size = |bucket: &Bucket| {
            let kind = self.storages[bucket.storage].parameters.kind();
            (options.gradients_of(kind), bucket.range.len())
        };
        let sizes: Vec<(Kind, usize)> = self.plan.buckets.iter().map(size).collect();
        self.pool = Pool::default(); // the old buffers go first
        self.pool = Pool::new(&mut self.group, self.device, &sizes)?;
        Ok(())
    }

    /// Memory for a plan. Collective.
    fn allocate(&mut self, plan: &Plan, options: &DdpOptions) -> Result<Vec<Storage>> {
        let mut storages = Vec::with_capacity(plan.buckets.len());
        for bucket in &plan.buckets {
            let device = self.device;
            let kind = model::KINDS[bucket.kind];
            let gradients = options.gradients_of(kind);
            let all = &mut self.group;
            let gradients = self.sharding.gradient_memory(all, gradients, device, bucket)?;
            let group = sharing(&mut self.within, &mut self.group);
            let parameters = self.sharding.parameter_memory(group, kind, device, bucket)?;
            let sums = Sums::default();
            storages.push(Storage { parameters, gradients, sums, unrounded: None, gathered: 0 });
        }
        Ok(storages)
    }

    /// Copies parameter `index` to its place and makes it, and the view of its gradient, point there.
    fn settle(&mut self, index: usize) -> Result<()> {
        let place = &self.plan.places[index];
        let named = self.model.parameter(index);
        let strides = flat::dense_strides(&named.name, &named.tensor)?;
        let shape = named.tensor.size();
        if self.storages[place.storage].parameters.kind() != named.tensor.kind() {
            let segment = self.sharding.segment(&self.plan.buckets[place.bucket]);
            let values = flat::elements_of(&named.tensor)?;
            self.storages[place.storage].keep_unrounded(&values, &place.range, &segment)?;
        }
        let storage = &self.storages[place.storage];
        match &storage.parameters {
            Held::Whole(parameters) => {
                let mut data = parameters.view(&place.range, &shape, &strides)?;
                tch::no_grad(|| data.f_copy_(&named.tensor).map(drop))?;
                shim::set_data(&named.tensor, &data)?;
            }
            Held::Segment(_) => {
                let Some(gatherer) = &mut self.gatherer else { return Ok(()) };
                let number = storage.gathered;
                gatherer.settle(number, &named.tensor, (&place.range, &strides))?;
            }
        }
        let Held::Whole(gradients) = &storage.gradients else { return Ok(()) };
        // Detached: optimizers call detach_() on gradients, which libtorch refuses for views it tracks.
        let view = gradients.view(&place.range, &shape, &strides)?.f_detach()?;
        match self.views.get_mut(index) {
            Some(present) => *present = view,
            None => self.views.push(view),
        }
        Ok(())
    }

    /// A plan of the parameters from `first` on, by themselves.
    fn planned(&self, first: usize, order: &[usize], options: &DdpOptions) -> Plan {
        let units = self.units(options);
        let unit_of = |name: &str| {
            let unit = options.unit_of(name)?;
            units.iter().position(|other| *other == unit)
        };
        let extent = |named: &model::Named| {
            let kind = options.parameters_of(named.tensor.kind());
            Extent {
                len: named.tensor.numel(),
                element_bytes: options.gradients_of(kind).elt_size_in_bytes(),
                kind: model::KINDS.iter().position(|&other| other == kind).unwrap_or(0),
                unit: unit_of(&named.name),
            }
        };
        let extents: Vec<Extent> = self.model.parameters().skip(first).map(extent).collect();
        let world_size = self.group.world_size();
        Plan::new(&extents, order, Caps { bucket_bytes: &options.bucket_bytes, world_size })
    }

    /// The names of the units, in the order of their first parameters.
    fn units<'a>(&'a self, options: &DdpOptions) -> Vec<&'a str> {
        let mut units = Vec::new();
        for unit in self.model.parameters().filter_map(|named| options.unit_of(&named.name)) {
            if !units.contains(&unit) {
                units.push(unit);
            }
        }
        units
    }

    /// Gives places to variables that train and have none. Collective: where there are any, the ranks
    /// compare them first.
    pub(crate) fn adopt(&mut self, options: &DdpOptions) -> Result<()> {
        let before = self.model.lay_trained();
        let count = self.model.parameters().len() - before;
        if count == 0 {
            return Ok(());
        }
        let order: Vec<usize> = (0..count).rev().collect();
        self.lay(&order, options)?;
        self.fit_pool(options)
    }

    /// Lays everything anew in `order`, if buckets start sooner then: see [`Store::replace`]. Collective.
    pub(crate) fn lay_anew(&mut self, order: &[usize], options: &DdpOptions) -> Result<bool> {
        let plan = self.planned(0, order, options);
        if self.plan.lateness(order) - plan.lateness(order) < WORTHWHILE {
            return Ok(false);
        }
        self.replace(plan, options)?;
        Ok(true)
    }

    /// Lays everything as an earlier run had it, by its parameters' names: see [`Store::replace`]. Collective.
    pub(crate) fn lay_in_order(&mut self, names: &[String], options: &DdpOptions) -> Result<()> {
        let plan = self.planned(0, &self.order_of(names)?, options);
        if plan == self.plan {
            return Ok(());
        }
        self.replace(plan, options)
    }

    /// Moves everything to where `plan` has it. Gradients that are in their views stay what they are; what
    /// the optimizer keeps by place is void. Needs room for a second copy of parameters and gradients meanwhile.
    fn replace(&mut self, plan: Plan, options: &DdpOptions) -> Result<()> {
        let count = self.plan.places.len();
        let mut kept = Vec::with_capacity(self.views.len());
        for (index, view) in self.views.iter().enumerate() {
            let variable = &self.model.parameter(index).tensor;
            kept.push(shim::gradient_place(variable, view)? == shim::GradientPlace::InView);
        }
        let storages = self.allocate(&plan, options)?;
        let old_views: Vec<Tensor> = self.views.iter().map(Tensor::shallow_clone).collect();
        let old_plan = std::mem::replace(&mut self.plan, plan);
        let old_places = &old_plan.places;
        let mut old = std::mem::replace(&mut self.storages, storages);
        self.fit_pool(options)?;
        let mut old_gatherer = self.gatherer.take();
        let id = old_gatherer.as_ref().map(Gatherer::id);
        self.gatherer = id.map(|id| Gatherer::new(self.device, Some(id)));
        self.add_gathered(0, options)?;
        for index in 0..count {
            if let Some(old_gatherer) = &mut old_gatherer {
                let bucket = old[old_places[index].storage].gathered;
                let group = sharing(&mut self.within, &mut self.group);
                old_gatherer.bring(group, &[bucket]);
            }
            self.settle(index)?;
        }
        for (index, old_view) in old_views.iter().enumerate() {
            let view = &self.views[index];
            tch::no_grad(|| view.shallow_clone().f_copy_(old_view).map(drop))?;
            if kept[index] {
                shim::gradient_set(&self.model.parameter(index).tensor, Some(view))?;
            }
        }
        self.settled()?;
        self.carry_unrounded(&mut old, &old_plan)?;
        drop((old, old_gatherer));
        self.layout += 1;
        self.approve()
    }

    /// Where the gradient of parameter `index` goes at once; none where it stays where it is until its bucket is
    /// exchanged.
    pub(crate) fn view(&self, index: usize) -> Option<&Tensor> {
        self.views.get(index)
    }

    /// Zeroes the place of a gradient, if it has one.
    pub(crate) fn zero_view(&self, index: usize) -> Result<()> {
        let Some(view) = self.views.get(index) else { return Ok(()) };
        Ok(tch::no_grad(|| view.shallow_clone().f_zero_().map(drop))?)
    }

    /// Where the gradient of parameter `index` is now: its view, or where it stays.
    pub(crate) fn gradient(&self, index: usize) -> Result<Option<Tensor>> {
        if let Some(view) = self.views.get(index) {
            return Ok(Some(view.shallow_clone()));
        }
        let gradient = self.model.parameter(index).tensor.f_grad()?;
        Ok(gradient.defined().then_some(gradient))
    }

    /// Where parameter `index` lies in `memory` of its bucket's length.
    pub(crate) fn place_in(&self, memory: &Flat, index: usize) -> Result<Tensor> {
        let named = self.model.parameter(index);
        let strides = flat::dense_strides(&named.name, &named.tensor)?;
        let place = &self.plan.places[index].range;
        Ok(memory.view(place, &named.tensor.size(), &strides)?.f_detach()?)
    }

    /// Ends the groups, with this reason.
    pub(crate) fn abort(&mut self, reason: &str) {
        let groups = std::iter::once(&mut self.group).chain(&mut self.within);
        groups.for_each(|group| group.abort(reason));
        self.part.iter_mut().for_each(|part| part.abort(reason));
    }

    /// Where parameters and gradients are.
    pub(crate) fn device(&self) -> Device {
        self.device
    }

    /// Bytes of this rank's memory for parameters, gradients and their exchange.
    pub(crate) fn memory(&self) -> Memory {
        Memory {
            parameters: self.storages.iter().map(|storage| storage.parameters.bytes()).sum(),
            frozen: self.frozen.bytes(),
            gradients: self.storages.iter().map(Storage::gradient_bytes).sum(),
            exchange: self.pool.bytes()
                + self.gatherer.as_ref().map_or(0, Gatherer::bytes)
                + self.frozen.gathered_bytes(),
        }
    }

    /// By parameter: how often its gradient, where it is now, was changed in place.
    pub(crate) fn gradient_versions(&self) -> Result<Vec<u32>> {
        if !self.views.is_empty() {
            let views: Vec<&Tensor> = self.views.iter().collect();
            return Ok(shim::variables(&views)?.into_iter().map(|state| state.version).collect());
        }
        let mut versions = Vec::with_capacity(self.plan.places.len());
        for index in 0..self.plan.places.len() {
            let states = match &self.gradient(index)? {
                Some(gradient) => shim::variables(&[gradient])?,
                None => Vec::new(),
            };
            versions.push(states.first().map_or(0, |state| state.version));
        }
        Ok(versions)
    }

    /// What the variables are at this moment; an error if they are not what was wrapped.
    pub(crate) fn inspect(&self) -> Result<Vec<Variable>> {
        self.model.check_complete()?;
        let now = self.model.states()?;
        match self.model.moved(&now, &self.expected) {
            Some(report) => Err(Error::ModelChanged { report }),
            None => Ok(now),
        }
    }

    /// A few bytes of each parameter, to see whether somebody steps on them: libtorch's optimizers do not count
    /// their changes in place. On a GPU there are none.
    pub(crate) fn samples(&self) -> Vec<u32> {
        /// Evenly spread over a parameter, each of a word.
        const WORDS: usize = 16;
        if self.device.is_cuda() {
            return Vec::new();
        }
        let sample = |place: &plan::ParameterPlace| {
            let Some(whole) = self.storages[place.storage].parameters.whole() else { return 0 };
            let bytes = whole.bytes(&place.range);
            let stride = (bytes.len() / WORDS).next_multiple_of(8).max(8);
            bytes
                .chunks(stride)
                .fold(0, |hash, chunk| crc32c::crc32c_append(hash, &chunk[..chunk.len().min(8)]))
        };
        self.plan.places.iter().map(sample).collect()
    }

    /// Takes the variables as they are for what they should be.
    fn approve(&mut self) -> Result<()> {
        self.expected = self.model.states()?;
        Ok(())
    }

    /// Makes all gradients undefined, so that the next backward needs no zeroed memory.
    pub(crate) fn clear_gradients(&self) -> Result<()> {
        self.model.parameters().try_for_each(|named| shim::gradient_set(&named.tensor, None))
    }
}
