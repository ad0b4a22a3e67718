//! Optimizers over the flat storage, replicated or with their state sharded (ZeRO-1): one file a rule, and
//! [`Optimizer`] around it.
//!
//! The way of one sharded parameter: a rank keeps the state of its segment of every bucket, updates those
//! elements ([`Rule::update`]), and the updated segments are gathered, bucket by bucket, while later buckets are
//! still being updated. The arithmetic on an element is the same in every stage, so are the bits.
//!
//! Parameters in half precision have f32 masters, which is what a rule updates, and f32 state: a small step is not
//! lost in a large parameter's last bit.

mod adam;
mod adamw;
mod groups;
mod lamb;
mod piece;
mod rule;
pub(crate) mod saved;
mod sgd;
mod state;

use std::time::Instant;

use phalanx_comm::Work;
use tch::{Kind, Tensor};

pub use adam::Adam;
pub use adamw::AdamW;
pub use groups::{ParameterGroup, ParameterGroups};
pub use lamb::Lamb;
pub use rule::{Now, Rule, Runs};
pub use sgd::Sgd;

use crate::amp::LossScaler;
use crate::reduce::{self, Outcome, Reducer, Shared};
use crate::store::model::Named;
use crate::store::{agree, norm, Store};
use crate::{Ddp, Error, Result};
use groups::GroupSettings;
use piece::{Owned, Piece, Treatment};
use state::State;

/// What came of a step.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Step {
    /// Norm of all gradients, before clipping; not finite where that is why the step was skipped. `None` where
    /// nobody asked: it takes a pass over all gradients.
    pub gradient_norm: Option<f64>,
    /// Whether parameters stayed as they were, on every rank: gradients were not finite.
    pub skipped: bool,
}

/// Updates a [`Ddp`]'s parameters after each exchanged backward.
///
/// A parameter without a gradient (frozen, or unused on every rank) is left alone, and so is its state; each
/// parameter counts its own steps, as in PyTorch.
///
/// # Example
/// ```
/// use phalanx_comm::{Group, GroupOptions};
/// use phalanx_ddp_core::optim::{AdamW, Optimizer, ParameterGroup, ParameterGroups};
/// use phalanx_ddp_core::{Ddp, DdpOptions, Sync, Zero};
/// use tch::{nn, nn::Module, Device, Kind, Tensor};
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let mut group = Group::single(GroupOptions::default())?;
/// let vs = nn::VarStore::new(Device::Cpu);
/// let net = nn::linear(vs.root() / "fc", 4, 1, Default::default());
/// let ddp = Ddp::new(&vs, &mut group, DdpOptions { zero: Zero::One, ..DdpOptions::default() })?;
/// let rule = AdamW { lr: 0.01, ..AdamW::default() };
/// let no_decay = ParameterGroup::matching(["*.bias"]).weight_decay(0.0);
/// let mut optimizer = Optimizer::new(&ddp, rule, ParameterGroups::default().with(no_decay))?;
/// let loss_sum = net.forward(&Tensor::ones([8, 4], (Kind::Float, Device::Cpu))).square().sum(Kind::Float);
/// ddp.backward(&loss_sum, 8.0, Sync::Reduce)?;
/// assert!(optimizer.step(Some(1.0))?.gradient_norm > Some(0.0));
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct Optimizer {
    shared: Shared,
    rule: Box<dyn Rule>,
    groups: ParameterGroups,
    settings: Vec<GroupSettings>,
    lr: f64,
    step_count: u64,
    /// By parameter: its group, and how often it was updated.
    parameters: Vec<Treatment>,
    /// The plan that what follows belongs to.
    layout: u64,
    state: State,
}

