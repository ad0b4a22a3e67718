//! Runs a [`Schedule`] on the ranks of a pipeline.
//!
//! A [`Stage`] runs one micro-batch through one chunk; everything else is here. The output of a chunk goes to the rank of the next one, the
//! gradient of its input to the rank of the one before, and every backward goes through [`Ddp`], so that it accumulates, exchanges and shards as
//! in one process that accumulates over the same micro-batches: with the same bits.
//!
//! * A backward that starts from another stage's gradient is one from a scalar whose backward is that gradient (`boundary.rs`).
//! * The gradient of an input is sent from inside of the backward, so that nobody waits for the exchange of gradients that the last one of a step ends with.
//! * Where the schedule has gradients of weights apart (ZB-H1), products put theirs off ([`Deferred`](crate::layer::Deferred)), and they reach `Ddp` as a backward of their own.
//! * Receives are asked for ahead, sends waited for late (`messages.rs`); shapes are agreed on before the first step (`agree.rs`).
//! * What fails on one rank ends the groups of all: pipeline and data-parallel ranks hear the error's text.
//!
//! # Source
//! Narayanan et al. 2021 (section 2.2); PyTorch's `torch/distributed/pipelining` for what a stage is; Qi et al. 2023 for backwards in two parts.

mod agree;
mod boundary;
mod messages;
mod names;
mod stage;
mod step;
mod tied;

use std::time::Instant;

use phalanx_comm::Backend;
use phalanx_ddp_core::collective::TensorGroup;
use phalanx_ddp_core::Ddp;
use tch::Device;

pub use stage::{Computing, Shaped, Stage, StepOutput};

use super::schedule::{Schedule, Sending};
use crate::error::{Error, Result};
use crate::layer::random::Key;
use crate::mesh::Mesh;
use names::{plain, Names};
use step::{Failed, Step};
use tied::Tied;

/// A rank's part in a pipeline.
///
/// # Example
/// ```
/// use phalanx_comm::{Group, GroupOptions};
/// use phalanx_ddp_core::collective::TensorGroup;
/// use phalanx_ddp_core::optim::{Optimizer, ParameterGroups, Sgd};
/// use phalanx_ddp_core::{Ddp, DdpOptions};
/// use phalanx_model_parallel::layer::{linear, Builder, Init};
/// use phalanx_model_parallel::pipeline::schedule::{Schedule, ScheduleKind};
/// use phalanx_model_parallel::pipeline::{partition, Pipeline};
/// use tch::{nn, Device, Kind, Tensor};
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let pp = Group::single(GroupOptions::default())?; // of a mesh: groups.take(Axes::PP)?
/// let mut dp = Group::single(GroupOptions::default())?; // groups.take(Axes::DP_CP)?
/// let (rank, ranks) = (pp.rank(), pp.world_size());
/// let layers = partition::partition(&[1.0; 4], ranks)?[rank].clone();
/// let vs = nn::VarStore::new(Device::Cpu);
/// let root = Builder::new(vs.root(), 1);
/// let weights = layers
///     .map(|layer| (&root / layer).whole("weight", &[8, 8], Init::Normal { std: 0.3 }))
///     .collect::<Result<Vec<_>, _>>()?;
/// let ddp = Ddp::new(&vs, &mut dp, DdpOptions::default())?;
/// let mut optimizer = Optimizer::new(&ddp, Sgd::default(), ParameterGroups::default())?;
///
/// let samples = Tensor::ones([4, 2, 8], (Kind::Float, Device::Cpu)); // 4 micro-batches of 2
/// let mut stage = |_chunk: usize, micro_batch: usize, input: Option<Tensor>| {
///     let mut x = input.unwrap_or_else(|| samples.get(micro_batch as i64));
///     for weight in &weights {
///         x = linear(&x, weight, None)?.f_tanh()?;
///     }
///     match rank + 1 == ranks {
///         true => Ok(x.f_square()?.f_sum(Kind::Float)?), // the sum of the losses
///         false => Ok(x),
///     }
/// };
/// let schedule = Schedule::new(ScheduleKind::OneFOneB, ranks, 4)?;
/// let mut pipeline = Pipeline::new(TensorGroup::new(pp), schedule, Device::Cpu)?;
/// let mut losses = Vec::new();
/// for _ in 0..3 {
///     let output = pipeline.step(&mut stage, &ddp, &[2.0; 4])?; // weights: samples
///     optimizer.step(None)?;
///     losses.push(output.loss_sum() / 8.0);
/// }
/// assert!(losses[2] < losses[0]);
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct Pipeline {
    group: TensorGroup,
    schedule: Schedule,
    device: Device,
    names: Names,
    /// What each stage gives to the next, once that is agreed on.
    agreed: Option<Vec<Shaped>>,
    tied: Vec<Tied>,
    /// Whether messages between two computations go together, and none is asked for ahead.
    is_together: bool,
}

impl Pipeline {
    /// A pipeline over the ranks of `group`, in their order, with activations on `device`. Collective.
    ///
    /// # Errors
    /// [`Error::Flaw`]; [`Error::PipelineMismatch`] where the schedule has not as many ranks as the group, and, on every rank, where another rank has another schedule;
    /// [`Error::BadSetting`] for a schedule that could wait for ever over NCCL; [`Error::Ddp`] where the group is dead.
    pub fn new(group: TensorGroup, schedule: Schedule, device: Device) -> Result<Self> {
        schedule.verify()?;
        let names = Names::numbered(group.world_size());
        let ranks = schedule.rank_count();
        if ranks != group.world_size() {
            return Err(Error::PipelineMismatch {
                who: "the group of the pipeline".to_owned(),
                what: format!("it has {} ranks", group.world_size()),
                expected: format!("the {ranks} of the schedule"),
            });
        }
        let is_together =
            device.is_cuda() && group.with_group(|group| group.backend() == Backend::Nccl);
        let (agreed, tied) = (None, Vec::new());
        let made = Self { group, schedule, device, names, agreed, tied, is_together: false };
        made.compare_schedules()?;
        if is_together {
            made.together()
        } else {
            Ok(made)
        }
    }

