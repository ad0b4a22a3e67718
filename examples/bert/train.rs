//! The training loop: one optimizer step after the other, the same on every rank.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{ensure, Context as _, Result};
use phalanx_comm::{Group, Sum};
use phalanx_ddp_core::checkpoint::WeightsOptions;
use phalanx_ddp_core::feed::Feed;
use phalanx_ddp_core::optim::{Optimizer, Step};
use phalanx_ddp_core::schedule::Schedule;
use phalanx_ddp_core::{amp, Ddp, DdpOptions, Statistics, Sync};
use tch::{nn, Device, Kind};

use super::batching::Batching;
use super::config::{Config, FloatKind, NonFinite, Precision};
use super::data::Tensors;
use super::metrics::{milliseconds, StepRecord};
use super::model::{groups, BertForMaskedLm, Inputs, LossSum, Pass};
use super::resume::Part;
pub(crate) use super::updates::schedule;
use super::updates::{advised, count, rule, tokens};
use super::weights;

/// A rank's model and optimizer.
#[derive(Debug)]
pub(crate) struct Trainer {
    network: BertForMaskedLm,
    ddp: Ddp,
    optimizer: Optimizer,
    schedule: Schedule,
    plan: Plan,
    skipped_count: u64,
}

/// What the loop needs to know of the configuration.
#[derive(Debug, Clone, Copy)]
struct Plan {
    seed: u64,
    /// In which layers compute: that of parameters in half precision, or of autocast.
    kind: Kind,
    autocasts: bool,
    device: Device,
    /// Infinite where gradients are not clipped: their norm is wanted all the same.
    max_grad_norm: f64,
    non_finite: NonFinite,
    /// Number of this rank's first micro-batch among those of a global batch.
    first_micro_batch: usize,
}

/// Times and sums of the micro-batches of one step, of this rank.
#[derive(Debug, Default)]
struct Sums {
    loss: f64,
    masked_count: i64,
    token_count: usize,
    forward: Duration,
    backward: Duration,
}

/// Sums over all ranks that travel before what each rank waited for data.
const OWN_TOTALS: usize = 3;

impl Trainer {
    /// Wraps the network: rank 0's weights go to all. Collective.
    pub(crate) fn new(
        network: BertForMaskedLm,
        vs: &nn::VarStore,
        group: &mut Group,
        (config, batching, exchange): (&Config, Batching, bool),
    ) -> Result<Trainer> {
        let options = DdpOptions { exchange, ..config.ddp.options() };
        let network = network.recomputing(config.train.recompute);
        let ddp = Ddp::new(vs, group, options)?;
        config.ddp.hook.set(&ddp)?;
        let optimizer =
            Optimizer::new(&ddp, rule(&config.optimizer), groups(config.optimizer.rule))?;
        let norm = config.optimizer.max_grad_norm;
        Ok(Trainer {
            network,
            ddp,
            optimizer,
            schedule: schedule(&config.optimizer, config.train.steps)?,
            plan: Plan {
                seed: config.train.seed,
                kind: config
                    .ddp
                    .parameter_kind
                    .map_or(kind(config.train.precision), FloatKind::kind),
                autocasts: config.train.precision == Precision::Bf16,
                device: vs.device(),
                max_grad_norm: if norm > 0.0 { norm } else { f64::INFINITY },
                non_finite: config.ddp.non_finite,
                first_micro_batch: group.rank() * batching.accumulate,
            },
            skipped_count: 0,
        })
    }

