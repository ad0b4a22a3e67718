//! Optimizers over the flat storage, replicated or with their state sharded (ZeRO-1): one file a rule, and
//! [`Optimizer`] around it.
//!
//! The way of one sharded parameter: a rank keeps the state of its segment of every bucket, updates those
//! elements ([`Rule::update`]), and the updated segments are gathered, bucket by bucket, while later buckets are
//! still being updated. The arithmetic on an element is the same in every stage, so are the bits.
//!
//! Where more than an element decides, `update` leaves directions: those of matrices that are needed whole are brought
//! together on one rank and taken back ([`Whole`], `whole`), norms of parameters and directions make a factor
//! ([`Rule::trust_ratio`]), and then parameters move ([`Rule::apply`]).
//!
//! Parameters in half precision have f32 masters, which is what a rule updates, and f32 state: a small step is not
//! lost in a large parameter's last bit.

mod adafactor;
mod adam;
mod adamw;
mod clip;
pub(crate) mod ema;
mod groups;
mod lamb;
mod lars;
mod lion;
mod muon;
mod numbers;
mod piece;
mod rule;
pub(crate) mod saved;
mod sgd;
mod state;
mod together;
mod waves;
mod whole;

use std::time::{Duration, Instant};

use phalanx_comm::Work;
use tch::Tensor;

pub use adafactor::Adafactor;
pub use adam::Adam;
pub use adamw::AdamW;
pub use clip::Clip;
pub use ema::Ema;
pub use groups::{ParameterGroup, ParameterGroups};
pub use lamb::Lamb;
pub use lars::Lars;
pub use lion::Lion;
pub use muon::{AdjustLr, Muon};
pub use rule::{Norms, Now, Rule, Runs, Whole};
pub use sgd::Sgd;

use crate::amp::LossScaler;
use crate::reduce::{self, Reducer, Shared};
use crate::store::model::Named;
use crate::store::norm::{self, Power};
use crate::store::plan::Bucket;
use crate::store::{agree, Store};
use crate::{Ddp, Result};
#[cfg(doc)]
use crate::{Error, NonFinite};
use groups::GroupSettings;
use numbers::{Changes, Numbers};
use piece::{Owned, Piece, Treatment};
use state::RuleState;
use whole::Wholes;

/// What came of a step.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Step {
    /// Norm of all gradients, before clipping: the one that they are clipped to, else the 2-norm. Not finite where that is
    /// why the step was skipped. `None` where nobody asked: it takes a pass over all gradients.
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
    /// By group: of parameters that are taken by the element, and of those that are taken whole.
    settings: Vec<[GroupSettings; 2]>,
    lr: f64,
    step_count: u64,
    /// By parameter: its group, and how often it was updated.
    parameters: Vec<Treatment>,
    /// The plan that what follows belongs to.
    layout: u64,
    state: RuleState,
    wholes: Option<Wholes>,
}

