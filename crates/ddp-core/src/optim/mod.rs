//! Optimizers over the flat storage: fused AdamW and LAMB, replicated or with their state sharded (ZeRO-1).
//!
//! Under ZeRO-1 a rank keeps the moments of its segment of every bucket, updates those parameters, and the
//! updated segments are gathered, bucket by bucket, while later buckets are still being updated. The
//! arithmetic on an element is the same in both stages, so are the bits.

pub(crate) mod device_norm;
mod lamb;
pub(crate) mod norm;
mod piece;

use phalanx_comm::Work;
use tch::{Device, Kind, Tensor};

use crate::flat::Flat;
use crate::reducer::{self, Reducer, Shared};
use crate::shim::{self, AdamWLists, AdamWSettings};
use crate::{Ddp, Error, Result, Zero};
use norm::Cells;
use piece::{Owned, Run};

/// AdamW with decoupled weight decay; defaults are PyTorch's.
///
/// # Source
/// Loshchilov & Hutter 2019; `at::_fused_adamw_`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AdamW {
    /// Learning rate.
    pub lr: f64,
    /// Decay of the first moment.
    pub beta1: f64,
    /// Decay of the second moment.
    pub beta2: f64,
    /// Added to the root of the second moment.
    pub eps: f64,
    /// Weight decay, times the learning rate.
    pub weight_decay: f64,
}

impl Default for AdamW {
    fn default() -> Self {
        Self { lr: 1e-3, beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay: 0.01 }
    }
}

/// LAMB: AdamW's step, scaled per parameter by ‖parameter‖ / ‖step‖; for very large batches.
///
/// # Source
/// You et al. 2020, "Large Batch Optimization for Deep Learning: Training BERT in 76 minutes", algorithm 2
/// with φ(x) = x and bias correction.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Lamb {
    /// Learning rate.
    pub lr: f64,
    /// Decay of the first moment.
    pub beta1: f64,
    /// Decay of the second moment.
    pub beta2: f64,
    /// Added to the root of the second moment.
    pub eps: f64,
    /// Weight decay inside the step.
    pub weight_decay: f64,
}

impl Default for Lamb {
    fn default() -> Self {
        Self { lr: 1e-3, beta1: 0.9, beta2: 0.999, eps: 1e-6, weight_decay: 0.01 }
    }
}

/// Which optimizer, with its settings.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum OptimizerConfig {
    /// [`AdamW`].
    AdamW(AdamW),
    /// [`Lamb`].
    Lamb(Lamb),
}

/// One optimizer for both: AdamW's settings have the same fields.
#[derive(Clone, Copy, Debug)]
struct Rule {
    settings: AdamWSettings,
    is_lamb: bool,
}

impl From<OptimizerConfig> for Rule {
    fn from(config: OptimizerConfig) -> Self {
        let (lr, beta1, beta2, eps, weight_decay, is_lamb) = match config {
            OptimizerConfig::AdamW(a) => (a.lr, a.beta1, a.beta2, a.eps, a.weight_decay, false),
            OptimizerConfig::Lamb(l) => (l.lr, l.beta1, l.beta2, l.eps, l.weight_decay, true),
        };
        Self { settings: AdamWSettings { lr, beta1, beta2, weight_decay, eps }, is_lamb }
    }
}

/// Moments of the elements that this rank owns, one pair for each storage.
#[derive(Debug)]
struct Moments {
    first: Vec<Flat>,
    second: Vec<Flat>,
}

/// Updates a [`Ddp`]'s parameters after each exchanged backward.
///
/// # Example
/// ```
/// use phalanx_comm::{Group, GroupOptions};
/// use phalanx_ddp_core::optim::{AdamW, Optimizer, OptimizerConfig};
/// use phalanx_ddp_core::{Ddp, DdpOptions, Sync, Zero};
/// use tch::{nn, nn::Module, Device, Kind, Tensor};
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let mut group = Group::single(GroupOptions::default())?;
/// let vs = nn::VarStore::new(Device::Cpu);
/// let net = nn::linear(vs.root() / "fc", 4, 1, Default::default());
/// let ddp = Ddp::new(&vs, &mut group, DdpOptions { zero: Zero::One, ..DdpOptions::default() })?;
/// let config = OptimizerConfig::AdamW(AdamW { lr: 0.01, ..AdamW::default() });
/// let mut optimizer = Optimizer::new(&ddp, config, |name| !name.ends_with("bias"))?;
/// let loss_sum = net.forward(&Tensor::ones([8, 4], (Kind::Float, Device::Cpu))).square().sum(Kind::Float);
/// ddp.backward(&loss_sum, 8.0, Sync::Reduce)?;
/// let gradient_norm = optimizer.step(Some(1.0))?;
/// assert!(gradient_norm > 0.0);
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct Optimizer {
    shared: Shared,
    rule: Rule,
    /// By bucket: what this rank updates.
    owned: Vec<Owned>,
    moments: Moments,
    cells: Cells,
    step: Tensor,
    step_count: u64,
    lamb: Option<lamb::Scratch>,
}