impl Optimizer {
    /// Allocates the state. Collective.
    ///
    /// # Errors
    /// [`Error::RanksDiffer`] where another rank has another rule, other settings or groups;
    /// [`Error::BadSetting`]; errors of the group and of libtorch.
    pub fn new(ddp: &Ddp, rule: impl Rule + 'static, groups: ParameterGroups) -> Result<Self> {
        let shared = Shared::clone(ddp.shared());
        let mut reducer = reduce::lock(&shared)?;
        let store = &mut reducer.store;
        let mut signature = vec![format!("{rule:?} {groups:?}")];
        let of = |named: &Named| format!("{}: group {}", named.name, groups.index_of(&named.name));
        signature.extend(store.model.variables.iter().map(of));
        agree::alike(&mut store.group, "optimizer", "their optimizers", &signature)?;
        rule.check()?;
        let settings = groups.settings(&rule)?;
        let state = State::new(store, &rule)?;
        store.optimizer.count += 1;
        let layout = store.layout;
        let mut optimizer = Self {
            shared: Shared::clone(&shared),
            lr: rule.lr(),
            rule: Box::new(rule),
            groups,
            settings,
            step_count: 0,
            parameters: Vec::new(),
            layout,
            state,
        };
        optimizer.take_in(store);
        drop(reducer);
        Ok(optimizer)
    }

    /// Sets the learning rate of the next steps.
    ///
    /// # Errors
    /// [`Error::BadSetting`] for one that is negative or not finite.
    pub fn set_lr(&mut self, lr: f64) -> Result<()> {
        rule::check_setting("lr", lr, lr >= 0.0 && lr.is_finite(), "a number ≥ 0")?;
        self.lr = lr;
        Ok(())
    }

    /// The learning rate.
    #[must_use]
    pub fn lr(&self) -> f64 {
        self.lr
    }

    /// Steps made.
    #[must_use]
    pub fn step_count(&self) -> u64 {
        self.step_count
    }

    /// Clips the gradients to the global norm `norm_max`, if given, updates the parameters, makes the
    /// gradients undefined, and returns their norm before clipping: with `Some(f64::INFINITY)` without clipping.
    /// Collective under ZeRO.
    ///
    /// # Errors
    /// [`Error::NoGradients`] when no backward exchanged gradients since the last step; [`Error::BadSetting`]
    /// for a `norm_max` that is not above zero; errors of the group.
    pub fn step(&mut self, norm_max: Option<f64>) -> Result<Step> {
        self.step_divided(norm_max, 1.0)
    }

    /// As [`step`](Self::step) for a loss that was [scaled](LossScaler::scale): divides the gradients by the scale
    /// first, and tells the scaler whether they were finite. If not, every rank skips the step and the scale
    /// goes down.
    ///
    /// The [`Ddp`] must not refuse such gradients itself: give it [`NonFinite::SkipStep`](crate::NonFinite::SkipStep).
    ///
    /// # Errors
    /// As [`step`](Self::step).
    pub fn step_scaled(&mut self, norm_max: Option<f64>, scaler: &mut LossScaler) -> Result<Step> {
        let step = self.step_divided(norm_max, scaler.value())?;
        scaler.update(step.skipped);
        Ok(step)
    }

    fn step_divided(&mut self, norm_max: Option<f64>, loss_scale: f64) -> Result<Step> {
        if let Some(max) = norm_max.filter(|max| max.is_nan() || *max <= 0.0) {
            let (setting, value) = ("norm_max", max.to_string());
            return Err(Error::BadSetting { setting, value, expected: "a number > 0" });
        }
        let shared = Shared::clone(&self.shared);
        let mut reducer = reduce::lock(&shared)?;
        let has_gradient = match std::mem::take(&mut reducer.outcome) {
            Outcome::Nothing => return Err(Error::NoGradients),
            Outcome::Skipped => return Ok(Step { gradient_norm: Some(f64::NAN), skipped: true }),
            Outcome::Reduced(has_gradient) => has_gradient,
        };
        let has_gradient = reducer.steppable(has_gradient)?;
        reducer.store.heed_written()?;
        self.fit(&mut reducer.store)?;
        let is_scaled = (loss_scale - 1.0).abs() > 0.0;
        let norm = match norm_max.is_some() || is_scaled {
            true => Some(self.gradient_norm(&mut reducer, &has_gradient)? / loss_scale),
            false => None,
        };
        if is_scaled && norm.is_some_and(|norm| !norm.is_finite()) {
            reducer.release_gradients()?;
            return Ok(Step { gradient_norm: norm, skipped: true });
        }
        let clip = match (norm, norm_max) {
            (Some(norm), Some(max)) => ((norm + 1e-6) / max).max(1.0),
            _ => 1.0,
        };
        self.update(&mut reducer, &has_gradient, clip * loss_scale)?;
        let made_with = [norm_max.unwrap_or(-1.0), loss_scale].map(f64::to_le_bytes).concat();
        let stepped = &mut reducer.store.optimizer;
        stepped.steps += 1;
        stepped.lr = self.lr;
        stepped.settings = crc32c::crc32c_append(stepped.settings, &made_with);
        self.step_count += 1;
        reducer.release_gradients()?;
        Ok(Step { gradient_norm: norm, skipped: false })
    }

