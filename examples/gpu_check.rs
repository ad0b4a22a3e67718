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
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    clippy::shadow_unrelated,
    reason = "checks on small whole numbers, one after the other"
)]

use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{bail, ensure, Context as _, Result};
use clap::Parser;
use phalanx::comm::{Avg, Backend, Element, Float, Max, Min, Product, Region, ScaledSum, Sum};
use phalanx::ddp::optim::{AdamW, Optimizer, OptimizerConfig};
use phalanx::ddp::{load_cuda, Cuda};
use phalanx::launch::{launch_or_join, Joined, LaunchArgs};
use phalanx::tch::{self, nn, nn::Module, Device, Kind, Tensor};
use phalanx::{Ddp, DdpOptions, Group, GroupOptions, Sync, Zero};

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
    let options =
        GroupOptions::default().with_timeout(Duration::from_secs(60)).with_backend(Backend::Nccl);
    let mut group = Group::from_environment(options)?;
    let mut report = Report { shown: group.rank() == 0, failed: 0 };
    report.line(
        "world",
        Ok(format!("{} rank(s), GPU {:?} on rank 0", group.world_size(), group.device())),
    );
    report
        .line("f32 collectives", floats::<f32>(&mut group, |x| x as f32, |x| f64::from(*x), 1e-6));
    report.line("f64 collectives", floats::<f64>(&mut group, |x| x, |x| *x, 1e-12));
    report.line("f16 collectives", floats(&mut group, half::f16::from_f64, |x| x.to_f64(), 2e-3));
    report.line("bf16 collectives", floats(&mut group, half::bf16::from_f64, |x| x.to_f64(), 2e-2));
    report.line("i32 collectives", integers::<i32>(&mut group, |x| x as i32));
    report.line("i64 collectives", integers::<i64>(&mut group, |x| x as i64));
    report.line("u8 collectives", integers::<u8>(&mut group, |x| x as u8));
    report.line("sub-groups", sub_groups(&mut group));
    report.line("host memory beside it", host_memory(&mut group));
    report.line("training, zero 0", training(&mut group, Zero::Off));
    report.line("training, zero 1", training(&mut group, Zero::One));
    report.line("all_reduce 64 MiB", speed(&mut group));
    if group.world_size() == 1 {
        report.line("step with Ddp ÷ bare", step_cost(&mut group, flags.steps));
    }
    report.line("ranks out of step", out_of_step(&mut group));
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

const LEN: usize = 12 * 1024;

/// Rank `r`'s element `i`: small, so that sums are exact in every type.
fn value(rank: usize, index: usize) -> f64 {
    (rank + 1 + index % 5) as f64
}

/// A region of the group's GPU with this rank's values.
fn filled<T: Element>(group: &mut Group, of: impl Fn(f64) -> T) -> Result<Region<T>> {
    let region = group.allocate::<T>(LEN)?;
    ensure!(region.is_on_device(), "the group's memory is on the host");
    let rank = group.rank();
    region.write(0, &(0..LEN).map(|index| of(value(rank, index))).collect::<Vec<_>>());
    Ok(region)
}

fn expect<T: Element>(
    what: &str,
    region: &Region<T>,
    range: std::ops::Range<usize>,
    expected: impl Fn(usize) -> f64,
    to_f64: impl Fn(&T) -> f64,
    tolerance: f64,
) -> Result<()> {
    for (index, actual) in range.clone().zip(region.read(range)) {
        let (actual, expected) = (to_f64(&actual), expected(index));
        let wrong = (actual - expected).abs() > tolerance * expected.abs().max(1.0);
        ensure!(!wrong, "{what}: element {index} is {actual}, expected {expected}");
    }
    Ok(())
}

