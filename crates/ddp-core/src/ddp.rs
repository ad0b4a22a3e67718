//! [`Ddp`]: a model that trains data-parallel.

use phalanx_comm::Group;
use tch::{nn, Device, Tensor};

use crate::flat::{self, Flat};
use crate::parameter::{self, Model};
use crate::plan::{self, Caps, Extent, Plan};
use crate::reducer::{self, Parts, Reducer, Shared, StepTimes};
use crate::{broadcast, shim, verify, Error, Result};

use std::sync::{Arc, Mutex};

/// What of the training state is sharded over the ranks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Zero {
    /// Nothing: every rank reduces all gradients and updates all parameters.
    #[default]
    Off,
    /// Optimizer state (ZeRO-1): a rank reduces and updates its segment of every bucket, then the
    /// parameters are gathered. A rank's gradients hold the mean only in its own segments.
    One,
}

/// Settings of [`Ddp`]. The same on every rank.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[expect(
    clippy::struct_excessive_bools,
    reason = "two switches that have nothing to do with each other"
)]
pub struct DdpOptions {
    /// Bytes after which a bucket closes. Default 25 MiB.
    pub bucket_bytes_max: usize,
    /// Bytes after which the first bucket closes. Default 1 MiB.
    pub first_bucket_bytes_max: usize,
    /// Whether rank 0's buffers (running statistics) replace everybody's after each exchanged backward.
    pub broadcast_buffers: bool,
    /// What is sharded.
    pub zero: Zero,
    /// Off: gradients are not exchanged, so that the cost of the exchange can be measured. The ranks'
    /// models drift apart.
    pub exchange: bool,
}

impl Default for DdpOptions {
    fn default() -> Self {
        Self {
            bucket_bytes_max: plan::BUCKET_BYTES_MAX,
            first_bucket_bytes_max: plan::FIRST_BUCKET_BYTES_MAX,
            broadcast_buffers: true,
            zero: Zero::Off,
            exchange: true,
        }
    }
}

/// Whether a backward exchanges gradients.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sync {
    /// Not yet: gradients and weights add up on this rank.
    Accumulate,
    /// Yes: this is the last micro-batch of the step.
    Reduce,
}

/// A model whose gradients are averaged over the ranks of a group, inside plain tch's own `backward`.
///
/// While it lives, every `loss.backward()` exchanges gradients, overlapped with the backward itself, from
/// the first step on; when it returns, `grad()` of every parameter is the mean over the ranks. Dropping it
/// ends that; the model stays usable.
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
    weight: Mutex<f64>,
}

impl Ddp {
    /// Wraps the variables of `vs`. Collective.
    ///
    /// Compares names, shapes and kinds across the ranks, lays parameters and gradients flat, and gives
    /// every rank the values of rank 0. Build the optimizer after it or before it, both work. The group is
    /// duplicated, so that the caller's own collectives never mix with these.
    ///
    /// # Errors
    /// [`Error::ModelMismatch`], the same on every rank, when the models differ; [`Error::NothingToTrain`] and
    /// [`Error::UnsupportedKind`] when they are alike in that; [`Error::DeviceMismatch`]; [`Error::NotDense`]; errors of the group.
    pub fn new(vs: &nn::VarStore, group: &mut Group, options: DdpOptions) -> Result<Self> {
        Self::build(Model::of_var_store(vs)?, group, options)
    }

    /// As [`Ddp::new`] for tensors by hand: `parameters` require gradients and come in the same order on
    /// every rank; `buffers` are not trained.
    ///
    /// # Errors
    /// As [`Ddp::new`].
    pub fn from_tensors(
        parameters: Vec<(String, Tensor)>,
        buffers: Vec<(String, Tensor)>,
        group: &mut Group,
        options: DdpOptions,
    ) -> Result<Self> {
        Self::build(Model::of_tensors(parameters, buffers), group, options)
    }

    fn build(model: Model, group: &mut Group, options: DdpOptions) -> Result<Self> {
        let mut group = group.duplicate()?;
        let mut signature = vec![format!("{options:?}")];
        signature.extend(model.signature());
        verify::same_on_all_ranks(&mut group, &signature)?;
        // Only now: a rank that ended before it would leave the others to wonder.
        model.check()?;
        let device = check_devices(&model, &group)?;
        broadcast::tensors(&mut group, "parameters", &model.parameters)?;
        broadcast::tensors(&mut group, "buffers", &model.buffers)?;
        let parts = lay_flat(group, model, device, options)?;
        let shared = Arc::new(Mutex::new(Reducer::new(parts)?));
        let hooks = reducer::hook_all(&shared)?;
        Ok(Self { hooks, shared, weight: Mutex::new(0.0) })
    }

