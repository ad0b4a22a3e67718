//! Exponential moving averages of weights, sharded as an optimizer's state is: a rank keeps those of its segments.
//!
//! The averages take the parameters' places for an evaluation, where a step's updated parameters go as well, and are gathered in the same
//! way. Source: Polyak & Juditsky 1992; `torch.optim.swa_utils.AveragedModel` with `get_ema_multi_avg_fn`.

use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard};

use serde::{Deserialize, Serialize};
use tch::Tensor;

use super::piece::{self, Piece, Treatment};
use super::rule::check_setting;
use super::state::{taken, work_kind};
use crate::checkpoint::held::{Held, HeldPart};
use crate::checkpoint::{sharded, WeightsOptions};
use crate::reduce::{self, Shared};
use crate::store::plan::ParameterPlace;
use crate::store::{agree, Store};
use crate::{Ddp, Error, Result};

/// Averages of a [`Ddp`]'s parameters: average ← decay × average + (1 − decay) × parameter at each
/// [`update`](Self::update).
///
/// They begin as the parameters are at the first update, and are f32 for parameters in half precision. Parameters that begin to train
/// later begin to be averaged then. Under ZeRO a rank has the averages of its segments alone: memory is four bytes a parameter, over
/// all ranks that share the optimizer's state.
///
/// A [`Checkpointer`](crate::checkpoint::Checkpointer) saves and resumes them
/// [if it is told to](crate::checkpoint::Checkpointer::with_ema).
///
/// # Example
/// ```
/// use phalanx_comm::{Group, GroupOptions};
/// use phalanx_ddp_core::optim::{AdamW, Ema, Optimizer, ParameterGroups};
/// use phalanx_ddp_core::{Ddp, DdpOptions};
/// use tch::{nn, nn::Module, Device, Kind, Tensor};
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let mut group = Group::single(GroupOptions::default())?;
/// let vs = nn::VarStore::new(Device::Cpu);
/// let net = nn::linear(vs.root() / "fc", 4, 1, Default::default());
/// let ddp = Ddp::new(&vs, &mut group, DdpOptions::default())?;
/// let mut optimizer = Optimizer::new(&ddp, AdamW::default(), ParameterGroups::default())?;
/// let mut ema = Ema::new(&ddp, 0.999)?;
/// let x = Tensor::ones([8, 4], (Kind::Float, Device::Cpu));
/// for _ in 0..10 {
///     net.forward(&x).square().mean(Kind::Float).f_backward()?;
///     optimizer.step(None)?;
///     ema.update()?;
/// }
/// let of_averages = ema.with_averaged(|| tch::no_grad(|| net.forward(&x)))?;
/// # drop(of_averages);
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct Ema {
    shared: Shared,
    averages: Arc<Mutex<Averages>>,
}

/// The averages themselves: shared with whoever saves them.
#[derive(Debug)]
pub(crate) struct Averages {
    decay: f64,
    warms_up: bool,
    update_count: u64,
    /// The plan that the pieces belong to.
    layout: Option<u64>,
    /// Where the parameters were then.
    places: Vec<ParameterPlace>,
    pieces: Vec<Average>,
}

/// The averages of a piece of a parameter, in the kind that rules work in.
#[derive(Debug)]
struct Average {
    piece: Piece,
    storage: usize,
    /// Where the piece begins in the parameter.
    offset: usize,
    values: Tensor,
}

/// What averages are beside their tensors.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct AveragesNumbers {
    update_count: u64,
}

impl Ema {
    /// Averages with this decay, of nothing yet. Collective.
    ///
    /// # Errors
    /// [`Error::BadSetting`] for a decay that is not in [0, 1); [`Error::RanksDiffer`]; errors of the group.
    pub fn new(ddp: &Ddp, decay: f64) -> Result<Self> {
        Self::build(ddp, decay, false)
    }

    /// As [`Ema::new`], with the decay min(decay, (1 + n) / (10 + n)) at update n = 2, 3, …: what weights were at first
    /// is soon forgotten. Collective.
    ///
    /// # Errors
    /// As [`Ema::new`].
    pub fn with_warm_up(ddp: &Ddp, decay: f64) -> Result<Self> {
        Self::build(ddp, decay, true)
    }

