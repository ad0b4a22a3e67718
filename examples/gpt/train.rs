//! The training loop: one optimizer step after the other, the same on every rank of the mesh.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{ensure, Result};
use phalanx_comm::{Group, Sum};
use phalanx_ddp_core::feed::{Feed, TensorStep};
use phalanx_ddp_core::optim::{Optimizer, Step};
use phalanx_ddp_core::schedule::Schedule as Rates;
use phalanx_ddp_core::{amp, Ddp, ModelPart, Statistics};
use phalanx_model_parallel::layer::{Builder, Pass};
use phalanx_model_parallel::pipeline::schedule::{Schedule, ScheduleKind};
use phalanx_model_parallel::pipeline::{Pipeline, Shaped, Stage};
use tch::{nn, Device, Kind, Tensor};

use super::batching::Batching;
use super::config::{Config, FloatKind, NonFinite, Precision};
use super::data::{label_count, Tensors};
use super::experts::{self, Experts};
use super::metrics::{milliseconds, StepRecord};
use super::model::{groups, Gpt};
use super::place::Place;
use super::resume::Part;
use super::updates::{advised, count, rule, schedule, tokens};
use super::weights;

/// A rank's part of the model, and its optimizer.
#[derive(Debug)]
pub(crate) struct Trainer {
    pub(super) network: Gpt,
    pub(super) place: Place,
    pub(super) plan: Plan,
    ddp: Ddp,
    optimizer: Optimizer,
    experts: Option<Experts>,
    pipeline: Pipeline,
    rates: Rates,
    /// Whether gradients are exchanged behind all backwards: those of tied weights are added up before.
    exchanges_late: bool,
    last_ids: Option<Tensor>,
    skipped_count: u64,
}

/// What the loop needs to know of the configuration.
#[derive(Debug, Clone, Copy)]
pub(super) struct Plan {
    /// In which layers compute: that of parameters in half precision, or of autocast.
    pub(super) kind: Kind,
    pub(super) autocasts: bool,
    pub(super) device: Device,
    /// Infinite where gradients are not clipped: their norm is wanted all the same.
    max_grad_norm: f64,
    non_finite: NonFinite,
    /// Number of this rank's first sample in a global batch.
    first_sample: u64,
    pub(super) width: i64,
    /// Ranks over which tokens between blocks are cut.
    pub(super) token_parts: i64,
    /// What the length of a sequence is a multiple of.
    pub(super) tokens_of: usize,
}

/// A micro-batch, and the number of its first sample in the global batch.
type Numbered = (Tensors, u64);

/// The micro-batches of a step, as the stages see them.
struct Batches<'t> {
    network: &'t Gpt,
    place: &'t Place,
    plan: Plan,
    tensors: &'t [Numbered],
    step: u64,
    forward: Duration,
}

impl Stage for Batches<'_> {
    fn forward(
        &mut self,
        chunk: usize,
        micro_batch: usize,
        input: Option<Tensor>,
    ) -> phalanx_model_parallel::Result<Tensor> {
        let start = Instant::now();
        let (Tensors { ids, labels, predicted }, first_sample) = &self.tensors[micro_batch];
        let tokens = self.place.together.context.tokens(ids.size()[1])?;
        let pass = Pass { tokens, ..Pass::training(self.step, *first_sample) };
        let compute = || {
            let hidden = self.network.hidden(chunk, (ids, input), (&pass, *predicted))?;
            match self.network.ends(chunk) {
                true => self.network.loss(chunk, &hidden, labels),
                false => Ok(hidden),
            }
        };
        let output = match self.plan.autocasts {
            false => compute(),
            true => amp::autocast(self.plan.device, Kind::BFloat16, compute)?,
        };
        self.plan.finish_device();
        self.forward += start.elapsed();
        output
    }

    fn output(&self, chunk: usize) -> Option<Shaped> {
        if self.network.ends(chunk) {
            return Some(Shaped { shape: Vec::new(), kind: Kind::Float });
        }
        let (samples, length) = self.tensors[0].0.ids.size2().ok()?;
        let shape = vec![samples, length / self.plan.token_parts, self.plan.width];
        Some(Shaped { shape, kind: self.plan.kind })
    }
}