fn floats<T: Float>(
    group: &mut Group,
    of: impl Fn(f64) -> T + Copy,
    to_f64: impl Fn(&T) -> f64 + Copy,
    tolerance: f64,
) -> Result<String> {
    let (rank, ranks) = (group.rank(), group.world_size());
    let all = |index: usize| (0..ranks).map(move |peer| value(peer, index));
    let sum = |index: usize| all(index).sum::<f64>();
    let segment = LEN / ranks;
    let own = rank * segment..(rank + 1) * segment;

    let region = filled(group, of)?;
    group.all_reduce(region.full(), Sum)?.synchronize()?;
    expect("all_reduce sum", &region, 0..LEN, sum, to_f64, tolerance)?;
    let region = filled(group, of)?;
    group.all_reduce(region.full(), Avg)?.synchronize()?;
    expect("all_reduce avg", &region, 0..LEN, |i| sum(i) / ranks as f64, to_f64, tolerance)?;
    let region = filled(group, of)?;
    group.all_reduce(region.full(), ScaledSum(0.25))?.synchronize()?;
    expect("all_reduce scaled", &region, 0..LEN, |i| sum(i) * 0.25, to_f64, tolerance)?;
    let region = filled(group, of)?;
    group.all_reduce(region.full(), Max)?.synchronize()?;
    let most = |index| all(index).fold(f64::MIN, f64::max);
    expect("all_reduce max", &region, 0..LEN, most, to_f64, 0.0)?;
    let region = filled(group, of)?;
    group.all_reduce(region.full(), Min)?.synchronize()?;
    let least = |index| all(index).fold(f64::MAX, f64::min);
    expect("all_reduce min", &region, 0..LEN, least, to_f64, 0.0)?;
    let region = filled(group, of)?;
    group.all_reduce(region.full(), Product)?.synchronize()?;
    let product = |index| all(index).product();
    expect("all_reduce product", &region, 0..LEN, product, to_f64, tolerance)?;

    let region = filled(group, of)?;
    let used = LEN / ranks * ranks;
    group.reduce_scatter_in_place(region.range(0..used), Sum)?.synchronize()?;
    expect("reduce_scatter", &region, own, sum, to_f64, tolerance)?;
    let root = ranks - 1;
    let region = filled(group, of)?;
    group.reduce(region.full(), Sum, root)?.synchronize()?;
    if rank == root {
        expect("reduce", &region, 0..LEN, sum, to_f64, tolerance)?;
    }
    moves(group, of, to_f64)?;
    Ok(format!("{LEN} elements"))
}

fn integers<T>(group: &mut Group, of: impl Fn(f64) -> T + Copy) -> Result<String>
where
    Sum: phalanx::comm::ReduceOp<T>,
    T: Element + TryInto<i64>,
{
    let ranks = group.world_size();
    let to_f64 = |x: &T| (*x).try_into().map_or(f64::NAN, |x: i64| x as f64);
    let region = filled(group, of)?;
    group.all_reduce(region.full(), Sum)?.synchronize()?;
    let sum = |index| (0..ranks).map(|peer| value(peer, index)).sum();
    expect("all_reduce sum", &region, 0..LEN, sum, to_f64, 0.0)?;
    moves(group, of, to_f64)?;
    Ok(format!("{LEN} elements"))
}

/// The collectives that only move data.
fn moves<T: Element>(
    group: &mut Group,
    of: impl Fn(f64) -> T + Copy,
    to_f64: impl Fn(&T) -> f64 + Copy,
) -> Result<()> {
    let (rank, ranks) = (group.rank(), group.world_size());
    let segment = LEN / ranks;
    let used = segment * ranks;
    let root = ranks - 1;

    let region = filled(group, of)?;
    group.broadcast(region.full(), root)?.synchronize()?;
    expect("broadcast", &region, 0..LEN, |index| value(root, index), to_f64, 0.0)?;
    let region = filled(group, of)?;
    group.all_gather_in_place(region.range(0..used))?.synchronize()?;
    let gathered = |index| value(index / segment, index);
    expect("all_gather", &region, 0..used, gathered, to_f64, 0.0)?;
    let (input, output) = (filled(group, of)?, filled(group, of)?);
    let (from, to) = (input.range(0..used), output.range(0..used));
    group.all_to_all_on_device(from, to)?.synchronize()?;
    let exchanged = |index| value(index / segment, rank * segment + index % segment);
    expect("all_to_all", &output, 0..used, exchanged, to_f64, 0.0)?;
    if ranks > 1 {
        let (message, received) = (filled(group, of)?, filled(group, of)?);
        let (next, previous) = ((rank + 1) % ranks, (rank + ranks - 1) % ranks);
        // Even ranks send first: NCCL's send waits for its receiver.
        if rank % 2 == 0 {
            group.send_from_device(message.full(), next)?.synchronize()?;
            group.receive(received.full(), previous)?.synchronize()?;
        } else {
            group.receive(received.full(), previous)?.synchronize()?;
            group.send_from_device(message.full(), next)?.synchronize()?;
        }
        let sent = |index| value(previous, index);
        expect("send and receive", &received, 0..LEN, sent, to_f64, 0.0)?;
    }
    group.barrier()?.wait()?;
    Ok(())
}

