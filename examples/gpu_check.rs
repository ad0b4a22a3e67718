//! Checks a machine with NVIDIA GPUs: every collective over NCCL, then a model that trains on them.
//!
//! ```text
//! cargo run --release --example gpu_check -- --nnodes 2      # two emulated nodes; they may share a GPU
//! ```
//!
//! Prints one line a check, `ok` or what is wrong, and the cost of data-parallel training on one rank: a step
//! with `Ddp` beside a step of plain tch. `scripts/gpu_bundle.sh` packs it for a machine without Rust.
#![expect(clippy::print_stdout, clippy::print_stderr, reason = "a program talks to its user")]
#![expect(
    clippy::cast_precision_loss,
    clippy::shadow_unrelated,
    reason = "checks on small whole numbers, one after the other"
)]

#[path = "../crates/comm/tests/conformance/device.rs"]
mod device;
#[path = "gpu_check/training.rs"]
mod training;

use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{bail, ensure, Context as _, Result};
use clap::Parser;
use phalanx::comm::{Backend, Sum};
use phalanx::data::{from_fn, Column, DType, LoaderOptions};
use phalanx::ddp::feed::Feed;
use phalanx::ddp::{load_cuda, Cuda};
use phalanx::launch::{launch_or_join, Joined, LaunchArgs};
use phalanx::tch::{self, nn, nn::Module as _, Device, Kind, Tensor};
use phalanx::{Ddp, DdpOptions, Group, GroupOptions};
use training::network;

#[derive(Parser)]
struct Flags {
    #[command(flatten)]
    launch: LaunchArgs,
    /// Timed steps of each kind.
    #[arg(long, default_value_t = 100)]
    steps: usize,
}

fn main() -> ExitCode {
    let flags = Flags::parse();
    tracing_subscriber::fmt()
        .with_writer(std::io::stderr)
        .with_max_level(tracing::Level::INFO)
        .init();
    let run = || match launch_or_join(&flags.launch)? {
        Joined::Finished(report) => Ok(report.exit_code()),
        Joined::Worker => check(&flags),
    };
    run().unwrap_or_else(|error: anyhow::Error| {
        eprintln!("error: {error:#}");
        ExitCode::FAILURE
    })
}

fn check(flags: &Flags) -> Result<ExitCode> {
    match load_cuda() {
        Cuda::Available { device_count } => ensure!(*device_count > 0, "libtorch sees no GPU"),
        Cuda::NoDriver => bail!("there is no NVIDIA driver on this machine"),
        Cuda::NoLibtorchCuda { message } => bail!("libtorch's CUDA support: {message}"),
    }
    let options = GroupOptions {
        timeout: Duration::from_secs(60),
        backend: Backend::Nccl,
        ..GroupOptions::default()
    };
    let mut group = Group::from_environment(options)?;
    let mut report = Report { shown: group.rank() == 0, failed: 0 };
    report.line(
        "world",
        Ok(format!("{} rank(s), GPU {:?} on rank 0", group.world_size(), group.device())),
    );
    for (what, check) in device::CHECKS {
        report.line(what, check(&mut group));
    }
    let gpu = Device::Cuda(group.device().context("a group with a GPU")?);
    for (what, check) in training::CHECKS {
        report.line(what, check(&mut group, gpu));
    }
    report.line("batches on the GPU", feeding(&group));
    report.line("all_reduce 64 MiB", speed(&mut group));
    if group.world_size() == 1 {
        report.line("step with Ddp ÷ bare", step_cost(&mut group, flags.steps));
    }
    report.line("ranks out of step", device::out_of_step(&mut group));
    ensure!(report.failed == 0, "{} check(s) failed", report.failed);
    Ok(ExitCode::SUCCESS)
}

struct Report {
    shown: bool,
    failed: usize,
}

impl Report {
    fn line(&mut self, what: &str, outcome: Result<String>) {
        let text = match outcome {
            Ok(text) => format!("ok    {what:<24} {text}"),
            Err(error) => {
                self.failed += 1;
                format!("FAIL  {what:<24} {error:#}")
            }
        };
        if self.shown || text.starts_with("FAIL") {
            println!("{text}");
        }
    }
}