    fn build(ddp: &Ddp, decay: f64, warms_up: bool) -> Result<Self> {
        let shared = Shared::clone(ddp.shared());
        let mut reducer = reduce::lock(&shared)?;
        let settings = [format!("decay {decay}, with warm-up: {warms_up}")];
        agree::alike(&mut reducer.store.group, "averages", "their averages", &settings)?;
        check_setting("decay", decay, (0.0..1.0).contains(&decay), "a number in [0, 1)")?;
        let mut averages = Averages {
            decay,
            warms_up,
            update_count: 0,
            layout: None,
            places: Vec::new(),
            pieces: Vec::new(),
        };
        averages.fit(&reducer.store)?;
        drop(reducer);
        Ok(Self { shared, averages: Arc::new(Mutex::new(averages)) })
    }

    /// Takes the parameters as they are into the averages: after each step. Sends nothing.
    ///
    /// # Errors
    /// Errors of libtorch; [`Error::AveragesMoved`].
    pub fn update(&mut self) -> Result<()> {
        let reducer = reduce::lock(&self.shared)?;
        lock(&self.averages)?.update(&reducer.store)
    }

    /// How many updates there were.
    ///
    /// # Errors
    /// [`Error::Poisoned`].
    pub fn update_count(&self) -> Result<u64> {
        Ok(lock(&self.averages)?.update_count)
    }

    /// Runs `body` with the averages, if there was an update, in the parameters' places, rounded to their kind, and puts the parameters back, bit for bit:
    /// to evaluate. Inside there is no backward and no step. Where `body` panics, the averages stay in the model. Needs room for
    /// this rank's share of the parameters meanwhile. Collective under ZeRO, which gathers twice.
    ///
    /// # Errors
    /// Errors of the group and of libtorch; [`Error::AveragesMoved`].
    pub fn with_averaged<T>(&mut self, body: impl FnOnce() -> T) -> Result<T> {
        let mut reducer = reduce::lock(&self.shared)?;
        let mut averages = lock(&self.averages)?;
        if averages.update_count == 0 {
            averages.layout = None;
        }
        averages.fit(&reducer.store)?;
        reducer.store.heed_written()?;
        reducer.store.await_readers()?;
        let mut own = Vec::with_capacity(averages.pieces.len());
        for average in &averages.pieces {
            let parameters = average.place(&reducer.store)?;
            let mut copy =
                Tensor::f_empty(parameters.size(), (parameters.kind(), parameters.device()))?;
            copy.f_copy_(&parameters)?;
            own.push((copy, parameters));
        }
        for (average, (_, parameters)) in averages.pieces.iter().zip(&own) {
            tch::no_grad(|| parameters.shallow_clone().f_copy_(&average.values).map(drop))?;
        }
        reducer.store.gather_all()?;
        let layout = reducer.store.layout;
        drop((reducer, averages));
        let value = body();
        self.put_back(&own, layout)?;
        Ok(value)
    }

    /// Gives parameters their own values again.
    fn put_back(&self, own: &[(Tensor, Tensor)], layout: u64) -> Result<()> {
        let mut reducer = reduce::lock(&self.shared)?;
        if reducer.store.layout != layout {
            return Err(Error::AveragesMoved);
        }
        reducer.store.await_readers()?;
        for (copy, parameters) in own {
            tch::no_grad(|| parameters.shallow_clone().f_copy_(copy).map(drop))?;
        }
        reducer.store.gather_all()
    }

    /// Writes the model with its averages, buffers included, as [`Ddp::save_weights`] does. Collective.
    ///
    /// # Errors
    /// As [`Ddp::save_weights`] and [`with_averaged`](Self::with_averaged).
    pub fn save_safetensors(&mut self, path: &Path) -> Result<()> {
        let shared = Shared::clone(&self.shared);
        self.with_averaged(|| {
            let mut reducer = reduce::lock(&shared)?;
            sharded::save(&mut reducer, path, &WeightsOptions::default())
        })?
    }

    pub(crate) fn averages(&self) -> Arc<Mutex<Averages>> {
        Arc::clone(&self.averages)
    }
}

/// The averages behind their lock.
pub(crate) fn lock(averages: &Mutex<Averages>) -> Result<MutexGuard<'_, Averages>> {
    averages.lock().map_err(|_poisoned| Error::Poisoned)
}