impl Trainer {
    /// Builds this rank's layers, which begin alike on every mesh, and wraps them. Collective over the world.
    pub(crate) fn new(
        vs: &nn::VarStore,
        (mut place, world): (Place, &mut Group),
        (config, batching, exchange): (&Config, Batching, bool),
    ) -> Result<Trainer> {
        let layers = place.layers(config)?;
        let root = Builder::new(vs.root(), config.train.seed);
        let network = Gpt::new(&root, &config.model, &layers, &place.together)?;
        let network = network.recomputing(config.train.recompute);
        let kind = config.mesh.schedule()?;
        let schedule_of = Schedule::new(kind, place.stages.world_size(), batching.accumulate)?;
        let mut pipeline = Pipeline::new(place.stages.clone(), schedule_of, vs.device())?
            .on_mesh(&place.mesh, place.rank)?;
        let mut exchanges_late = false;
        if let Some((name, table)) = network.tied(&config.model) {
            pipeline.tie(&name, table)?;
            exchanges_late = table.is_some() && place.stages.world_size() > 1;
        }
        let options = phalanx_ddp_core::DdpOptions { exchange, ..config.ddp.options() };
        let (of_experts, cuts) = experts::divided(root.cuts());
        let (ddp, expert_ddp) = match &mut place.experts {
            None => (Ddp::new(vs, &mut place.data, options)?, None),
            Some(experts) => {
                let (shared, own) = experts.wrap(vs, &options)?;
                (shared, Some(own))
            }
        };
        ddp.set_part(ModelPart { model: &mut place.model, world, cuts })?;
        if let (Some(own), Some(experts)) = (&expert_ddp, &mut place.experts) {
            experts.set_part(own, world, of_experts)?;
        }
        let optimizer_of = |of: &Ddp| -> Result<Optimizer> {
            config.ddp.hook.set(of)?;
            let (rule, groups) = (rule(&config.optimizer), groups(config.optimizer.rule));
            Ok(Optimizer::new(of, rule, groups)?)
        };
        let optimizer = optimizer_of(&ddp)?;
        let experts = match expert_ddp {
            Some(own) => Some(Experts { optimizer: optimizer_of(&own)?, ddp: own }),
            None => None,
        };
        let plan = Plan::new(config, (&place, batching), vs.device());
        let rates = schedule(&config.optimizer, config.train.steps)?;
        Ok(Trainer {
            network,
            place,
            plan,
            ddp,
            optimizer,
            experts,
            pipeline,
            rates,
            exchanges_late,
            last_ids: None,
            skipped_count: 0,
        })
    }