impl Optimizer {
    /// Allocates the state. Collective. `decays` says by name which parameters have weight decay (biases
    /// and normalisation weights usually do not).
    ///
    /// # Errors
    /// [`Error::BadSetting`]; errors of the group and of libtorch.
    pub fn new(ddp: &Ddp, config: OptimizerConfig, decays: impl Fn(&str) -> bool) -> Result<Self> {
        let rule = Rule::from(config);
        check(&rule.settings)?;
        let shared = Shared::clone(ddp.shared());
        let mut reducer = reducer::lock(&shared)?;
        let reducer_ref = &mut *reducer;
        let (rank, world_size) = match reducer_ref.zero {
            Zero::Off => (0, 1),
            Zero::One => (reducer_ref.group.rank(), reducer_ref.group.world_size()),
        };
        let decays: Vec<bool> =
            reducer_ref.model.parameters.iter().map(|p| decays(&p.name)).collect();
        let (owned, state_lens) = piece::owned(&reducer_ref.plan, rank, world_size, &decays);
        let moments = Moments {
            first: state(reducer_ref, &state_lens)?,
            second: state(reducer_ref, &state_lens)?,
        };
        let cells = Cells::new(&reducer_ref.plan, reducer_ref.zero, &mut reducer_ref.group)?;
        let lamb = if rule.is_lamb {
            Some(lamb::Scratch::new(state(reducer_ref, &state_lens)?))
        } else {
            None
        };
        let device = reducer.gradients.first().map_or(Device::Cpu, Flat::device);
        let step = Tensor::f_zeros([] as [i64; 0], (Kind::Float, device))?;
        drop(reducer);
        Ok(Self { shared, rule, owned, moments, cells, step, step_count: 0, lamb })
    }

    /// Sets the learning rate of the next steps.
    pub fn set_lr(&mut self, lr: f64) {
        self.rule.settings.lr = lr;
    }

    /// The learning rate.
    #[must_use]
    pub fn lr(&self) -> f64 {
        self.rule.settings.lr
    }

    /// Steps made.
    #[must_use]
    pub fn step_count(&self) -> u64 {
        self.step_count
    }

    /// Clips the gradients to the global norm `norm_max`, if given, updates the parameters, makes the
    /// gradients undefined, and returns their norm before clipping. Collective under ZeRO.
    ///
    /// # Errors
    /// [`Error::NoGradients`] when no backward exchanged gradients since the last step; [`Error::BadSetting`]
    /// for a `norm_max` that is not above zero; errors of the group.
    pub fn step(&mut self, norm_max: Option<f64>) -> Result<f64> {
        if let Some(max) = norm_max.filter(|max| max.is_nan() || *max <= 0.0) {
            let (setting, value) = ("norm_max", max.to_string());
            return Err(Error::BadSetting { setting, value, expected: "a number > 0" });
        }
        let shared = Shared::clone(&self.shared);
        let mut reducer = reducer::lock(&shared)?;
        if !std::mem::replace(&mut reducer.reduced, false) {
            return Err(Error::NoGradients);
        }
        let gradient_norm = self.gradient_norm(&mut reducer)?;
        let divisor = norm_max.map_or(1.0, |max| ((gradient_norm + 1e-6) / max).max(1.0));
        self.step_count += 1;
        if self.lamb.is_some() {
            self.lamb_step(&mut reducer, divisor)?;
        } else {
            self.adamw_step(&mut reducer, divisor)?;
        }
        reducer.release_gradients()?;
        Ok(gradient_norm)
    }

