//! [`Ddp`]: a model that trains data-parallel.

use std::path::Path;
use std::sync::{Arc, Mutex};

use phalanx_comm::Group;
use tch::{nn, Device, Tensor};

use crate::checkpoint::WeightsOptions;
use crate::hooks::{Hook, Hooked, State};
use crate::reduce::statistics::Statistics;
use crate::reduce::{self, Asked, Reducer, Shared};
use crate::store::model::{Model, Source};
use crate::store::{agree, broadcast, Memory, Store};
use crate::{checkpoint, heap, shim, threads, DdpOptions, Error, Join, Result, Sync};

/// A model whose gradients are averaged over the ranks of a group, inside plain tch's own `backward`.
///
/// While it lives, every `loss.backward()` exchanges gradients, overlapped with the backward itself, from
/// the first step on; when it returns, `grad()` of every parameter is the mean over the ranks. Dropping it
/// ends that; the model stays usable, unless its parameters were gathered ([`Zero::Three`](crate::Zero::Three)).
///
/// It stays on the thread that made it, and so does the training: that is where backwards are seen. Parameters that are gathered
/// when they are needed are there on this thread alone; an operation of another one on them finds no memory.
///
/// # What may change
/// Parameters may be frozen and unfrozen between steps, on all ranks alike: frozen ones are left out, and
/// ones that were frozen when the model was wrapped are exchanged from their first gradient on. Everything
/// else has to stay what it was: variables that are added, converted or given other memory are an error of
/// the next backward, on every rank.
///
/// Other views of a parameter's memory (`detach()`, `tr()`) that were made before the first exchanged backward may be
/// stale after it: parameters are then laid anew, once, in the order in which gradients become ready. Make them when they are
/// needed, as `tch::nn` does.
///
/// # Determinism
/// Buckets are started by index, never by arrival, and the host backend sums in rank order: the same seed
/// and world size give the same bits.
///
/// # Example
/// ```
/// use phalanx_comm::{Group, GroupOptions};
/// use phalanx_ddp_core::{Ddp, DdpOptions};
/// use tch::{nn, nn::Module, nn::OptimizerConfig, Device, Kind, Tensor};
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let mut group = Group::single(GroupOptions::default())?; // or Group::from_environment
/// let vs = nn::VarStore::new(Device::Cpu);
/// let net = nn::linear(vs.root() / "fc", 4, 1, Default::default());
/// let _ddp = Ddp::new(&vs, &mut group, DdpOptions::default())?;
/// let mut opt = nn::Sgd::default().build(&vs, 0.1)?;
/// let x = Tensor::ones([8, 4], (Kind::Float, Device::Cpu));
/// let loss = net.forward(&x).square().mean(Kind::Float);
/// opt.backward_step(&loss); // gradients are averaged in here
/// # Ok(())
/// # }
/// ```
///
/// # Source
/// Li et al. 2020, "PyTorch Distributed"; `torch/nn/parallel/distributed.py`.
#[derive(Debug)]
pub struct Ddp {
    // Hooks go first: none may fire while the reducer is torn down.
    hooks: Vec<shim::Hook>,
    shared: Shared,
}

impl Ddp {
    /// Wraps the variables of `vs`. Collective.
    ///
    /// Compares names, shapes, strides and kinds across the ranks, lays parameters and gradients flat, and
    /// gives every rank the values of rank 0. Build the optimizer after it or before it, both work. The group is
    /// duplicated, so that the caller's own collectives never mix with these.
    ///
    /// # Errors
    /// [`Error::ModelMismatch`], the same on every rank, when the models differ; [`Error::NothingToTrain`] and
    /// [`Error::UnsupportedKind`] when they are alike in that; [`Error::DeviceMismatch`]; [`Error::NotDense`];
    /// [`Error::BadSetting`]; errors of the group.
    pub fn new(vs: &nn::VarStore, group: &mut Group, options: DdpOptions) -> Result<Self> {
        Self::build(Model::of_var_store(vs)?, group, options)
    }

