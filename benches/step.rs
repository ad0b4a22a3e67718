//! What the exchange of gradients costs: a step with it beside a step without it, alternating in one run.
//!
//! ```text
//! cargo bench --bench step -- --nnodes 2 --threads 1 --precision fp32
//! ```
//!
//! The model is `configs/bert_small.json` (4 layers, 256 hidden) on random tokens. Ranks meet in a barrier
//! before each timed step, outside the time, so that a step with exchange does not pay for skew that steps
//! without it left behind. A step is done when the slowest rank is: with exchange all ranks wait for it anyway.
//! The figure is the ratio of the medians; rank 0's own (which also counts its waiting for slower ranks) is
//! printed beside it.

#![expect(clippy::print_stdout, clippy::print_stderr, reason = "a program talks to its user")]
#![allow(clippy::cast_precision_loss, reason = "token counts are far below 2^53")]
#![allow(dead_code, unused_imports, reason = "uses a part of the example's modules")]

#[path = "../examples/bert/config/mod.rs"]
mod config;
#[path = "../examples/bert/model.rs"]
mod model;
#[path = "step/turns.rs"]
mod turns;

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Instant;

use anyhow::{ensure, Context as _, Result};
use clap::Parser;
use phalanx::comm::Max;
use phalanx::launch::{launch_or_join, Joined, LaunchArgs};
use phalanx::{Ddp, DdpOptions, Group, GroupOptions, Zero};
use phalanx_ddp_core::optim::{AdamW, Optimizer};
use phalanx_ddp_core::{amp, Sync};
use tch::{nn, Device, Kind, Tensor};

#[derive(Debug, Parser)]
#[expect(
    clippy::struct_excessive_bools,
    reason = "two flags that have nothing to do with each other"
)]
struct Flags {
    #[command(flatten)]
    launch: LaunchArgs,
    /// Model to measure.
    #[arg(long, default_value = "configs/bert_small.json")]
    config: PathBuf,
    /// `fp32` or `bf16`.
    #[arg(long, default_value = "fp32")]
    precision: String,
    /// Samples of 128 tokens on each rank.
    #[arg(long, default_value_t = 8)]
    micro_batch: i64,
    /// What is sharded: 0 or 1, else what the configuration has.
    #[arg(long)]
    zero: Option<u8>,
    /// Timed steps of each kind.
    #[arg(long, default_value_t = 20)]
    steps: usize,
    /// A rank beside PyTorch: makes the steps that standard input asks for (`scripts/bench_ddp.sh`).
    #[arg(long, hide = true)]
    take_turns: bool,
    /// Passed by cargo.
    #[arg(long, hide = true)]
    bench: bool,
}

fn main() -> ExitCode {
    let flags = Flags::parse();
    let run = || match launch_or_join(&flags.launch)? {
        Joined::Finished(report) => Ok(report.exit_code()),
        Joined::Worker => measure(&flags).map(|()| ExitCode::SUCCESS),
    };
    run().unwrap_or_else(|error: anyhow::Error| {
        eprintln!("error: {error:#}");
        ExitCode::FAILURE
    })
}

/// One rank's model, and what a step of it needs.
struct Stepper<'a> {
    network: &'a model::BertForMaskedLm,
    ddp: &'a Ddp,
    optimizer: Optimizer,
    group: Group,
    ids: Tensor,
    labels: Tensor,
    kind: Kind,
    parameter_elements: usize,
}

impl Stepper<'_> {
    /// Milliseconds that this rank's step takes, with the exchange of gradients or without it. All ranks start
    /// together.
    fn time(&mut self, with_exchange: bool) -> Result<f64> {
        self.ddp.set_exchange(with_exchange)?;
        self.group.barrier()?.wait()?;
        let start = Instant::now();
        let inputs = model::Inputs { ids: &self.ids, labels: &self.labels, attention_mask: None };
        let forward = || self.network.loss(&inputs, model::Pass { train: true, kind: self.kind });
        let sum = match self.kind {
            Kind::Float => forward(),
            narrow => amp::autocast(Device::Cpu, narrow, forward)?,
        }
        .context("forward")?;
        self.ddp.backward(&sum.loss, sum.masked_count as f64, Sync::Reduce)?;
        self.optimizer.step(None)?;
        Ok(start.elapsed().as_secs_f64() * 1e3)
    }
}

