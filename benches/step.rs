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
//!
//! `--checks` compares something else: steps that look for what is not finite and compare fingerprints, as is the default,
//! with steps of a second model that do neither. A fingerprint is due in one step of a hundred, so at least that
//! many belong into a run.

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
use phalanx::{Ddp, Group, GroupOptions};
use phalanx_ddp_core::optim::{AdamW, Optimizer};
use phalanx_ddp_core::{amp, NonFinite, Sync};
use tch::{nn, Device, Kind, Tensor};

/// Rounds before the timed ones: allocators and caches are warm by then, the order of buckets is settled, and the
/// fingerprints of the first exchanges (1, 2, 4, 8) are behind, which are one in a hundred later.
const WARM_UP: usize = 9;

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
    /// What is sharded: 0 to 3, else what the configuration has.
    #[arg(long, value_parser = clap::value_parser!(u8).range(0..=3))]
    zero: Option<u8>,
    /// How gradients travel, as in a configuration.
    #[arg(long, default_value = "none")]
    hook: config::Hook,
    /// In which kind gradients add up and travel, `fp32` or `bf16`; else what the configuration has.
    #[arg(long)]
    gradients: Option<String>,
    /// Layers are computed again in backward.
    #[arg(long)]
    recompute: bool,
    /// Timed steps of each kind.
    #[arg(long, default_value_t = 20)]
    steps: usize,
    /// Measure what the look for non-finite gradients and the fingerprints cost.
    #[arg(long)]
    checks: bool,
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
struct Stepper {
    network: model::BertForMaskedLm,
    ddp: Ddp,
    optimizer: Optimizer,
    ids: Tensor,
    labels: Tensor,
    kind: Kind,
    has_exchange: bool,
    parameter_elements: usize,
}

/// What a step looks for.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Checks {
    /// As is the default.
    All,
    /// Not whether ranks have the same parameters: after steps without exchange they have not.
    Gradients,
    Nothing,
}

impl Stepper {
    fn new(flags: &Flags, group: &mut Group, checks: Checks) -> Result<Self> {
        let kind = kind_of("--precision", &flags.precision)?;
        let mut config = config::Config::read(Path::new(&flags.config))?;
        config.ddp.zero = flags.zero.unwrap_or(config.ddp.zero);
        let vs = nn::VarStore::new(Device::Cpu);
        let network = model::build(&vs, &config.model, 1, group.rank())?;
        let network = network.recomputing(flags.recompute);
        let mut options = config.ddp.options();
        if let Some(gradients) = &flags.gradients {
            options.gradient_kind = Some(kind_of("--gradients", gradients)?);
        }
        if checks != Checks::All {
            options.fingerprint_interval = 0;
        }
        if checks == Checks::Nothing {
            options.non_finite = NonFinite::Ignore;
        }
        let ddp = Ddp::new(&vs, group, options)?;
        flags.hook.set(&ddp)?;
        let optimizer = Optimizer::new(&ddp, AdamW::default(), model::groups(config::Rule::Adamw))?;
        let (ids, labels) = batch(config.model.vocab_size, flags.micro_batch);
        let parameter_elements = vs.trainable_variables().iter().map(Tensor::numel).sum();
        Ok(Self {
            network,
            ddp,
            optimizer,
            ids,
            labels,
            kind,
            has_exchange: true,
            parameter_elements,
        })
    }

    /// Milliseconds that this rank's step takes, with the exchange of gradients or without it. All ranks start
    /// together.
    fn time(&mut self, group: &mut Group, with_exchange: bool) -> Result<f64> {
        if self.has_exchange != with_exchange {
            self.ddp.set_exchange(with_exchange)?;
            self.has_exchange = with_exchange;
        }
        group.barrier()?.wait()?;
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

fn kind_of(flag: &str, value: &str) -> Result<Kind> {
    match value {
        "fp32" => Ok(Kind::Float),
        "bf16" => Ok(Kind::BFloat16),
        other => anyhow::bail!("{flag} {other}: expected fp32 or bf16"),
    }
}

fn measure(flags: &Flags) -> Result<()> {
    ensure!(flags.steps > 0, "--steps 0: at least one");
    let threads: i32 = std::env::var("OMP_NUM_THREADS").unwrap_or_default().parse().unwrap_or(1);
    tch::set_num_threads(threads);
    let mut group = Group::from_environment(GroupOptions::default())?;
    if flags.checks {
        let unchecked = Stepper::new(flags, &mut group, Checks::Nothing)?;
        let checked = Stepper::new(flags, &mut group, Checks::All)?;
        return compare_checks(&mut group, &mut [unchecked, checked], flags.steps);
    }
    let mut stepper = Stepper::new(flags, &mut group, Checks::Gradients)?;
    if flags.take_turns {
        return turns::serve(&mut group, &mut stepper);
    }
    compare(&mut group, &mut stepper, flags, threads)
}

/// Steps with the exchange and steps without it, taking turns.
fn compare(group: &mut Group, stepper: &mut Stepper, flags: &Flags, threads: i32) -> Result<()> {
    let mut times = [Vec::new(), Vec::new()];
    let mut slowest = [Vec::new(), Vec::new()];
    let mut exposed = Vec::new();
    for step in 0..flags.steps + WARM_UP {
        // Taking turns at who comes first: what drifts meets both alike.
        for with in [step % 2, 1 - step % 2] {
            let mut time = [stepper.time(group, with == 1)?];
            if step >= WARM_UP {
                times[with].push(time[0]);
                group.all_reduce(&mut time[..], Max)?.wait()?;
                slowest[with].push(time[0]);
                if with == 1 {
                    let statistics = stepper.ddp.statistics()?;
                    exposed.push(statistics.exposed_comm.as_secs_f64() * 1e3);
                }
            }
        }
    }
    if group.rank() == 0 {
        let [rank_without, rank_with] = times.map(median);
        let [without, with] = slowest.map(median);
        println!(
            "{} ranks × {threads} threads, {}, {} × 128 tokens: with exchange {with:.1} ms, without \
             {without:.1} ms, ratio {:.4} (rank 0 alone {:.4}); exposed {:.2} ms (median of {})",
            group.world_size(),
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

/// Steps that check gradients and parameters and steps that do not, taking turns. The mean: a fingerprint is rare.
fn compare_checks(group: &mut Group, both: &mut [Stepper; 2], steps: usize) -> Result<()> {
    let mut slowest = [Vec::new(), Vec::new()];
    for step in 0..steps + WARM_UP {
        for checked in [step % 2, 1 - step % 2] {
            let mut time = [both[checked].time(group, true)?];
            group.all_reduce(&mut time[..], Max)?.wait()?;
            if step >= WARM_UP {
                slowest[checked].push(time[0]);
            }
        }
    }
    if group.rank() == 0 {
        let mean = |times: &Vec<f64>| times.iter().sum::<f64>() / steps as f64;
        let [without, with] = [mean(&slowest[0]), mean(&slowest[1])];
        let [middle_without, middle_with] = slowest.map(median);
        println!(
            "checks: a step with {with:.2} ms, without {without:.2} ms, ratio {:.4}; medians {middle_with:.2} and \
             {middle_without:.2} ms, ratio {:.4} ({steps} steps of each)",
            with / without,
            middle_with / middle_without,
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