    /// One optimizer step, from 1. Collective.
    pub(crate) fn step(&mut self, step: u64, feed: &mut Feed) -> Result<StepRecord> {
        let start = Instant::now();
        let batches = feed.next_step()?;
        let data_wait_ms = milliseconds(batches.data_wait);
        let (tensors, weights) = self.micro_batches(&batches)?;
        self.last_ids = tensors.first().map(|(tensors, _)| tensors.ids.shallow_clone());
        self.ddps().into_iter().try_for_each(|ddp| ddp.at_step(step))?;
        let Self { network, place, plan, ddp, pipeline, .. } = self;
        let mut stage = Batches {
            network,
            place,
            plan: *plan,
            tensors: &tensors,
            step,
            forward: Duration::ZERO,
        };
        let output = pipeline.step(&mut stage, ddp, &weights);
        let output = output.map_err(|error| told(error, step))?;
        let forward = stage.forward;
        if let Some(experts) = self.experts.as_ref().filter(|_| self.exchanges_late) {
            experts.ddp.exchange_weighted().map_err(|error| advised(error, step))?;
        }
        let (exposed, bytes_sent) = self.exchanged()?;
        let optimizer_start = Instant::now();
        let lr = self.rates.lr(step - 1);
        let mut optimizers = vec![&mut self.optimizer];
        optimizers.extend(self.experts.as_mut().map(|experts| &mut experts.optimizer));
        optimizers.iter_mut().try_for_each(|optimizer| optimizer.set_lr(lr))?;
        let Step { gradient_norm, skipped } =
            Optimizer::step_all(&mut optimizers, Some(self.plan.max_grad_norm), None)
                .map_err(|error| advised(error, step))?;
        let grad_norm = gradient_norm.unwrap_or(f64::NAN);
        self.skipped_count += u64::from(skipped);
        self.plan.finish_device();
        let optimizer_time = optimizer_start.elapsed();
        let mut totals = vec![output.loss_sum(), weights.iter().sum()];
        totals.resize(OWN_TOTALS + self.place.data.world_size(), 0.0);
        // Each rank adds to zeros at its own place.
        totals[OWN_TOTALS + self.place.data.rank()] = data_wait_ms;
        self.place.data.tagged("loss").all_reduce(&mut totals[..], Sum)?.wait()?;
        let data_wait_ms_by_rank = totals.split_off(OWN_TOTALS);
        let (loss_sum, token_count) = (totals[0], totals[1]);
        ensure!(token_count > 0.0, "step {step}: nothing of the global batch is to be predicted");
        let loss = loss_sum / token_count;
        self.check(step, (loss, grad_norm, skipped))?;
        let step_time = start.elapsed();
        let backward = output.elapsed.saturating_sub(forward + output.idle + exposed);
        Ok(StepRecord {
            step,
            loss,
            lr,
            grad_norm,
            skipped: u8::from(skipped),
            tokens: tokens(token_count),
            left_out: batches.left_out,
            step_ms: milliseconds(step_time),
            data_wait_ms,
            data_wait_ms_by_rank,
            forward_ms: milliseconds(forward),
            backward_ms: milliseconds(backward),
            exposed_comm_ms: milliseconds(exposed),
            pipeline_idle_ms: (self.place.stages.world_size() > 1)
                .then(|| milliseconds(output.idle)),
            bytes_sent,
            optimizer_ms: milliseconds(optimizer_time),
            tokens_per_s: token_count / step_time.as_secs_f64(),
        })
    }

    /// The tensors of the step, each with the number of its first sample, and how many tokens of each this rank's part of the sequences predicts.
    fn micro_batches(&self, batches: &TensorStep) -> Result<(Vec<Numbered>, Vec<f64>)> {
        let (mut all, mut weights) = (Vec::new(), Vec::new());
        let mut first_sample = self.plan.first_sample;
        for batch in &batches.micro_batches {
            let tensors = Tensors::of(batch)?;
            let mine = self.place.together.context.cut(&tensors.labels)?;
            weights.push(count(label_count(&mine)?));
            let samples = tensors.ids.size()[0].unsigned_abs();
            all.push((tensors, first_sample));
            first_sample += samples;
        }
        Ok((all, weights))
    }

    /// An error where numbers are not finite, and the user does not want to go on.
    fn check(&self, step: u64, (loss, grad_norm, skipped): (f64, f64, bool)) -> Result<()> {
        let goes_on =
            skipped || matches!(self.plan.non_finite, NonFinite::Warn | NonFinite::Ignore);
        ensure!(
            goes_on || loss.is_finite() && grad_norm.is_finite(),
            "step {step}: loss {loss}, gradient norm {grad_norm}; lower --lr or raise --warmup-steps"
        );
        Ok(())
    }

    /// Starts from the weights of a file that every rank sees. Returns the names in it that are not needed. Collective.
    pub(crate) fn load_weights(&self, path: &Path) -> Result<Vec<String>> {
        weights::load(path, &self.ddps())
    }

    /// Writes the weights to rank 0's `path`. Collective.
    pub(crate) fn save_weights(&self, path: &Path) -> Result<()> {
        weights::save(path, &self.ddps(), self.place.rank == 0)
    }