    /// As [`Ddp::new`] for tensors by hand: `parameters` require gradients (or will, later) and come in the
    /// same order on every rank; `buffers` are not trained. Tensors that are added later cannot be seen.
    ///
    /// # Errors
    /// As [`Ddp::new`]; [`Error::SameTensorTwice`].
    pub fn from_tensors(
        parameters: Vec<(String, Tensor)>,
        buffers: Vec<(String, Tensor)>,
        group: &mut Group,
        options: DdpOptions,
    ) -> Result<Self> {
        Self::build(Model::of_tensors(parameters, buffers), group, options)
    }

    fn build(model: Model, group: &mut Group, options: DdpOptions) -> Result<Self> {
        threads::share(group);
        let mut group = group.duplicate()?;
        take_in(&mut group, &model, &options)?;
        if model.parameters().len() == 0 {
            return Err(Error::NothingToTrain);
        }
        let within = divided(&mut group, &options)?;
        let device = model.variables.first().map_or(Device::Cpu, |first| first.tensor.device());
        Self::over(Store::new((group, within), (model, device), &options)?, options)
    }

    fn over(store: Store, options: DdpOptions) -> Result<Self> {
        if options.keep_memory && store.device() == Device::Cpu {
            heap::keep();
        }
        let shared = Arc::new(Mutex::new(Reducer::new(store, options)?));
        let hooks = reduce::attach(&shared)?;
        Ok(Self { hooks, shared })
    }

    /// Wraps a model while it is built, piece by piece: see [`Building`]. Collective.
    ///
    /// # Errors
    /// As [`Ddp::new`].
    pub fn begin(vs: &nn::VarStore, group: &mut Group, options: DdpOptions) -> Result<Building> {
        threads::share(group);
        let mut group = group.duplicate()?;
        let nothing = Model::of_tensors(Vec::new(), Vec::new());
        take_in(&mut group, &nothing, &options)?;
        let within = divided(&mut group, &options)?;
        let store = Store::new((group, within), (nothing, vs.device()), &options)?;
        let mut building = Building { source: Model::source_of(vs), store, options };
        building.add()?;
        Ok(building)
    }

    /// Writes the weights as others exchange them: to a path that ends in `.safetensors` as one file, to any other as a folder
    /// with one or several and their index. Under ZeRO-3 no rank has more than a few buckets of them at once. Of [a part](Ddp::set_part) it is the
    /// whole model, of which rank 0 of the world has one whole tensor at a time. Collective, over the world then.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] or [`Error::Io`] where rank 0, which writes, cannot; errors of the group.
    pub fn save_weights(&self, path: &Path, options: &WeightsOptions) -> Result<()> {
        checkpoint::sharded::save(&mut *reduce::lock(&self.shared)?, path, options)
    }