impl Averages {
    fn update(&mut self, store: &Store) -> Result<()> {
        if self.update_count == 0 {
            // Whatever it was when it was last looked at.
            self.layout = None;
        }
        self.fit(store)?;
        self.update_count += 1;
        if self.update_count == 1 {
            return Ok(());
        }
        let decay = self.present_decay();
        for average in &mut self.pieces {
            let parameters = average.place(store)?.f_to_kind(average.values.kind())?;
            // Each a single operation an element, so that bits do not depend on how libtorch cuts the work.
            drop(average.values.f_mul_scalar_(decay)?);
            drop(average.values.f_add_(&parameters.f_mul_scalar(1.0 - decay)?)?);
        }
        Ok(())
    }

    #[expect(clippy::cast_precision_loss, reason = "counts are far below 2^53")]
    fn present_decay(&self) -> f64 {
        let count = self.update_count as f64;
        let most = if self.warms_up { (1.0 + count) / (10.0 + count) } else { 1.0 };
        self.decay.min(most)
    }

    /// Follows the store to its present plan: what is new begins as it is.
    fn fit(&mut self, store: &Store) -> Result<()> {
        if self.layout == Some(store.layout) {
            return Ok(());
        }
        let count = store.model.parameters().len();
        let treatments = vec![Treatment { group: 0, step: 0, is_whole: false }; count];
        let segment = |bucket: &_| store.sharding.segment(bucket);
        let owned = piece::owned(&store.plan, segment, &treatments, &vec![true; count]);
        let has_begun = self.update_count > 0;
        let known = self.places.len();
        let has_moved = !store.plan.places.starts_with(&self.places);
        if has_begun && has_moved && store.sharding.parts() > 1 {
            return Err(Error::AveragesMoved);
        }
        let mut old = std::mem::take(&mut self.pieces);
        for of_bucket in owned {
            for piece in of_bucket.pieces {
                let offset = piece.run.range.start - store.plan.places[piece.parameter].range.start;
                let is_it = |average: &Average| {
                    average.piece.parameter == piece.parameter && average.offset == offset
                };
                let is_known = has_begun && piece.parameter < known;
                let found = old.iter().position(is_it).filter(|_| is_known);
                let values = match found {
                    Some(at) => old.swap_remove(at).values,
                    None => begun(store, of_bucket.storage, &piece)?,
                };
                let storage = of_bucket.storage;
                self.pieces.push(Average { piece, storage, offset, values });
            }
        }
        self.layout = Some(store.layout);
        self.places.clone_from(&store.plan.places);
        Ok(())
    }

    /// Its numbers.
    pub(crate) fn numbers(&self) -> AveragesNumbers {
        AveragesNumbers { update_count: self.update_count }
    }

    /// Its tensors, as far as this rank has them.
    pub(crate) fn held(&mut self, store: &Store) -> Result<Vec<Held>> {
        self.fit(store)?;
        let of = |named: &crate::store::model::Named| {
            let (shape, strides) = (named.tensor.size(), named.tensor.stride());
            let kind = work_kind(named.tensor.kind());
            Held::like(format!("ema/{}", named.name), kind, (&shape, &strides))
        };
        let mut all: Vec<Held> = store.model.parameters().map(of).collect::<Result<_>>()?;
        for average in &self.pieces {
            let parameter = average.piece.parameter;
            // Without the padding behind the parameter.
            let left = store.plan.places[parameter].range.len() - average.offset;
            let len = left.min(average.piece.run.range.len());
            let (start, end) = (average.offset as u64, (average.offset + len) as u64);
            let memory = average.values.f_narrow(0, 0, i64::try_from(len).unwrap_or(i64::MAX))?;
            all[parameter].parts.push(HeldPart { range: start..end, memory });
        }
        Ok(all)
    }

    /// Begins anew, as the parameters are when it is next asked.
    pub(crate) fn forget(&mut self) {
        self.update_count = 0;
        self.layout = None;
        self.pieces.clear();
    }

    /// Takes the numbers of a checkpoint over; its tensors were read already.
    pub(crate) fn go_on(&mut self, numbers: AveragesNumbers) {
        self.update_count = numbers.update_count;
    }
}

impl Average {
    /// The memory of the parameters that these are averages of.
    fn place(&self, store: &Store) -> Result<Tensor> {
        taken(&store.storages[self.storage].parameters, &self.piece.run)
    }
}

/// Averages of a piece that begin as it is.
fn begun(store: &Store, storage: usize, piece: &Piece) -> Result<Tensor> {
    let parameters = taken(&store.storages[storage].parameters, &piece.run)?;
    let kind = work_kind(parameters.kind());
    let mut values = Tensor::f_empty(parameters.size(), (kind, parameters.device()))?;
    values.f_copy_(&parameters)?;
    Ok(values)
}