    /// What checkpoints are made of.
    pub(crate) fn parts(&mut self) -> Vec<Part<'_>> {
        let experts = self.experts.as_mut();
        let experts = experts.map(|own| ("experts", &own.ddp, &mut own.optimizer));
        [("", &self.ddp, &mut self.optimizer)].into_iter().chain(experts).collect()
    }

    /// Of what all ranks of a stage have, and of experts.
    fn ddps(&self) -> Vec<&Ddp> {
        let experts = self.experts.as_ref().map(|experts| &experts.ddp);
        [&self.ddp].into_iter().chain(experts).collect()
    }

    /// How long the last exchanges were waited for, and what they sent.
    fn exchanged(&self) -> Result<(Duration, u64)> {
        let mut sum = (Duration::ZERO, 0);
        for ddp in self.ddps() {
            let Statistics { exposed_comm, bytes_sent, .. } = ddp.statistics()?;
            sum = (sum.0 + exposed_comm, sum.1 + bytes_sent);
        }
        Ok(sum)
    }

    /// The run has left out so many steps before.
    pub(crate) fn go_on(&mut self, skipped_count: u64) {
        self.skipped_count = skipped_count;
    }

    /// Steps that were left out.
    pub(crate) fn skipped_count(&self) -> u64 {
        self.skipped_count
    }

    /// The ranks that read different samples.
    pub(crate) fn readers(&mut self) -> &mut Group {
        &mut self.place.readers
    }

    /// How the last step's first sequence begins.
    pub(crate) fn beginning(&self, tokens: usize) -> Result<Vec<i64>> {
        let Some(ids) = &self.last_ids else { return Ok(Vec::new()) };
        let tokens = i64::try_from(tokens)?.min(ids.size()[1]);
        Ok(Vec::try_from(ids.f_select(0, 0)?.f_narrow(0, 0, tokens)?.f_to_device(Device::Cpu)?)?)
    }

    /// The ranks that the others waited for over the last exchanges, a line each.
    pub(crate) fn stragglers(&self) -> Result<Vec<String>> {
        let stragglers = self.ddp.statistics()?.stragglers;
        Ok(stragglers.iter().map(ToString::to_string).collect())
    }
}

/// Sums over all ranks that travel before what each rank waited for data.
const OWN_TOTALS: usize = 2;

impl Plan {
    fn new(config: &Config, (place, batching): (&Place, Batching), device: Device) -> Self {
        let norm = config.optimizer.max_grad_norm;
        let precision = match config.train.precision {
            Precision::Fp32 => Kind::Float,
            Precision::Bf16 => Kind::BFloat16,
        };
        let (reader, readers) = place.reader();
        let (each, more) = (batching.global_batch / readers, batching.global_batch % readers);
        let sequence = if config.mesh.sequence_parallel { config.mesh.tp } else { 1 };
        Plan {
            // Autocast computes products in bf16; what goes from block to block stays in f32.
            kind: config.ddp.parameter_kind.map_or(Kind::Float, FloatKind::kind),
            autocasts: precision == Kind::BFloat16,
            device,
            max_grad_norm: if norm > 0.0 { norm } else { f64::INFINITY },
            non_finite: config.ddp.non_finite,
            first_sample: (reader * each + reader.min(more)) as u64,
            width: config.model.hidden_size,
            token_parts: i64::try_from(config.mesh.cp * sequence).unwrap_or(1),
            tokens_of: config.mesh.tokens_of(),
        }
    }

    /// Waits for the GPU, so that times are those of the work and not of asking for it.
    fn finish_device(&self) {
        if let Device::Cuda(index) = self.device {
            tch::Cuda::synchronize(i64::try_from(index).unwrap_or(-1));
        }
    }
}

/// The schedule with which one sequence goes through all stages.
pub(super) fn single_pass(kind: ScheduleKind, stages: usize) -> Result<Schedule> {
    Ok(match kind {
        // Its micro-batches come in rounds of as many as there are stages.
        ScheduleKind::Interleaved { .. } => Schedule::new(kind, stages, stages)?,
        _ => Schedule::new(ScheduleKind::GPipe, stages, 1)?,
    })
}

fn told(error: phalanx_model_parallel::Error, step: u64) -> anyhow::Error {
    match error {
        phalanx_model_parallel::Error::Ddp(error) => advised(error, step),
        other => other.into(),
    }
}