    /// Runs `body`, in which backwards accumulate on this rank and exchange nothing (with
    /// [`shard_accumulation`](DdpOptions::shard_accumulation): add to the ranks' segments, in common). The next backward
    /// outside exchanges the sum.
    ///
    /// # Errors
    /// [`Error::Poisoned`].
    pub fn no_sync<T>(&self, body: impl FnOnce() -> T) -> Result<T> {
        struct Restore<'a>(&'a Shared, bool);
        impl Drop for Restore<'_> {
            fn drop(&mut self) {
                if let Ok(mut reducer) = self.0.lock() {
                    reducer.synchronising = self.1;
                }
            }
        }
        let before = std::mem::replace(&mut reduce::lock(&self.shared)?.synchronising, false);
        let restore = Restore(&self.shared, before);
        let value = body();
        drop(restore);
        Ok(value)
    }

    /// Backward of a *sum* of losses over `weight` samples or tokens; with [`Sync::Reduce`] the gradients
    /// become Σ gradients / Σ weights over all ranks and all micro-batches since the last exchange.
    ///
    /// This is exact also where ranks hold different numbers of tokens, which a mean of means is not. A loss
    /// that reaches several `Ddp`s of this thread is weighed alike in each of them.
    ///
    /// # Errors
    /// [`Error::BadSetting`] for a weight that is negative or not finite; [`Error::MissingGradients`],
    /// [`Error::NonFinite`] and the other errors of a backward; errors of libtorch and of the group.
    pub fn backward(&self, loss_sum: &Tensor, weight: f64, sync: Sync) -> Result<()> {
        if !weight.is_finite() || weight < 0.0 {
            let (setting, value) = ("weight", weight.to_string());
            return Err(Error::BadSetting { setting, value, expected: "a number ≥ 0" });
        }
        let reached = reduce::reachable(&self.shared);
        let asked = Asked { weight, sync: sync == Sync::Reduce };
        for shared in &reached {
            reduce::lock(shared)?.asked = Some(asked);
        }
        let outcome = loss_sum.f_backward();
        let mut failure = None;
        for shared in &reached {
            let mut reducer = reduce::lock(shared)?;
            reducer.asked = None;
            failure = failure.or(reducer.take_failure());
        }
        match (outcome, failure) {
            (_, Some(failure)) => Err(failure),
            (Err(error), None) => Err(error.into()),
            (Ok(()), None) => Ok(()),
        }
    }

    /// Exchanges without a backward: what this rank has accumulated since the last exchange, and zero for
    /// every parameter that has no gradient. It is the counterpart of the other ranks' plain `backward`, for a
    /// rank that has nothing to add in a step: its part of the mean is zero. Collective.
    ///
    /// # Errors
    /// As [`Ddp::backward`].
    pub fn exchange(&self) -> Result<()> {
        reduce::lock(&self.shared)?.exchange_now(false).map(drop)
    }

    /// As [`Ddp::exchange`], as the counterpart of the other ranks' [`Ddp::backward`] with [`Sync::Reduce`]: the
    /// weight is what this rank has accumulated, 0 if that is nothing, so the mean is over the others'
    /// samples. Collective.
    ///
    /// # Errors
    /// As [`Ddp::backward`].
    pub fn exchange_weighted(&self) -> Result<()> {
        reduce::lock(&self.shared)?.exchange_now(true).map(drop)
    }

    /// Tells the program's own number of the step (or batch) that comes next. The ranks compare it in
    /// the next exchange, so that a rank which left one out is told at once: `rank 1 is at "step 8, bucket
    /// 0", rank 0 at "step 7, bucket 0"`. A launcher that restarts ranks hears it, too.
    ///
    /// # Errors
    /// [`Error::Poisoned`].
    pub fn at_step(&self, step: u64) -> Result<()> {
        phalanx_comm::recorder::progress(step);
        reduce::lock(&self.shared)?.step = Some(step);
        Ok(())
    }

    /// From here on ranks may run out of batches at different times: see [`Join`]. On all ranks alike.
    ///
    /// # Errors
    /// [`Error::Poisoned`]; [`Error::BadSetting`] with [`shard_accumulation`](DdpOptions::shard_accumulation).
    pub fn join(&self) -> Result<Join<'_>> {
        Join::begin(&self.shared)
    }

    /// Turns the exchange of gradients off and on, to measure a step with and without it side by side.
    /// While it is off the ranks' models drift apart, and gradients of [`Ddp::backward`] stay sums: nothing divides
    /// them. On all ranks alike.
    ///
    /// # Errors
    /// [`Error::Poisoned`].
    pub fn set_exchange(&self, on: bool) -> Result<()> {
        reduce::lock(&self.shared)?.options.exchange = on;
        Ok(())
    }

    /// Exchanges gradients through a [`Hook`] from the next backward on: compressed, say. Between steps; collective.
    ///
    /// # Errors
    /// [`Error::RanksDiffer`] where another rank has another hook or other settings; [`Error::BadSetting`]; errors of the group.
    ///
    /// # Example
    /// ```
    /// # use phalanx_comm::{Group, GroupOptions};
    /// use phalanx_ddp_core::hooks::{ErrorFeedback, PowerSgd, PowerSgdOptions};
    /// # use phalanx_ddp_core::{Ddp, DdpOptions};
    /// # use tch::{nn, Device};
    /// # fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// # let mut group = Group::single(GroupOptions::default())?;
    /// # let vs = nn::VarStore::new(Device::Cpu);
    /// # let _net = nn::linear(vs.root() / "fc", 4, 1, Default::default());
    /// let ddp = Ddp::new(&vs, &mut group, DdpOptions::default())?;
    /// let compressed = PowerSgd::new(PowerSgdOptions { rank: 4, start_step: 100, ..Default::default() });
    /// ddp.set_hook(ErrorFeedback::around(compressed))?;
    /// # Ok(())
    /// # }
    /// ```
    pub fn set_hook(&self, hook: impl Hook) -> Result<()> {
        let mut reducer = reduce::lock(&self.shared)?;
        if reducer.options.shard_accumulation {
            let (setting, value) = ("shard_accumulation", "true".to_owned());
            let expected = "false beside a communication hook";
            return Err(Error::BadSetting { setting, value, expected });
        }
        let group = &mut reducer.store.group;
        agree::alike(group, "communication hook", "their communication hooks", &[hook.name()])?;
        hook.check()?;
        if hook.drifts() && group.rank() == 0 && group.world_size() > 1 {
            let name = hook.name();
            tracing::warn!(
                "with the hook {name} the ranks' models drift apart: for measurements alone"
            );
        }
        reducer.hooked = Some(Hooked::new(hook));
        Ok(())
    }

    /// What the hook must have to go on in another process, as far as this rank has it: a copy. [`Checkpointer`](crate::checkpoint::Checkpointer)
    /// saves it with the rest.
    ///
    /// # Errors
    /// [`Error::Poisoned`], libtorch's own.
    pub fn hook_state(&self) -> Result<State> {
        let reducer = reduce::lock(&self.shared)?;
        reducer
            .hooked
            .as_ref()
            .map_or_else(|| Ok(State::default()), |hooked| hooked.state()?.copied())
    }

    /// Goes on from what [`hook_state`](Self::hook_state) gave, with the same hook. On all ranks alike.
    ///
    /// # Errors
    /// [`Error::BadSetting`] for a state of something else; [`Error::Poisoned`].
    pub fn load_hook_state(&self, state: &State) -> Result<()> {
        let mut reducer = reduce::lock(&self.shared)?;
        reducer.hooked.as_mut().map_or(Ok(()), |hooked| hooked.load(state))
    }

    /// What the exchanges so far cost, and which ranks are slow. With models on a GPU the last exchange's
    /// times are the GPU's, and this waits until the GPU has finished that backward.
    ///
    /// # Errors
    /// [`Error::Poisoned`], or the GPU does not finish.
    pub fn statistics(&self) -> Result<Statistics> {
        reduce::lock(&self.shared)?.statistics()
    }

    /// Compares the parameters of all ranks, as happens by itself every
    /// [`fingerprint_interval`](DdpOptions::fingerprint_interval) exchanges. Collective.
    ///
    /// # Errors
    /// [`Error::ParametersDiffer`], the same on every rank; errors of the group.
    pub fn compare_parameters(&self) -> Result<()> {
        reduce::lock(&self.shared)?.compare_parameters()
    }

    /// The names of the parameters in the order in which backward makes their gradients ready, as the
    /// buckets have it: for [`DdpOptions::ready_order`] of a run that goes on where this one ends.
    ///
    /// # Errors
    /// [`Error::Poisoned`].
    pub fn ready_order(&self) -> Result<Vec<String>> {
        Ok(reduce::lock(&self.shared)?.ready_order())
    }

    /// Makes all gradients undefined, as an optimizer's `zero_grad` does, and forgets the weights that belong
    /// to them.
    ///
    /// # Errors
    /// [`Error::Poisoned`], libtorch's own.
    pub fn release_gradients(&self) -> Result<()> {
        reduce::lock(&self.shared)?.release_gradients()
    }

    /// What this rank's flat memory takes.
    ///
    /// # Errors
    /// [`Error::Poisoned`].
    pub fn memory(&self) -> Result<Memory> {
        Ok(reduce::lock(&self.shared)?.store.memory())
    }

    /// Ends this model's group: every rank that is in an exchange, or comes to one, gets an error with this reason. For a
    /// rank that fails between exchanges while others go on.
    ///
    /// # Errors
    /// [`Error::Poisoned`].
    pub fn abort(&self, reason: &str) -> Result<()> {
        reduce::lock(&self.shared)?.abort(reason);
        Ok(())
    }

    /// How many variables have hooks.
    #[must_use]
    pub fn variable_count(&self) -> usize {
        self.hooks.len()
    }

    pub(crate) fn shared(&self) -> &Shared {
        &self.shared
    }
}