fn measure(flags: &Flags) -> Result<()> {
    let kind = match flags.precision.as_str() {
        "fp32" => Kind::Float,
        "bf16" => Kind::BFloat16,
        other => anyhow::bail!("--precision {other}: expected fp32 or bf16"),
    };
    ensure!(flags.steps > 0, "--steps 0: at least one");
    let threads: i32 = std::env::var("OMP_NUM_THREADS").unwrap_or_default().parse().unwrap_or(1);
    tch::set_num_threads(threads);
    let mut group = Group::from_environment(GroupOptions::default())?;
    let config = config::Config::read(Path::new(&flags.config))?;
    let vs = nn::VarStore::new(Device::Cpu);
    let network = model::build(&vs, &config.model, 1, group.rank())?;
    let zero = match flags.zero.unwrap_or(config.ddp.zero) {
        0 => Zero::Off,
        1 => Zero::One,
        other => anyhow::bail!("--zero {other}: expected 0 or 1"),
    };
    let options = DdpOptions { zero, ..DdpOptions::default() };
    let ddp = Ddp::new(&vs, &mut group, options)?;
    let optimizer = Optimizer::new(&ddp, AdamW::default(), model::groups())?;
    let (ids, labels) = batch(config.model.vocab_size, flags.micro_batch);
    let parameter_elements = vs.trainable_variables().iter().map(Tensor::numel).sum();
    let (network, ddp) = (&network, &ddp);
    let mut stepper =
        Stepper { network, ddp, optimizer, group, ids, labels, kind, parameter_elements };
    if flags.take_turns {
        return turns::serve(&mut stepper);
    }
    compare(&mut stepper, flags, threads)
}

/// Steps with the exchange and steps without it, taking turns.
fn compare(stepper: &mut Stepper<'_>, flags: &Flags, threads: i32) -> Result<()> {
    let mut times = [Vec::new(), Vec::new()];
    let mut slowest = [Vec::new(), Vec::new()];
    let mut exposed = Vec::new();
    for step in 0..flags.steps + 2 {
        // Taking turns at who comes first: what drifts meets both alike.
        for with in [step % 2, 1 - step % 2] {
            let mut time = [stepper.time(with == 1)?];
            // The first two rounds warm up allocators and caches.
            if step >= 2 {
                times[with].push(time[0]);
                stepper.group.all_reduce(&mut time[..], Max)?.wait()?;
                slowest[with].push(time[0]);
                if with == 1 {
                    let statistics = stepper.ddp.statistics()?;
                    exposed.push(statistics.exposed_comm.as_secs_f64() * 1e3);
                }
            }
        }
    }
    if stepper.group.rank() == 0 {
        let [rank_without, rank_with] = times.map(median);
        let [without, with] = slowest.map(median);
        println!(
            "{} ranks × {threads} threads, {}, {} × 128 tokens: with exchange {with:.1} ms, without \
             {without:.1} ms, ratio {:.4} (rank 0 alone {:.4}); exposed {:.2} ms (median of {})",
            stepper.group.world_size(),
            flags.precision,
            flags.micro_batch,
            with / without,
            rank_with / rank_without,
            median(exposed),
            flags.steps,
        );
    }
    Ok(())
}

/// Random tokens, every seventh to be predicted; a few values drawn by a formula are random enough.
fn batch(vocab_size: i64, samples: i64) -> (Tensor, Tensor) {
    let at = Tensor::arange(samples * 128, (Kind::Int64, Device::Cpu)).reshape([samples, 128]);
    let ids = (&at * 7919 + 13).remainder(vocab_size - 5) + 5;
    let predicted = at.remainder(7).eq(0);
    let labels = ids.where_self(&predicted, &Tensor::from(model::IGNORED));
    (ids, labels)
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}