    /// Errors call ranks by their places in the mesh; `rank` is this one in the world.
    ///
    /// # Errors
    /// [`Error::NoSuchRank`].
    pub fn on_mesh(self, mesh: &Mesh, rank: usize) -> Result<Self> {
        Ok(Self { names: Names::of_mesh(mesh, rank)?, ..self })
    }

    /// Messages that stand between two computations are started together and waited for together, and none is asked for ahead. Over NCCL, whose messages of a group wait for
    /// each other, it is so anyway; elsewhere it takes longer.
    ///
    /// # Errors
    /// [`Error::BadSetting`] for a schedule that could wait for ever so.
    pub fn together(self) -> Result<Self> {
        if self.schedule.ends_with(Sending::Together).is_err() {
            return Err(Error::BadSetting {
                setting: "pipeline schedule",
                value: "whose sends must not wait, with messages that go together".to_owned(),
                expected: "gpipe, 1f1b or zb-h1 over NCCL, or interleaved with activations in the host's memory or over MPI",
            });
        }
        Ok(Self { is_together: true, ..self })
    }

    /// The stage that is this chunk of this rank.
    #[must_use]
    pub(crate) fn stage(&self, chunk: usize) -> usize {
        self.schedule.stage(self.group.rank(), chunk)
    }

    /// Runs a step: all micro-batches forward and backward, and the exchange of their gradients, which are then Σ gradients / Σ weights over micro-batches and the ranks of `ddp`. Collective.
    ///
    /// `weights` has for each micro-batch its samples or tokens, as in [`Ddp::backward`]: the same on all ranks of the pipeline.
    ///
    /// # Determinism
    /// Losses and gradients have the bits of one process that runs all stages and accumulates over the micro-batches. Under ZB-H1 that holds for weights that are used by
    /// [`linear`](crate::layer::linear) alone, or by other operations alone; weights that are [tied](Self::tie) add up in each stage first.
    ///
    /// # Errors
    /// [`Error::Pipeline`], with what the rank was doing and why it failed: the stage's own error, one of the backward, or the failure of another rank. The
    /// groups of the pipeline and of `ddp` are dead then. [`Error::PipelineMismatch`], on every rank, where shapes do not fit or weights differ.
    pub fn step(
        &mut self,
        stage: &mut impl Stage,
        ddp: &Ddp,
        weights: &[f64],
    ) -> Result<StepOutput> {
        let start = Instant::now();
        self.settle(stage)?;
        let mut step = Step::new(self, stage, Some((ddp, weights)));
        let outcome = step.run().and_then(|()| step.told());
        let (idle, computing) = (step.idle(), step.computing);
        match outcome {
            Ok(losses) => Ok(StepOutput { losses, idle, elapsed: start.elapsed(), computing }),
            Err(failed) => Err(self.failed(Some(ddp), failed)),
        }
    }

    /// Runs all micro-batches forward alone, without recording: the last stage's losses, on every rank. Collective.
    ///
    /// # Errors
    /// As [`step`](Self::step).
    pub fn evaluate(&mut self, stage: &mut impl Stage) -> Result<Vec<f64>> {
        self.settle(stage)?;
        let mut step = Step::new(self, stage, None);
        let outcome = step.run().and_then(|()| step.told());
        outcome.map_err(|failed| self.failed(None, failed))
    }

    fn settle(&mut self, stage: &mut impl Stage) -> Result<()> {
        if self.agreed.is_none() {
            self.agree(stage)?;
        }
        Ok(())
    }

    /// An error of this rank, of which all others hear.
    fn failed(&self, ddp: Option<&Ddp>, failed: Failed) -> Error {
        let Failed { at, error } = failed;
        if matches!(*error, Error::PipelineMismatch { .. }) {
            return *error; // all ranks have it
        }
        let whom = self.names.whom(self.group.failure().as_ref());
        let at = match at {
            Some(action) => {
                let stage = self.stage(action.part().chunk);
                format!("{}, stage {stage}, {action}", self.names.of(self.group.rank()))
            }
            None => format!("{}, end of the step", self.names.of(self.group.rank())),
        };
        let told = Error::Pipeline { at, whom, source: error };
        let text = told.to_string();
        self.group.abort(plain(&text));
        match ddp.map(|ddp| ddp.abort(plain(&text))) {
            Some(Err(poisoned)) => poisoned.into(),
            _ => told,
        }
    }

    /// An error, on every rank, where another one has another schedule.
    fn compare_schedules(&self) -> Result<()> {
        let schedule = &self.schedule;
        let fingerprint = Key::of_seed(0).named(&format!("{schedule:?}")).value();
        let (m, v) = (schedule.micro_batch_count(), schedule.chunk_count());
        let mine = format!("{m} micro-batches, {v} chunks a rank, actions {fingerprint:016x}");
        let tag = "schedule of the pipeline";
        let all =
            self.group.with_group(|group| group.tagged(tag).all_gather_bytes(mine.as_bytes()))?;
        let text = |rank: usize| String::from_utf8_lossy(&all[rank]).into_owned();
        match (1..all.len()).find(|rank| all[*rank] != all[0]) {
            None => Ok(()),
            Some(rank) => Err(Error::PipelineMismatch {
                who: self.names.of(rank).to_owned(),
                what: format!("a schedule of {}", text(rank)),
                expected: format!("rank 0's, of {}", text(0)),
            }),
        }
    }
}