    /// Runs `body`, in which backwards accumulate on this rank and exchange nothing. The next backward
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
        let before = std::mem::replace(&mut reducer::lock(&self.shared)?.synchronising, false);
        let restore = Restore(&self.shared, before);
        let value = body();
        drop(restore);
        Ok(value)
    }

    /// Backward of a *sum* of losses over `weight` samples or tokens; with [`Sync::Reduce`] the gradients
    /// become Σ gradients / Σ weights over all ranks and all micro-batches since the last exchange.
    ///
    /// This is exact also where ranks hold different numbers of tokens, which a mean of means is not.
    ///
    /// # Errors
    /// [`Error::BadSetting`] for a weight that is negative or not finite; [`Error::MissingGradients`];
    /// errors of libtorch and of the group.
    pub fn backward(&self, loss_sum: &Tensor, weight: f64, sync: Sync) -> Result<()> {
        if !weight.is_finite() || weight < 0.0 {
            let (setting, value) = ("weight", weight.to_string());
            return Err(Error::BadSetting { setting, value, expected: "a number ≥ 0" });
        }
        let total = {
            let mut accumulated = self.weight.lock().map_err(|_poisoned| Error::Poisoned)?;
            *accumulated += weight;
            match sync {
                Sync::Accumulate => None,
                Sync::Reduce => Some(std::mem::take(&mut *accumulated)),
            }
        };
        let outcome = match total {
            None => self.no_sync(|| loss_sum.f_backward())?,
            Some(total) => {
                reducer::lock(&self.shared)?.start_weight(total)?;
                loss_sum.f_backward()
            }
        };
        match (outcome, reducer::lock(&self.shared)?.take_failure()) {
            (_, Some(failure)) => Err(failure),
            (Err(error), None) => Err(error.into()),
            (Ok(()), None) => Ok(()),
        }
    }

    /// Turns the exchange of gradients off and on, to measure a step with and without it side by side.
    /// While it is off the ranks' models drift apart. On all ranks alike.
    ///
    /// # Errors
    /// [`Error::Poisoned`].
    pub fn set_exchange(&self, on: bool) -> Result<()> {
        reducer::lock(&self.shared)?.exchange = on;
        Ok(())
    }

    /// Where the time of the last exchanged backward went. With models on a GPU it is the GPU's time, and
    /// this waits until the GPU has finished that backward.
    ///
    /// # Errors
    /// [`Error::Poisoned`], or the GPU does not finish.
    pub fn step_times(&self) -> Result<StepTimes> {
        reducer::lock(&self.shared)?.step_times()
    }

    /// Makes all gradients undefined, as an optimizer's `zero_grad` does.
    ///
    /// # Errors
    /// [`Error::Poisoned`], libtorch's own.
    pub fn release_gradients(&self) -> Result<()> {
        reducer::lock(&self.shared)?.release_gradients()
    }

    /// How many parameters have hooks.
    #[must_use]
    pub fn parameter_count(&self) -> usize {
        self.hooks.len()
    }

    pub(crate) fn shared(&self) -> &Shared {
        &self.shared
    }
}

/// Plans the buckets, allocates flat storage, and makes parameters views of it.
fn lay_flat(mut group: Group, model: Model, device: Device, options: DdpOptions) -> Result<Parts> {
    let kinds = kinds_of(&model);
    let extents: Vec<Extent> = model.parameters.iter().map(|p| extent(&p.tensor, &kinds)).collect();
    let order: Vec<usize> = (0..extents.len()).rev().collect();
    let caps = [options.first_bucket_bytes_max.max(1), options.bucket_bytes_max.max(1)];
    let caps = Caps { bucket_bytes: &caps, world_size: group.world_size() };
    let plan = Plan::new(&extents, &order, caps);
    let (mut gradients, mut parameters) = (Vec::new(), Vec::new());
    for (&kind, &len) in kinds.iter().zip(&plan.storage_lens) {
        gradients.push(Flat::registered(&mut group, kind, device, len)?);
        parameters.push(match options.zero {
            Zero::Off => Flat::private(kind, device, len)?,
            Zero::One => Flat::registered(&mut group, kind, device, len)?,
        });
    }
    let mut views = Vec::with_capacity(extents.len());
    for (named, place) in model.parameters.iter().zip(&plan.places) {
        let strides = flat::dense_strides(&named.name, &named.tensor)?;
        let shape = named.tensor.size();
        let mut data = parameters[place.storage].view(&place.range, &shape, &strides)?;
        tch::no_grad(|| data.f_copy_(&named.tensor).map(drop))?;
        shim::set_data(&named.tensor, &data)?;
        shim::gradient_clear(&named.tensor)?;
        // Detached: optimizers call detach_() on gradients, which libtorch refuses for views it tracks.
        views.push(gradients[place.storage].view(&place.range, &shape, &strides)?.f_detach()?);
    }
    Ok(Parts { group, model, plan, gradients, parameters, views, options })
}

/// The one device of all parameters: the CPU, or the GPU that the group's backend works on.
fn check_devices(model: &Model, group: &Group) -> Result<Device> {
    let device = model.parameters.first().map_or(Device::Cpu, |first| first.tensor.device());
    let served = match device {
        Device::Cpu => true,
        Device::Cuda(index) => group.device() == Some(index),
        _ => false,
    };
    let stray = model.parameters.iter().find(|named| !served || named.tensor.device() != device);
    stray.map_or(Ok(device), |named| {
        Err(Error::DeviceMismatch {
            name: named.name.clone(),
            device: format!("{:?}", named.tensor.device()),
            expected: match group.device() {
                Some(index) => {
                    format!("Device::Cpu or Device::Cuda({index}), one for all parameters")
                }
                None => format!(
                    "Device::Cpu, where the group's backend `{}` works (GPUs need a group with \
                     Backend::Nccl, or with Backend::Mpi and GroupOptions::with_gpu_memory)",
                    group.backend()
                ),
            },
        })
    })
}

/// The kinds of the parameters, one storage each, in the order in which they first appear.
fn kinds_of(model: &Model) -> Vec<tch::Kind> {
    let mut kinds = Vec::new();
    for named in &model.parameters {
        if !kinds.contains(&named.tensor.kind()) {
            kinds.push(named.tensor.kind());
        }
    }
    kinds
}

fn extent(tensor: &Tensor, kinds: &[tch::Kind]) -> Extent {
    let kind = tensor.kind();
    Extent {
        len: tensor.numel(),
        element_bytes: parameter::element_bytes(kind),
        storage: kinds.iter().position(|&other| other == kind).unwrap_or(0),
    }
}