impl Drop for Ddp {
    fn drop(&mut self) {
        reduce::detach(&self.shared);
    }
}

/// A model that is sharded while it is built, so that no rank ever has all of it.
///
/// After each layer [`add`](Self::add) takes in the variables that are new in the `VarStore`: they get rank 0's values, and under
/// ZeRO-3 a rank keeps its segments of them. [`Ddp::load_weights`] fills the model when it is complete.
///
/// # Example
/// ```
/// use phalanx_comm::{Group, GroupOptions};
/// use phalanx_ddp_core::{Ddp, DdpOptions, Zero};
/// use tch::{nn, Device};
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let mut group = Group::single(GroupOptions::default())?;
/// let vs = nn::VarStore::new(Device::Cpu);
/// let options = DdpOptions { zero: Zero::Three, ..DdpOptions::default() };
/// let mut building = Ddp::begin(&vs, &mut group, options)?;
/// let mut net = nn::seq();
/// for layer in 0..3 {
///     net = net.add(nn::linear(vs.root() / layer, 64, 64, Default::default()));
///     building.add()?; // the one line a layer
/// }
/// let ddp = building.finish()?;
/// assert_eq!(ddp.variable_count(), 6);
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct Building {
    source: Source,
    store: Store,
    options: DdpOptions,
}

