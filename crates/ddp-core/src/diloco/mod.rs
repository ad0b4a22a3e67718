//! Local SGD with an outer optimizer: ranks train by themselves and average their models now and then.

mod local;
mod outer;

pub(crate) use local::Local;
pub use outer::OuterSgd;

use crate::hooks::{Hook, Plain};
use crate::reduce::{self, Shared};
use crate::store::agree;
use crate::{Ddp, Error, Result, Zero};

/// Settings of [`DiLoCo`]. The same on every rank.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct DiLoCoOptions {
    /// What steps on the mean of the ranks' changes.
    pub outer: OuterSgd,
    /// Steps from averaging to averaging. Default 100.
    pub sync_every: u64,
    /// Steps of plain data-parallel training before the ranks part (post-local SGD). Default 0.
    pub plain_steps: u64,
}

impl Default for DiLoCoOptions {
    fn default() -> Self {
        Self { outer: OuterSgd::default(), sync_every: 100, plain_steps: 0 }
    }
}

/// Trains with one exchange every [`sync_every`](DiLoCoOptions::sync_every) steps: 2 (P−1)/P · 4n ÷ `sync_every` bytes a step.
///
/// While it lives, backwards give each rank its own gradients, and nothing is sent; weighted ones are divided by the rank's own weight. The inner optimizer, this
/// library's or tch's, steps on those, then [`step`](Self::step) is called. Every `sync_every`-th time, with θ₀ the parameters of the last averaging
/// and θᵣ those of rank r: g = mean of θ₀ − θᵣ over the ranks; an outer SGD steps from θ₀ on g ([`OuterSgd`]); every rank
/// goes on from the result, with the same bits. With lr 1 and no momentum that is the mean of the ranks' models (local SGD).
///
/// Buffers become alike with each averaging, as [`DdpOptions::buffers`](crate::DdpOptions::buffers) has it. The inner optimizer's state stays each rank's own.
/// Parameters are compared after averagings 1, 2, 4, 8 … and every [`fingerprint_interval`](crate::DdpOptions::fingerprint_interval)-th, and not between them.
///
/// Dropping it lets backwards exchange again: after an averaging, and with an inner optimizer that keeps nothing or is built anew, for what one
/// keeps is each rank's own.
///
/// # What it does not do
/// It needs [`Zero::Off`]: a sharded step is a step of all ranks. Ranks look at their own gradients alone, so with [`NonFinite::SkipStep`](crate::NonFinite) one rank
/// may skip a step that the others make; with [`NonFinite::Error`](crate::NonFinite) such a rank ends the group. On a GPU nobody looks. It is not for
/// [`Ddp::join`]: every rank makes the same number of steps, which averagings compare.
///
/// # Checkpoints
/// [`Checkpointer`](crate::checkpoint::Checkpointer) saves it with the rest, and averages first where a checkpoint is due between two averagings; call it behind [`step`](Self::step). Of the inner
/// optimizer's state a checkpoint has, for each part, some rank's.
///
/// # Memory
/// Two f32 values for each parameter, one without momentum.
///
/// # Example
/// ```
/// use phalanx_comm::{Group, GroupOptions};
/// use phalanx_ddp_core::diloco::{DiLoCo, DiLoCoOptions};
/// use phalanx_ddp_core::{Ddp, DdpOptions};
/// use tch::{nn, nn::Module, nn::OptimizerConfig, Device, Kind, Tensor};
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let mut group = Group::single(GroupOptions::default())?;
/// let vs = nn::VarStore::new(Device::Cpu);
/// let net = nn::linear(vs.root() / "fc", 4, 1, Default::default());
/// let ddp = Ddp::new(&vs, &mut group, DdpOptions::default())?;
/// let mut inner = nn::AdamW::default().build(&vs, 1e-3)?;
/// let mut outer = DiLoCo::new(&ddp, DiLoCoOptions { sync_every: 5, ..Default::default() })?;
/// for _ in 0..20 {
///     let x = Tensor::ones([8, 4], (Kind::Float, Device::Cpu));
///     inner.backward_step(&net.forward(&x).square().mean(Kind::Float));
///     outer.step()?;
/// }
/// # Ok(())
/// # }
/// ```
///
/// # Source
/// Douillard et al. 2023, "`DiLoCo`: Distributed Low-Communication Training of Language Models"; Stich 2018, "Local SGD Converges Fast and Communicates
/// Little"; Lin et al. 2018, "Don't Use Large Mini-Batches, Use Local SGD" (post-local).
#[derive(Debug)]
pub struct DiLoCo {
    shared: Shared,
}