impl Optimizer {
    /// Allocates the state. Collective.
    ///
    /// # Errors
    /// [`Error::RanksDiffer`] where another rank has another rule, other settings or groups; [`Error::CutParameter`] for a rule that
    /// needs a parameter whole of which [this rank has a part](Ddp::set_part); [`Error::BadSetting`]; errors of the group and of libtorch.
    pub fn new(ddp: &Ddp, rule: impl Rule + 'static, groups: ParameterGroups) -> Result<Self> {
        let shared = Shared::clone(ddp.shared());
        let mut reducer = reduce::lock(&shared)?;
        let is_offloaded = reducer.options.offload_optimizer;
        let store = &mut reducer.store;
        let mut signature = vec![format!("{rule:?} {groups:?}")];
        let of = |named: &Named| format!("{}: group {}", named.name, groups.index_of(&named.name));
        signature.extend(store.model.variables.iter().map(of));
        agree::alike(&mut store.group, "optimizer", "their optimizers", &signature)?;
        whole::check_parts(store, &rule, &signature[..1])?;
        rule.check()?;
        let settings = groups.settings(&rule)?;
        store.optimizer.count += 1;
        let mut optimizer = Self {
            shared: Shared::clone(&shared),
            lr: rule.lr(),
            rule: Box::new(rule),
            groups,
            settings,
            step_count: 0,
            parameters: Vec::new(),
            layout: store.layout,
            state: RuleState::new(is_offloaded),
            wholes: None,
        };
        let laid = optimizer.lay(store);
        // Before an optimizer is dropped, which takes the lock.
        drop(reducer);
        laid.map(|()| optimizer)
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

    /// Clips the gradients, if that is wanted, updates the parameters, makes the gradients undefined, and returns
    /// their norm before clipping. `clip` is a [`Clip`] or the largest 2-norm: `Some(1.0)`, `None`; with
    /// `Some(f64::INFINITY)` the norm is told and nothing clipped. Collective under ZeRO, for rules that take
    /// parameters whole, and for [a part](Ddp::set_part) of a model, of which all ranks make the step or none.
    ///
    /// A norm that is not finite is treated as the `Ddp` treats gradients that are not finite: an error on every
    /// rank, a step that is left out, or a warning.
    ///
    /// # Errors
    /// [`Error::NoGradients`] when no backward exchanged gradients since the last step; [`Error::BadSetting`]
    /// for a limit that is not above zero; [`Error::NonFiniteNorm`]; errors of the group.
    pub fn step(&mut self, clip: impl Into<Clip>) -> Result<Step> {
        together::step(&mut [self], clip.into(), 1.0)
    }

    /// As [`step`](Self::step) for a loss that was [scaled](LossScaler::scale): divides the gradients by the scale
    /// first, and tells the scaler whether they were finite. If not, every rank skips the step and the scale
    /// goes down.
    ///
    /// The [`Ddp`] must not refuse such gradients itself: give it [`NonFinite::SkipStep`].
    ///
    /// # Errors
    /// As [`step`](Self::step).
    pub fn step_scaled(&mut self, clip: impl Into<Clip>, scaler: &mut LossScaler) -> Result<Step> {
        let step = together::step(&mut [self], clip.into(), scaler.value())?;
        scaler.update(step.skipped);
        Ok(step)
    }

    /// As [`step`](Self::step) for several models that one loss trains, each with a [`Ddp`] and an optimizer of its own (experts beside the layers that
    /// all ranks have, say): clips to the norm of all of them together, and makes the steps of all or of none. In the same order on all
    /// ranks; what is done about a norm that is not finite says the first one's `Ddp`. With a `scaler` as
    /// [`step_scaled`](Self::step_scaled).
    ///
    /// # Errors
    /// As [`step`](Self::step); [`Error::BadSetting`] for none, or two of one `Ddp`.
    pub fn step_all(
        all: &mut [&mut Self],
        clip: impl Into<Clip>,
        scaler: Option<&mut LossScaler>,
    ) -> Result<Step> {
        let scale = scaler.as_ref().map_or(1.0, |scaler| scaler.value());
        let step = together::step(all, clip.into(), scale)?;
        if let Some(scaler) = scaler {
            scaler.update(step.skipped);
        }
        Ok(step)
    }

    /// Gives parameters that are new their group.
    fn take_in(&mut self, store: &Store) {
        let whole = self.rule.whole();
        for named in store.model.parameters().skip(self.parameters.len()) {
            let group = self.groups.index_of(&named.name);
            let is_whole =
                whole.is_some_and(|whole| whole.takes(&named.name, &named.tensor.size()));
            self.parameters.push(Treatment { group, step: 0, is_whole });
        }
    }

    /// Allocates what the present plan needs and is not there. Collective.
    fn lay(&mut self, store: &mut Store) -> Result<()> {
        self.take_in(store);
        let anew = self.step_count == 0;
        self.state.fit(store, &*self.rule, &self.everything(store), anew)?;
        if let Some(whole) = self.rule.whole() {
            let before = self.wholes.take().filter(|_| !anew);
            self.wholes = Some(Wholes::new(store, whole, &self.parameters, before)?);
        }
        Ok(())
    }

    /// This rank's pieces of all parameters.
    fn everything(&self, store: &Store) -> Vec<Owned> {
        self.owned(store, &vec![true; self.parameters.len()])
    }

    /// This rank's pieces of the parameters that are updated.
    fn owned(&self, store: &Store, is_updated: &[bool]) -> Vec<Owned> {
        let segment = |bucket: &Bucket| store.sharding.segment(bucket);
        piece::owned(&store.plan, segment, &self.parameters, is_updated)
    }

    /// Follows the store to its present plan: parameters were added, or, before the first step, all were laid
    /// anew. Collective under ZeRO.
    fn fit(&mut self, store: &mut Store) -> Result<()> {
        let is_outdated = self.wholes.as_ref().is_some_and(|wholes| wholes.is_outdated(store));
        if self.layout != store.layout || is_outdated {
            self.lay(store)?;
            self.layout = store.layout;
        }
        if self.state.has_masters() {
            self.state.heed_masters(store, &self.everything(store))?;
        }
        Ok(())
    }

    fn update(
        &mut self,
        reducer: &mut Reducer,
        has_gradient: &[bool],
        changes: Changes,
    ) -> Result<()> {
        for (treatment, _) in self.parameters.iter_mut().zip(has_gradient).filter(|(_, has)| **has)
        {
            treatment.step += 1;
        }
        let store = &mut reducer.store;
        let parts = self.owned(store, has_gradient);
        let (device, lr) = (self.state.device(store), self.lr);
        let numbers = Numbers { changes, device, lr, settings: &self.settings };
        let mut works = Vec::new();
        let start = Instant::now();
        store.await_readers()?;
        let mut waited = start.elapsed();
        if self.rule.has_trust_ratio() || self.wholes.is_some() {
            for owned in &parts {
                self.update_runs(store, owned, &numbers)?;
            }
            waited += self.make_whole(store, &parts, (&numbers, has_gradient))?;
            let ratios = self.trust_ratios(store, &parts, &numbers)?;
            for (bucket, owned) in parts.iter().enumerate() {
                self.apply(store, owned, (&numbers, &ratios))?;
                self.state.write_back(store, owned)?;
                works.extend(store.gather(bucket)?);
            }
        } else {
            for (bucket, owned) in parts.iter().enumerate() {
                self.update_runs(store, owned, &numbers)?;
                self.state.write_back(store, owned)?;
                works.extend(store.gather(bucket)?);
            }
        }
        let last = Instant::now();
        let ended = wait_all(works).and_then(|()| store.settled());
        let gathered = store.forget_gathered()?;
        reducer.waited(waited + gathered + last.elapsed());
        ended
    }

    /// Lets the rule update a bucket's runs, those that are treated alike in one call.
    fn update_runs(&self, store: &Store, owned: &Owned, numbers: &Numbers<'_>) -> Result<()> {
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
            numbers.clamp(&runs)?;
            self.rule.update(&numbers.now(treatment)?, &runs)?;
        }
        Ok(())
    }