    /// One optimizer step, from 1. Collective.
    pub(crate) fn step(
        &mut self,
        step: u64,
        feed: &mut Feed,
        group: &mut Group,
    ) -> Result<StepRecord> {
        let start = Instant::now();
        let batches = feed.next_step()?;
        let mut sums = Sums::default();
        let last = batches.micro_batches.len() - 1;
        for (index, batch) in batches.micro_batches.iter().enumerate() {
            let sync = if index == last { Sync::Reduce } else { Sync::Accumulate };
            let tensors = Tensors::of(batch)?;
            if index == last {
                self.ddp.at_step(step)?;
            }
            self.micro_batch(&tensors, (step, index), sync, &mut sums)?;
        }
        let Statistics { exposed_comm: exposed, bytes_sent, .. } = self.ddp.statistics()?;
        let data_wait_ms = milliseconds(batches.data_wait);
        let mut totals = vec![0.0; OWN_TOTALS + group.world_size()];
        let of_all = [sums.loss, count(sums.masked_count), count(sums.token_count)];
        totals[..OWN_TOTALS].copy_from_slice(&of_all);
        // Each rank adds to zeros at its own place.
        totals[OWN_TOTALS + group.rank()] = data_wait_ms;
        group.tagged("loss");
        let totals_work = group.all_reduce(&mut totals[..], Sum)?;
        let optimizer_start = Instant::now();
        let lr = self.schedule.lr(step - 1);
        self.optimizer.set_lr(lr)?;
        let Step { gradient_norm, skipped } = self.optimizer.step(Some(self.plan.max_grad_norm))?;
        let grad_norm = gradient_norm.unwrap_or(f64::NAN);
        self.skipped_count += u64::from(skipped);
        self.finish_device();
        let optimizer_time = optimizer_start.elapsed();
        totals_work.wait()?;
        let data_wait_ms_by_rank = totals.split_off(OWN_TOTALS);
        let (loss_sum, masked_count, token_count) = (totals[0], totals[1], totals[2]);
        let loss = loss_sum / masked_count;
        ensure!(
            masked_count > 0.0,
            "step {step}: no token of the global batch is masked; give larger batches"
        );
        // Where the user wants to go on, Ddp has said what there is to say.
        let goes_on =
            skipped || matches!(self.plan.non_finite, NonFinite::Warn | NonFinite::Ignore);
        ensure!(
            goes_on || loss.is_finite() && grad_norm.is_finite(),
            "step {step}: loss {loss}, gradient norm {grad_norm}; lower --lr or raise --warmup-steps"
        );
        let step_time = start.elapsed();
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
            forward_ms: milliseconds(sums.forward),
            backward_ms: milliseconds(sums.backward.saturating_sub(exposed)),
            exposed_comm_ms: milliseconds(exposed),
            pipeline_idle_ms: None,
            bytes_sent,
            optimizer_ms: milliseconds(optimizer_time),
            tokens_per_s: token_count / step_time.as_secs_f64(),
        })
    }

    fn micro_batch(
        &self,
        tensors: &Tensors,
        (step, index): (u64, usize),
        sync: Sync,
        sums: &mut Sums,
    ) -> Result<()> {
        // The number of the micro-batch in the global batch, not the rank: one rank that
        // accumulates four times drops what four ranks drop.
        let number = self.plan.first_micro_batch + index;
        tch::manual_seed(dropout_seed(self.plan.seed, step, number));
        let Tensors { ids, labels, attention_mask, token_count } = tensors;
        let inputs = Inputs { ids, labels, attention_mask: attention_mask.as_ref() };
        let pass = Pass { train: true, kind: self.plan.kind };
        let start = Instant::now();
        let forward = || self.network.loss(&inputs, pass);
        let LossSum { loss, masked_count } = match self.plan.autocasts {
            false => forward(),
            true => amp::autocast(self.plan.device, Kind::BFloat16, forward)?,
        }
        .context("forward")?;
        self.finish_device();
        sums.forward += start.elapsed();
        let middle = Instant::now();
        self.ddp
            .backward(&loss, count(masked_count), sync)
            .map_err(|error| advised(error, step))?;
        self.finish_device();
        sums.backward += middle.elapsed();
        sums.loss += loss.f_double_value(&[])?;
        sums.masked_count += masked_count;
        sums.token_count += token_count;
        Ok(())
    }
}

impl Trainer {
    /// Starts from the weights of a file that every rank sees. Returns the names in it that are not needed. Collective.
    pub(crate) fn load_weights(&self, path: &Path) -> Result<Vec<String>> {
        weights::load(path, &self.ddp)
    }

    /// Writes the weights to rank 0's `path`. Collective.
    pub(crate) fn save_weights(&self, path: &Path) -> Result<()> {
        Ok(self.ddp.save_weights(path, &WeightsOptions::default())?)
    }

    /// What checkpoints are made of.
    pub(crate) fn parts(&mut self) -> Vec<Part<'_>> {
        vec![("", &self.ddp, &mut self.optimizer)]
    }

    /// The run has left out so many steps before.
    pub(crate) fn go_on(&mut self, skipped_count: u64) {
        self.skipped_count = skipped_count;
    }

    /// Steps that were left out.
    pub(crate) fn skipped_count(&self) -> u64 {
        self.skipped_count
    }

    /// The ranks that the others waited for over the last exchanges, a line each.
    pub(crate) fn stragglers(&self) -> Result<Vec<String>> {
        let stragglers = self.ddp.statistics()?.stragglers;
        Ok(stragglers.iter().map(ToString::to_string).collect())
    }

    /// Waits for the GPU, so that times are those of the work and not of asking for it.
    fn finish_device(&self) {
        if let Device::Cuda(index) = self.plan.device {
            tch::Cuda::synchronize(i64::try_from(index).unwrap_or(-1));
        }
    }
}

pub(crate) fn kind(precision: Precision) -> Kind {
    match precision {
        Precision::Fp32 => Kind::Float,
        Precision::Bf16 => Kind::BFloat16,
    }
}

/// A seed of its own for each micro-batch of a run.
///
/// Source: the finalizer of `SplitMix64` (Steele et al., "Fast Splittable Pseudorandom Number
/// Generators", 2014).
fn dropout_seed(seed: u64, step: u64, number: usize) -> i64 {
    let mix = |value: u64| {
        let value = (value ^ (value >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let value = (value ^ (value >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        value ^ (value >> 31)
    };
    const STRIDE: u64 = 0x9e37_79b9_7f4a_7c15;
    let of_step = mix(seed.wrapping_add(step.wrapping_mul(STRIDE)));
    mix(of_step.wrapping_add((number as u64).wrapping_mul(STRIDE))).cast_signed()
}