    /// Gives parameters that are new their group.
    fn take_in(&mut self, store: &Store) {
        for named in store.model.parameters().skip(self.parameters.len()) {
            let group = self.groups.index_of(&named.name);
            self.parameters.push(Treatment { group, step: 0 });
        }
    }

    /// Follows the store to its present plan: parameters were added, or, before the first step, all were laid
    /// anew. Collective under ZeRO.
    fn fit(&mut self, store: &mut Store) -> Result<()> {
        if self.layout != store.layout {
            self.state.fit(store, &*self.rule, self.step_count == 0)?;
            self.layout = store.layout;
            self.take_in(store);
        }
        self.state.heed_masters(store)
    }

    fn gradient_norm(&self, reducer: &mut Reducer, has_gradient: &[bool]) -> Result<f64> {
        let start = Instant::now();
        let store = &mut reducer.store;
        let owned = piece::owned(
            &store.plan,
            |bucket| store.sharding.segment(bucket),
            &self.treatments(has_gradient),
        );
        let sums = norm::sums_of_squares(&gradient_parts(store, &owned), 1)?;
        let computed = start.elapsed();
        let sum = store.summed(sums)?[0];
        reducer.waited(start.elapsed().saturating_sub(computed));
        Ok(sum.sqrt())
    }

    /// How each parameter is treated, of those that have gradients.
    fn treatments(&self, has_gradient: &[bool]) -> Vec<Option<Treatment>> {
        let treated = self.parameters.iter().zip(has_gradient);
        treated.map(|(&treatment, &has)| has.then_some(treatment)).collect()
    }

    fn update(&mut self, reducer: &mut Reducer, has_gradient: &[bool], divisor: f64) -> Result<()> {
        for (treatment, _) in self.parameters.iter_mut().zip(has_gradient).filter(|(_, has)| **has)
        {
            treatment.step += 1;
        }
        let treatments = self.treatments(has_gradient);
        let store = &mut reducer.store;
        let sharding = store.sharding;
        let parts = piece::owned(&store.plan, |bucket| sharding.segment(bucket), &treatments);
        let now = Numbers { divisor, device: store.device() };
        let start = Instant::now();
        store.await_readers()?;
        reducer.waited(start.elapsed());
        let store = &mut reducer.store;
        let mut works = Vec::new();
        match self.rule.trust_ratio() {
            None => {
                for (bucket, owned) in parts.iter().enumerate() {
                    self.update_runs(store, owned, &now)?;
                    self.state.write_back(store, owned)?;
                    works.extend(store.gather(bucket)?);
                }
            }
            Some(trust_ratio) => {
                for owned in &parts {
                    self.update_runs(store, owned, &now)?;
                }
                let ratios = self.trust_ratios(store, &parts, trust_ratio)?;
                for (bucket, owned) in parts.iter().enumerate() {
                    self.apply(store, owned, &ratios)?;
                    self.state.write_back(store, owned)?;
                    works.extend(store.gather(bucket)?);
                }
            }
        }
        let start = Instant::now();
        let store = &mut reducer.store;
        let ended = wait_all(works).and_then(|()| store.settled());
        let gathered = store.forget_gathered()?;
        reducer.waited(start.elapsed() + gathered);
        ended
    }

    /// Lets the rule update a bucket's runs, those that are treated alike in one call.
    fn update_runs(&self, store: &Store, owned: &Owned, numbers: &Numbers) -> Result<()> {
        let mut treatments: Vec<Treatment> = Vec::new();
        for run in &owned.runs {
            if !treatments.contains(&run.treatment) {
                treatments.push(run.treatment);
            }
        }
        for treatment in treatments {
            let alike: Vec<_> =
                owned.runs.iter().filter(|run| run.treatment == treatment).collect();
            let runs = self.state.runs(store, owned.storage, &alike)?;
            self.rule.update(&numbers.now(treatment, self.lr, &self.settings)?, &runs)?;
        }
        Ok(())
    }