    fn gradient_norm(&self, reducer: &mut Reducer) -> Result<f64> {
        let sums = Flat::sums_of_squares(&reducer.gradients, &self.cells.places())?;
        let all = self.cells.gather(&mut reducer.group, &sums)?;
        Ok(all.iter().map(|&(_, sum)| sum).sum::<f64>().sqrt())
    }

    #[expect(
        clippy::cast_precision_loss,
        reason = "steps are far below 2^24; PyTorch counts in f32 too"
    )]
    #[expect(clippy::cast_possible_truncation, reason = "the divisor is a ratio near 1")]
    fn adamw_step(&mut self, reducer: &mut Reducer, divisor: f64) -> Result<()> {
        drop(self.step.f_fill_(self.step_count as f64)?);
        let divisor = (divisor > 1.0)
            .then(|| Tensor::from(divisor as f32).f_to_device(self.step.device()))
            .transpose()?;
        let mut works = Vec::new();
        for bucket in 0..self.owned.len() {
            for decays in [true, false] {
                let runs =
                    self.owned[bucket].runs.iter().filter(|run| run.decays == decays).cloned();
                let lists = self.lists(reducer, bucket, runs)?;
                let weight_decay = if decays { self.rule.settings.weight_decay } else { 0.0 };
                let settings = AdamWSettings { weight_decay, ..self.rule.settings };
                shim::fused_adamw(&lists, &self.step, divisor.as_ref(), settings)?;
            }
            works.extend(start_gather(reducer, bucket)?);
        }
        wait_all(works)
    }

    fn lists(
        &self,
        reducer: &Reducer,
        bucket: usize,
        runs: impl Iterator<Item = Run>,
    ) -> Result<AdamWLists> {
        let storage = self.owned[bucket].storage;
        let mut lists = AdamWLists::default();
        for run in runs {
            lists.parameters.push(reducer.parameters[storage].range(&run.range)?);
            lists.gradients.push(reducer.gradients[storage].range(&run.range)?);
            lists.first_moments.push(self.moments.first[storage].range(&run.state)?);
            lists.second_moments.push(self.moments.second[storage].range(&run.state)?);
        }
        Ok(lists)
    }
}

/// Zeroed state, one for each storage.
fn state(reducer: &Reducer, lens: &[usize]) -> Result<Vec<Flat>> {
    let like = reducer.gradients.iter().zip(lens);
    like.map(|(gradients, &len)| Flat::private(gradients.kind(), gradients.device(), len)).collect()
}

/// Starts the gathering of a bucket's updated parameters, under ZeRO.
fn start_gather(reducer: &mut Reducer, bucket: usize) -> Result<Option<Work<'static>>> {
    if reducer.zero == Zero::Off {
        return Ok(None);
    }
    let planned = &reducer.plan.buckets[bucket];
    let stream = shim::current_stream(reducer.parameters[planned.storage].device())?;
    reducer.group.set_stream(stream);
    reducer.group.tagged(&format!("parameters of bucket {bucket}"));
    let parameters = &reducer.parameters[planned.storage];
    Ok(Some(parameters.all_gather(&mut reducer.group, planned.range.clone())?))
}

fn wait_all(works: Vec<Work<'static>>) -> Result<()> {
    works.into_iter().try_for_each(|work| Ok(work.wait()?))
}

fn check(settings: &AdamWSettings) -> Result<()> {
    let bad = |setting, value: f64, expected| {
        Err(Error::BadSetting { setting, value: value.to_string(), expected })
    };
    if !(settings.lr >= 0.0 && settings.lr.is_finite()) {
        return bad("lr", settings.lr, "a number ≥ 0");
    }
    for (setting, beta) in [("beta1", settings.beta1), ("beta2", settings.beta2)] {
        if !(0.0..1.0).contains(&beta) {
            return bad(setting, beta, "a number in [0, 1)");
        }
    }
    if !(settings.eps > 0.0 && settings.eps.is_finite()) {
        return bad("eps", settings.eps, "a number > 0");
    }
    if !(settings.weight_decay >= 0.0 && settings.weight_decay.is_finite()) {
        return bad("weight_decay", settings.weight_decay, "a number ≥ 0");
    }
    Ok(())
}