/// Batches that are copied ahead hold what the samples are, while the GPU is busy and memory is used again and again; and what
/// the copying costs beside computing alone.
fn feeding(group: &Group) -> Result<String> {
    const ROWS: usize = 64;
    const LEN: usize = 16_384;
    let device = Device::Cuda(group.device().context("a group with a GPU")?);
    let columns = vec![
        Column::new("x", DType::F32, [LEN]),
        Column::new("labels", DType::I64, []),
        Column::new("flags", DType::U8, [3]),
    ];
    let samples = Arc::new(from_fn(10_000, columns, "feeding", |sample, _, row| {
        let number = f32::from(u16::try_from(sample.id).unwrap_or(0));
        row.column::<f32>(0)?.fill(number);
        row.column::<i64>(1)?.fill(sample.id.cast_signed());
        row.column::<u8>(2)?.fill(7);
        Ok(())
    }));
    let options = LoaderOptions {
        global_batch: ROWS * group.world_size(),
        rank: group.rank(),
        world_size: group.world_size(),
        ..LoaderOptions::default()
    };
    let mut feed = Feed::new(samples, options, device)?;
    let weight = Tensor::ones([i64::try_from(LEN)?, 512], (Kind::Float, device)) / LEN as f64;
    let mut time = |fed: bool| -> Result<Duration> {
        let mut step = feed.next_step()?;
        let start = Instant::now();
        for _ in 0..100 {
            let batch = &step.micro_batches[0];
            // Its mean is the sample's number: any byte of another batch would show.
            let mean = batch.get("x")?.matmul(&weight).mean_dim(1, false, Kind::Float);
            let off = (mean - batch.get("labels")?).abs().max();
            let flags = batch.get("flags")?.eq(7).all();
            if fed {
                step = feed.next_step()?;
            }
            let off = f64::try_from(off)?;
            ensure!(
                off < 0.5 && i64::try_from(flags)? == 1,
                "a batch holds something else: off by {off}"
            );
        }
        Ok(start.elapsed())
    };
    time(true)?;
    let (alone, fed) = (time(false)?, time(true)?);
    let ratio = fed.as_secs_f64() / alone.as_secs_f64();
    Ok(format!("300 batches of 4 MiB are right; a step with a new batch ÷ without {ratio:.3}"))
}

fn speed(group: &mut Group) -> Result<String> {
    let region = group.allocate::<f32>(16 << 20)?;
    for _ in 0..3 {
        group.all_reduce(region.full(), Sum)?.synchronize()?;
    }
    let rounds = 20;
    let start = Instant::now();
    for _ in 0..rounds {
        group.all_reduce(region.full(), Sum)?.wait()?;
    }
    group.all_reduce(region.full(), Sum)?.synchronize()?;
    let time = start.elapsed().as_secs_f64() / f64::from(rounds + 1);
    Ok(format!("{:.1} us, {:.1} GB/s", time * 1e6, 64.0 * 1048576.0 / time / 1e9))
}

/// Steps of plain tch and steps under `Ddp`, alternating.
fn step_cost(group: &mut Group, steps: usize) -> Result<String> {
    let index = group.device().context("a group with a GPU")?;
    let device = Device::Cuda(index);
    let (bare, wrapped) = (network(device, 2048), network(device, 2048));
    let _ddp = Ddp::new(&wrapped.vs, group, DdpOptions::default())?;
    let adamw = nn::AdamW::default();
    let mut optimizers = [
        nn::OptimizerConfig::build(adamw, &bare.vs, 1e-4)?,
        nn::OptimizerConfig::build(adamw, &wrapped.vs, 1e-4)?,
    ];
    let x = Tensor::randn([4096, 2048], (Kind::Float, device));
    let mut times = [Vec::new(), Vec::new()];
    for step in 0..steps + 10 {
        for kind in [step % 2, 1 - step % 2] {
            let net = if kind == 0 { &bare.net } else { &wrapped.net };
            let start = Instant::now();
            let loss = (net.forward(&x) - &x).square().mean(Kind::Float);
            optimizers[kind].backward_step(&loss);
            tch::Cuda::synchronize(i64::try_from(index)?);
            if step >= 10 {
                times[kind].push(start.elapsed().as_secs_f64() * 1e3);
            }
        }
    }
    let [bare, wrapped] = times.map(|mut times| {
        times.sort_by(f64::total_cmp);
        times[times.len() / 2]
    });
    Ok(format!("{:.4} ({wrapped:.3} ms, {bare:.3} ms; median of {steps})", wrapped / bare))
}