    /// The factors of the steps, by parameter.
    fn trust_ratios(
        &self,
        store: &mut Store,
        owned: &[Owned],
        trust_ratio: fn(f64, f64) -> f64,
    ) -> Result<Vec<f64>> {
        let count = self.parameters.len();
        let mut sums = norm::sums_of_squares(&parameter_parts(store, owned), count)?;
        sums.extend(norm::sums_of_squares(&self.state.direction_parts(owned), count)?);
        let sums = store.summed(sums)?;
        let (parameters, directions) = sums.split_at(count);
        let both = parameters.iter().zip(directions);
        Ok(both
            .map(|(parameter, direction)| trust_ratio(parameter.sqrt(), direction.sqrt()))
            .collect())
    }

    /// Parameters of a bucket go in their directions.
    fn apply(&self, store: &Store, owned: &Owned, ratios: &[f64]) -> Result<()> {
        for piece in &owned.pieces {
            let runs = self.state.runs(store, owned.storage, &[&piece.run])?;
            let factor = self.settings[piece.run.treatment.group].lr_factor;
            let factor = self.lr * factor * ratios[piece.parameter];
            let scaled = runs.directions[0].f_mul_scalar(factor)?;
            tch::no_grad(|| runs.parameters[0].shallow_clone().f_sub_(&scaled).map(drop))?;
        }
        Ok(())
    }
}

impl Drop for Optimizer {
    fn drop(&mut self) {
        if let Ok(mut reducer) = self.shared.lock() {
            reducer.store.optimizer.count -= 1;
        }
    }
}

/// What the numbers of an update are made of.
struct Numbers {
    divisor: f64,
    device: tch::Device,
}

impl Numbers {
    #[expect(
        clippy::cast_precision_loss,
        reason = "steps are far below 2^24; PyTorch counts in f32 too"
    )]
    #[expect(clippy::cast_possible_truncation, reason = "the kernels divide in f32")]
    fn now(&self, treatment: Treatment, lr: f64, settings: &[GroupSettings]) -> Result<Now> {
        let GroupSettings { lr_factor, weight_decay } = settings[treatment.group];
        let is_divided = (self.divisor - 1.0).abs() > 0.0;
        let scalar = |value: f32| Tensor::from(value).f_to_device(self.device);
        let step_tensor = Tensor::f_zeros([] as [i64; 0], (Kind::Float, self.device))?;
        drop(step_tensor.shallow_clone().f_fill_(treatment.step as f64)?);
        Ok(Now {
            step: treatment.step,
            step_tensor,
            lr: lr * lr_factor,
            weight_decay,
            divisor: self.divisor,
            divisor_tensor: is_divided.then(|| scalar(self.divisor as f32)).transpose()?,
        })
    }
}

/// The gradients of this rank's pieces, all for one sum.
fn gradient_parts<'a>(store: &'a Store, owned: &[Owned]) -> Vec<norm::Part<'a>> {
    let of = |(storage, piece): (usize, &Piece)| {
        let (memory, range) =
            store.storages[storage].gradients.at(&piece.run.range, &piece.run.state);
        norm::Part { memory, range, sum: 0 }
    };
    pieces(owned).map(of).collect()
}

/// The parameters of this rank's pieces, by parameter.
fn parameter_parts<'a>(store: &'a Store, owned: &[Owned]) -> Vec<norm::Part<'a>> {
    let of = |(storage, piece): (usize, &Piece)| {
        let (memory, range) =
            store.storages[storage].parameters.at(&piece.run.range, &piece.run.state);
        norm::Part { memory, range, sum: piece.parameter }
    };
    pieces(owned).map(of).collect()
}

/// The pieces of all buckets, with their storages.
fn pieces(owned: &[Owned]) -> impl Iterator<Item = (usize, &Piece)> {
    owned.iter().flat_map(|part| part.pieces.iter().map(|piece| (part.storage, piece)))
}

fn wait_all(works: Vec<Work<'static>>) -> Result<()> {
    works.into_iter().try_for_each(|work| Ok(work.wait()?))
}