impl Building {
    /// Takes in the variables that are new. Collective.
    ///
    /// # Errors
    /// As [`Ddp::new`].
    pub fn add(&mut self) -> Result<()> {
        let added = Model::of_source(&self.source)?.without(&self.store.model);
        take_in(&mut self.store.group, &added, &self.options)?;
        self.store.extend(added, &self.options)
    }

    /// The model is complete. Collective.
    ///
    /// # Errors
    /// As [`Ddp::new`].
    pub fn finish(mut self) -> Result<Ddp> {
        self.add()?;
        self.store.model.check()?;
        self.store.complete(&self.options)?;
        Ddp::over(self.store, self.options)
    }
}

/// The ranks that have everything once together, if they are not all. Collective.
fn divided(group: &mut Group, options: &DdpOptions) -> Result<Option<Group>> {
    let Some(ranks) = options.shard_ranks.filter(|&ranks| ranks < group.world_size()) else {
        return Ok(None);
    };
    let color = u32::try_from(group.rank() / ranks).unwrap_or(u32::MAX);
    Ok(group.split(Some(color), 0)?)
}

/// Compares a model, or a part of one, over the ranks, and gives all of them the values of rank 0. Collective.
fn take_in(group: &mut Group, model: &Model, options: &DdpOptions) -> Result<()> {
    let mut signature = vec![format!("{options:?}")];
    signature.extend(model.signature());
    agree::same_on_all_ranks(group, "model signature", &signature)?;
    // Only now: a rank that ended before it would leave the others to wonder.
    options.check(group.world_size())?;
    model.check()?;
    check_devices(model, group)?;
    for named in &model.variables {
        // From before: nobody else has them.
        shim::gradient_set(&named.tensor, None)?;
    }
    let sent: Vec<_> = model.variables.iter().chain(&model.buffers).collect();
    broadcast::tensors(group, "parameters and buffers", 0, &sent)?;
    // Those that train become it when they are laid.
    for named in model.variables.iter().filter(|named| !named.tensor.requires_grad()) {
        let (is, becomes) = (named.tensor.kind(), options.parameters_of(named.tensor.kind()));
        if is != becomes {
            shim::set_data(&named.tensor, &named.tensor.f_detach()?.f_to_kind(becomes)?)?;
        }
    }
    Ok(())
}

/// An error unless all variables are on the CPU, or on the GPU that the group's backend works on.
fn check_devices(model: &Model, group: &Group) -> Result<()> {
    let device = model.variables.first().map_or(Device::Cpu, |first| first.tensor.device());
    let served = match device {
        Device::Cpu => true,
        Device::Cuda(index) => group.device() == Some(index),
        _ => false,
    };
    let stray = model.variables.iter().find(|named| !served || named.tensor.device() != device);
    stray.map_or(Ok(()), |named| {
        Err(Error::DeviceMismatch {
            name: named.name.clone(),
            device: format!("{:?}", named.tensor.device()),
            expected: match group.device() {
                Some(index) => {
                    format!("Device::Cpu or Device::Cuda({index}), one for all parameters")
                }
                None => format!(
                    "Device::Cpu, where the group's backend `{}` works (GPUs need a group with \
                     Backend::Nccl, or with Backend::Mpi and GroupOptions::gpu_memory)",
                    group.backend()
                ),
            },
        })
    })
}