fn sub_groups(group: &mut Group) -> Result<String> {
    let (rank, ranks) = (group.rank(), group.world_size());
    let color = u32::try_from(rank % 2)?;
    let mut half = group.split(Some(color), 0)?.context("this rank has a color")?;
    let region = half.allocate::<f32>(1000)?;
    region.write(0, &[rank as f32; 1000]);
    half.all_reduce(region.full(), Sum)?.synchronize()?;
    let expected: f32 =
        (0..ranks).filter(|peer| peer % 2 == rank % 2).map(|peer| peer as f32).sum();
    ensure!(region.read(0..1000) == vec![expected; 1000], "not the sum of {expected}");
    Ok(format!("of {} rank(s)", half.world_size()))
}

fn host_memory(group: &mut Group) -> Result<String> {
    let mut values = vec![group.rank() as f64; 100];
    group.all_reduce(&mut values[..], Sum)?.wait()?;
    let ranks = group.world_size();
    ensure!(values == vec![(ranks * (ranks - 1) / 2) as f64; 100], "a wrong sum");
    Ok("over the host backend".to_owned())
}

struct Net {
    vs: nn::VarStore,
    net: nn::Sequential,
}

fn network(device: Device, width: i64) -> Net {
    tch::manual_seed(7);
    let vs = nn::VarStore::new(device);
    let mut net = nn::seq();
    for layer in 0..4 {
        net =
            net.add(nn::linear(vs.root() / format!("l{layer}"), width, width, Default::default()));
        net = net.add_fn(Tensor::gelu_plain);
    }
    Net { vs, net }
}

trait GeluPlain {
    fn gelu_plain(&self) -> Tensor;
}

impl GeluPlain for Tensor {
    fn gelu_plain(&self) -> Tensor {
        self.gelu("none")
    }
}

/// A few steps on the GPU beside the same on the CPU over the host's memory.
fn training(group: &mut Group, zero: Zero) -> Result<String> {
    let device = Device::Cuda(group.device().context("a group with a GPU")?);
    let mut losses = Vec::new();
    for device in [Device::Cpu, device] {
        let Net { vs, net } = network(device, 64);
        let options = DdpOptions { zero, bucket_bytes_max: 16 << 10, ..DdpOptions::default() };
        let ddp = Ddp::new(&vs, group, options)?;
        let config = OptimizerConfig::AdamW(AdamW { lr: 1e-3, ..AdamW::default() });
        let mut optimizer = Optimizer::new(&ddp, config, |_name| true)?;
        let rank = i64::try_from(group.rank())?;
        let mut of_device = Vec::new();
        for step in 0..10 {
            let x = Tensor::arange(32 * 64, (Kind::Float, Device::Cpu)).view([32, 64]);
            let x = (x * 0.37 + (step + rank) as f64).sin().to_device(device);
            let loss = (net.forward(&x) - &x).square().sum(Kind::Float);
            ddp.backward(&loss, 32.0, Sync::Reduce)?;
            let norm = optimizer.step(Some(1.0))?;
            ensure!(norm.is_finite() && norm > 0.0, "gradient norm {norm}");
            of_device.push(loss.double_value(&[]));
        }
        losses.push(of_device);
    }
    let difference = losses[0]
        .iter()
        .zip(&losses[1])
        .map(|(cpu, gpu)| ((cpu - gpu) / cpu).abs())
        .fold(0.0, f64::max);
    ensure!(difference < 1e-3, "losses differ from the CPU's by {difference:.1e}: {losses:?}");
    let (first, last) = (losses[1][0], losses[1][9]);
    ensure!(last < first, "the loss does not fall: {first} → {last}");
    Ok(format!("loss {first:.1} → {last:.1}, within {difference:.1e} of the CPU"))
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

/// Last: it ends the group. Ranks that call different things hear of it, and nothing hangs.
fn out_of_step(group: &mut Group) -> Result<String> {
    if group.world_size() == 1 {
        return Ok("one rank cannot be".to_owned());
    }
    let region = group.allocate::<f32>(1024)?;
    let start = Instant::now();
    let work = if group.rank() == 0 {
        group.all_reduce(region.full(), Sum)?
    } else {
        group.broadcast(region.full(), 0)?
    };
    match work.synchronize() {
        Ok(()) => bail!("different calls went through"),
        Err(error) if start.elapsed() < Duration::from_secs(5) => {
            ensure!(error.to_string().contains("all_reduce"), "{error}");
            Ok(format!("heard after {:.3} s", start.elapsed().as_secs_f64()))
        }
        Err(error) => bail!("only after {:?}: {error}", start.elapsed()),
    }
}