    /// Lets the rule turn the directions of parameters that it takes whole; says how long it waited for other ranks.
    fn make_whole(
        &self,
        store: &mut Store,
        parts: &[Owned],
        (numbers, has_gradient): (&Numbers<'_>, &[bool]),
    ) -> Result<Duration> {
        let (Some(whole), Some(wholes)) = (self.rule.whole(), &self.wholes) else {
            return Ok(Duration::ZERO);
        };
        let turn = |parameter: usize, direction: &Tensor, kept: &[Tensor]| {
            if !has_gradient[parameter] {
                return Ok(None);
            }
            let now = numbers.now(self.parameters[parameter])?;
            whole.turn(&now, direction, kept).map(Some)
        };
        wholes.turn(store, &self.state, parts, turn)
    }

    /// The factors of the steps, by parameter.
    fn trust_ratios(
        &self,
        store: &mut Store,
        owned: &[Owned],
        numbers: &Numbers<'_>,
    ) -> Result<Vec<f64>> {
        if !self.rule.has_trust_ratio() {
            return Ok(vec![1.0; self.parameters.len()]);
        }
        let count = self.parameters.len();
        let mut parts = parameter_parts(store, owned);
        let of_directions = self.state.direction_parts(store, owned).into_iter();
        parts.extend(of_directions.map(|part| norm::NormPart { sum: part.sum + count, ..part }));
        let own = norm::of(&parts, 2 * count, Power::Two)?;
        let sums = store.over_parameters(own, 2)?;
        let (parameters, directions) = sums.split_at(count);
        let both = parameters
            .iter()
            .zip(directions)
            .map(|(&parameter, &direction)| (parameter, direction));
        let ratio = |(index, (parameter, direction)): (usize, (f64, f64))| {
            let now = numbers.now(self.parameters[index])?;
            let len = store.whole_len(index);
            let norms = Norms { parameter: parameter.sqrt(), direction: direction.sqrt(), len };
            Ok(self.rule.trust_ratio(&now, norms))
        };
        both.enumerate().map(ratio).collect()
    }

    /// Parameters of a bucket go in their directions.
    fn apply(&self, store: &Store, owned: &Owned, with: (&Numbers<'_>, &[f64])) -> Result<()> {
        let (numbers, ratios) = with;
        for piece in &owned.pieces {
            let runs = self.state.runs(store, owned.storage, &[&piece.run])?;
            if runs.directions.is_empty() {
                continue; // it was updated already
            }
            let now = numbers.now(piece.run.treatment)?;
            self.rule.apply(&now, ratios[piece.parameter], &runs)?;
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

/// The parameters of this rank's pieces, by parameter.
fn parameter_parts<'a>(store: &'a Store, owned: &[Owned]) -> Vec<norm::NormPart<'a>> {
    let of = |(storage, piece): (usize, &Piece)| {
        let (memory, range) =
            store.storages[storage].parameters.at(&piece.run.range, &piece.run.segment);
        norm::NormPart { memory, range, sum: piece.parameter }
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