impl DiLoCo {
    /// From here on ranks train by themselves, or after [`plain_steps`](DiLoCoOptions::plain_steps). Collective.
    ///
    /// # Errors
    /// [`Error::RanksDiffer`] where another rank has other settings; [`Error::BadSetting`], with [`Zero::One`] as well.
    pub fn new(ddp: &Ddp, options: DiLoCoOptions) -> Result<Self> {
        Self::with_hook(ddp, options, Plain)
    }

    /// As [`new`](Self::new), with changes averaged through a [`Hook`]: compressed, say.
    ///
    /// # Errors
    /// As [`new`](Self::new).
    pub fn with_hook(ddp: &Ddp, options: DiLoCoOptions, hook: impl Hook) -> Result<Self> {
        let shared = Shared::clone(ddp.shared());
        let mut reducer = reduce::lock(&shared)?;
        let signature = [format!("{options:?}, averaged by {}", hook.name())];
        let group = &mut reducer.store.group;
        agree::alike(group, "local training", "their local training", &signature)?;
        options.check()?;
        hook.check()?;
        if reducer.options.zero != Zero::Off {
            let (setting, value) = ("zero", format!("{:?}", reducer.options.zero));
            return Err(Error::BadSetting { setting, value, expected: "Zero::Off with DiLoCo" });
        }
        if reducer.store.part.is_some() {
            let (setting, value) = ("DiLoCo", "for a part of a model".to_owned());
            return Err(Error::BadSetting { setting, value, expected: "a Ddp of a whole model" });
        }
        if reducer.local.is_some() {
            let (setting, value) = ("DiLoCo", "there already".to_owned());
            return Err(Error::BadSetting { setting, value, expected: "one for a Ddp" });
        }
        let exchange = reducer.options.exchange;
        reducer.local = Some(Local::new(options, hook, exchange));
        if options.plain_steps == 0 {
            reducer.train_locally()?;
        }
        drop(reducer);
        Ok(Self { shared })
    }

    /// The inner optimizer has made a step. Averages if it is time to, and says whether it did: collective then.
    ///
    /// # Errors
    /// As [`average`](Self::average).
    pub fn step(&mut self) -> Result<bool> {
        reduce::lock(&self.shared)?.stepped_by_itself()
    }

    /// Averages now, whatever the number of steps; nothing where none was made. Collective.
    ///
    /// # Errors
    /// [`Error::RanksDiffer`] where ranks have made different numbers of steps; [`Error::ParametersDiffer`]; errors of the group.
    pub fn average(&mut self) -> Result<()> {
        reduce::lock(&self.shared)?.average()
    }

    /// Sets the outer learning rate, on all ranks alike.
    ///
    /// # Errors
    /// [`Error::BadSetting`] for one that is not above zero.
    pub fn set_outer_lr(&mut self, lr: f64) -> Result<()> {
        let mut reducer = reduce::lock(&self.shared)?;
        let Some(local) = &mut reducer.local else { return Ok(()) };
        let outer = OuterSgd { lr, ..local.options.outer };
        outer.check()?;
        local.options.outer = outer;
        Ok(())
    }

    /// How often ranks have averaged.
    ///
    /// # Errors
    /// [`Error::Poisoned`].
    pub fn averaged_count(&self) -> Result<u64> {
        Ok(reduce::lock(&self.shared)?.local.as_ref().map_or(0, |local| local.averaged_count))
    }

    /// Bytes that a rank had to send for the last averaging at least, counted as
    /// [`Statistics::bytes_sent`](crate::Statistics::bytes_sent).
    ///
    /// # Errors
    /// [`Error::Poisoned`].
    pub fn bytes_sent(&self) -> Result<u64> {
        Ok(reduce::lock(&self.shared)?.local.as_ref().map_or(0, |local| local.bytes_sent))
    }
}

impl DiLoCoOptions {
    fn check(&self) -> Result<()> {
        if self.sync_every == 0 {
            let (setting, value) = ("sync_every", "0".to_owned());
            return Err(Error::BadSetting { setting, value, expected: "a number > 0" });
        }
        self.outer.check()
    }
}

impl Drop for DiLoCo {
    fn drop(&mut self) {
        if let Ok(mut reducer) = self.shared.lock() {
            reducer.exchange_again();
            reducer.local = None;
        }
    }
}
