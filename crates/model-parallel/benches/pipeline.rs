//! How long the stages of a pipeline are idle, beside what the schedules' own formulas say: two ranks as processes, eight micro-batches.
//!
//! ```text
//! cargo bench -p phalanx-model-parallel --bench pipeline -- [40] [--paced]
//! ```
//! With `--paced` the passes compute nothing and take a fixed time by waiting: what the engine and the messages add, also on a machine that others use.
//!
//! Every round makes a step of each schedule, one after the other, on the same layers. Of each schedule the fastest fifth of its steps counts: what is
//! slower, other programs have slowed down. *idle* is the time in which a rank waited for messages, and at the end for the last rank, as a share of the step; *formula* is
//! [`ScheduleKind::idle`] with the times that the passes took in the same steps. The bars: no stage more than 3 points from the formula, and ZB-H1 less
//! idle than 1F1B.
#![allow(
    clippy::print_stdout,
    clippy::cast_possible_truncation,
    clippy::cast_precision_loss,
    clippy::cast_sign_loss,
    reason = "a table of measurements"
)]

use std::error::Error;
use std::process::{Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use phalanx_comm::{Group, GroupOptions};
use phalanx_ddp_core::autograd::Function;
use phalanx_ddp_core::collective::TensorGroup;
use phalanx_ddp_core::{Ddp, DdpOptions};
use phalanx_model_parallel::layer::{linear, Builder, Deferred, Init};
use phalanx_model_parallel::pipeline::schedule::{Costs, Schedule, ScheduleKind};
use phalanx_model_parallel::pipeline::{Pipeline, StepOutput};
use tch::{nn, Device, Kind, Tensor};

type Result<T> = std::result::Result<T, Box<dyn Error>>;

const RANKS: usize = 2;
const MICRO_BATCHES: usize = 8;
/// Layers of a rank, and rows of a micro-batch.
const LAYERS: usize = 4;
const ROWS: i64 = 384;
/// Of a layer: in the bench, and in its small run.
const WIDTH: i64 = 384;
const SMALL: i64 = 16;
/// Of a paced pass.
const PACE: Duration = Duration::from_millis(10);
const POINTS: f64 = 0.03;

const KINDS: [ScheduleKind; 4] = [
    ScheduleKind::GPipe,
    ScheduleKind::OneFOneB,
    ScheduleKind::Interleaved { chunks: 2 },
    ScheduleKind::ZbH1,
];

/// One step of one rank, in seconds.
#[derive(Clone, Copy, Debug)]
struct Times {
    elapsed: f64,
    idle: f64,
    forward: f64,
    backward: f64,
    weights: f64,
}

fn main() -> Result<ExitCode> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    // `cargo bench` passes `--bench`; `cargo test --benches` passes nothing and gets a small run.
    let is_bench = arguments.iter().any(|argument| argument == "--bench");
    let given = arguments.iter().find_map(|argument| argument.parse().ok());
    let rounds: usize = given.unwrap_or(if is_bench { 40 } else { 1 });
    let width = if is_bench { WIDTH } else { SMALL };
    if arguments.iter().any(|argument| argument == "--worker") {
        let small = arguments.iter().any(|argument| argument == "--small");
        let is_paced = arguments.iter().any(|argument| argument == "--paced");
        worker(rounds, if small { SMALL } else { WIDTH }, is_paced)?;
        return Ok(ExitCode::SUCCESS);
    }
    let passed = ["--paced"].into_iter().filter(|passed| arguments.iter().any(|one| one == passed));
    let passed: Vec<&str> = passed.chain((width == SMALL).then_some("--small")).collect();
    let text = ranks(rounds, &passed)?;
    print!("{text}");
    let missed = text.lines().filter(|line| line.ends_with("missed")).count();
    Ok(if is_bench && missed > 0 { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

/// Starts this program again, once for each rank; what the first one prints.
fn ranks(rounds: usize, passed: &[&str]) -> Result<String> {
    let port = std::net::TcpListener::bind("127.0.0.1:0")?.local_addr()?.port();
    let mut children = Vec::new();
    for rank in 0..RANKS {
        let mut command = Command::new(std::env::current_exe()?);
        command.args(["--worker", &rounds.to_string()]).args(passed);
        command.env("RANK", rank.to_string()).env("LOCAL_RANK", rank.to_string());
        command.env("WORLD_SIZE", RANKS.to_string()).env("LOCAL_WORLD_SIZE", RANKS.to_string());
        command.env("MASTER_ADDR", "127.0.0.1").env("MASTER_PORT", port.to_string());
        let stdout = if rank == 0 { Stdio::piped() } else { Stdio::null() };
        children.push(command.stdout(stdout).spawn()?);
    }
    let mut text = String::new();
    for child in children {
        let output = child.wait_with_output()?;
        if !output.status.success() {
            return Err(format!("a rank failed: {}", output.status).into());
        }
        text.push_str(&String::from_utf8_lossy(&output.stdout));
    }
    Ok(text)
}

fn worker(rounds: usize, width: i64, is_paced: bool) -> Result<()> {
    let world = Group::from_environment(GroupOptions::default())?;
    let rank = world.rank();
    let vs = nn::VarStore::new(Device::Cpu);
    let builder = Builder::new(vs.root(), 1);
    let weight = |layer: usize| {
        let init = Init::Normal { std: 0.05 };
        (&builder / layer).whole("weight", &[width, width], init)
    };
    let layers = (0..if is_paced { 1 } else { LAYERS })
        .map(|layer| weight(rank * LAYERS + layer))
        .collect::<std::result::Result<Vec<_>, _>>()?;
    let mut alone = Group::single(GroupOptions::default())?;
    let ddp = Ddp::new(&vs, &mut alone, DdpOptions::default())?;
    tch::set_num_threads(1);
    let group = TensorGroup::new(world);
    let samples = Tensor::ones([ROWS, width], (Kind::Float, Device::Cpu));
    let mut pipelines = Vec::new();
    for kind in KINDS {
        let schedule = Schedule::new(kind, RANKS, MICRO_BATCHES)?;
        pipelines.push((kind, Pipeline::new(group.clone(), schedule, Device::Cpu)?));
    }
    let mut steps = vec![Vec::new(); KINDS.len()];
    for round in 0..=rounds {
        for (at, (kind, pipeline)) in pipelines.iter_mut().enumerate() {
            let chunks = kind.chunk_count();
            let of_chunk = LAYERS / chunks;
            let mut stage = |chunk: usize, _: usize, input: Option<Tensor>| {
                // As long as in a stage whose input has a gradient.
                let first = || samples.f_detach()?.f_set_requires_grad(true);
                let mut x = input.map_or_else(first, Ok)?;
                if is_paced {
                    x = paced(&x, &layers[0], PACE / u32::try_from(chunks).unwrap_or(1))?;
                    return match (rank + 1, chunk + 1) == (RANKS, chunks) {
                        true => Ok(x.f_mean(Kind::Float)?),
                        false => Ok(x),
                    };
                }
                for matrix in &layers[chunk * of_chunk..(chunk + 1) * of_chunk] {
                    x = x.f_add(&linear(&x, matrix, None)?.f_tanh()?)?;
                }
                match (rank + 1, chunk + 1) == (RANKS, chunks) {
                    true => Ok(x.f_square()?.f_mean(Kind::Float)?),
                    false => Ok(x),
                }
            };
            let output = pipeline.step(&mut stage, &ddp, &[1.0; MICRO_BATCHES])?;
            ddp.release_gradients()?;
            if round > 0 {
                steps[at].push(Times::of(&output)); // the first one warms up
            }
        }
    }
    let mine: Vec<u8> = steps.iter().flatten().flat_map(|times| times.bytes()).collect();
    let all = group.with_group(|group| group.tagged("times").all_gather_bytes(&mine))?;
    if rank == 0 {
        let all: Vec<Vec<Times>> = all.iter().map(|of_rank| Times::all(of_rank)).collect();
        report(&all, rounds);
    }
    Ok(())
}

/// Passes that wait: forward, gradients of the input and gradients of the weight as long as each other.
fn paced(x: &Tensor, weight: &Tensor, pace: Duration) -> phalanx_model_parallel::Result<Tensor> {
    let deferred = Deferred::active();
    let mut outputs = Function::new("paced").apply(
        &[x, weight],
        |_, inputs| {
            pause(pace);
            Ok((vec![inputs[0].f_mul_scalar(1.0)?], inputs[1].shallow_clone()))
        },
        move |backward, gradients| {
            pause(pace);
            let trained = backward.state.shallow_clone();
            let of_weight = move || {
                pause(pace);
                Ok(vec![(trained.shallow_clone(), trained.f_zeros_like()?)])
            };
            let gradient = gradients[0].as_ref().map(Tensor::shallow_clone);
            match &deferred {
                Some(deferred) => {
                    deferred.leave(of_weight);
                    Ok(vec![gradient, None])
                }
                None => Ok(vec![gradient, Some(of_weight()?.remove(0).1)]),
            }
        },
    )?;
    Ok(outputs.remove(0))
}

fn pause(time: Duration) {
    let end = Instant::now() + time;
    while let Some(left) = end.checked_duration_since(Instant::now()).filter(|left| !left.is_zero())
    {
        std::thread::park_timeout(left);
    }
}

impl Times {
    fn of(output: &StepOutput) -> Self {
        let seconds = |time: Duration| time.as_secs_f64();
        Self {
            elapsed: seconds(output.elapsed),
            idle: seconds(output.idle),
            forward: seconds(output.computing.forward),
            backward: seconds(output.computing.backward),
            weights: seconds(output.computing.weights),
        }
    }

    fn bytes(self) -> Vec<u8> {
        let Self { elapsed, idle, forward, backward, weights } = self;
        [elapsed, idle, forward, backward, weights].iter().flat_map(|x| x.to_le_bytes()).collect()
    }

    fn all(bytes: &[u8]) -> Vec<Self> {
        let numbers: Vec<f64> = bytes
            .chunks_exact(8)
            .map(|b| f64::from_le_bytes([b[0], b[1], b[2], b[3], b[4], b[5], b[6], b[7]]))
            .collect();
        let times = |x: &[f64]| Self {
            elapsed: x[0],
            idle: x[1],
            forward: x[2],
            backward: x[3],
            weights: x[4],
        };
        numbers.chunks_exact(5).map(times).collect()
    }
}

/// A table: `all` has by rank the steps of one schedule after the other.
fn report(all: &[Vec<Times>], rounds: usize) {
    println!("{RANKS} stages, {MICRO_BATCHES} micro-batches, {rounds} rounds");
    println!("schedule       stage  step ms  forward  backward  weights  idle %  formula %  within 3 points");
    let mut shares = Vec::new();
    for (at, kind) in KINDS.into_iter().enumerate() {
        let of = |rank: usize, round: usize| all[rank][at * rounds + round];
        let slowest =
            |round: &usize| (0..RANKS).map(|rank| of(rank, *round).elapsed).fold(0.0, f64::max);
        let mut order: Vec<usize> = (0..rounds).collect();
        order.sort_by(|a, b| slowest(a).total_cmp(&slowest(b)));
        order.truncate(rounds.div_ceil(5));
        let mean = |rank: usize, part: fn(&Times) -> f64| {
            order.iter().map(|round| part(&of(rank, *round))).sum::<f64>() / order.len() as f64
        };
        let formula = formula(kind, |part| {
            (0..RANKS).map(|rank| mean(rank, part)).sum::<f64>() / RANKS as f64
        });
        for rank in 0..RANKS {
            let share = mean(rank, |times| times.idle) / mean(rank, |times| times.elapsed);
            let verdict = if (share - formula).abs() <= POINTS { "yes" } else { "missed" };
            println!(
                "{kind:<14} {rank:>5} {:>8.1} {:>8.1} {:>9.1} {:>8.1} {:>7.1} {:>10.1}  {verdict}",
                1e3 * mean(rank, |times| times.elapsed),
                1e3 * mean(rank, |times| times.forward),
                1e3 * mean(rank, |times| times.backward),
                1e3 * mean(rank, |times| times.weights),
                1e2 * share,
                1e2 * formula,
            );
            shares.push((kind, share));
        }
    }
    let idle = |wanted: ScheduleKind| {
        shares.iter().filter(|(kind, _)| *kind == wanted).map(|(_, share)| share).sum::<f64>()
    };
    let is_below = idle(ScheduleKind::ZbH1) < idle(ScheduleKind::OneFOneB);
    println!("zb-h1 below 1f1b: {}", if is_below { "yes" } else { "missed" });
}

/// The share of a step in which a rank is idle, by the schedule's formula, from what its passes took.
fn formula(kind: ScheduleKind, mean: impl Fn(fn(&Times) -> f64) -> f64) -> f64 {
    let passes = (MICRO_BATCHES * kind.chunk_count()) as f64;
    let nanoseconds = |seconds: f64| (1e9 * seconds / passes) as u64;
    let costs = Costs {
        forward: nanoseconds(mean(|times| times.forward)),
        backward_input: nanoseconds(mean(|times| times.backward)),
        backward_weight: nanoseconds(mean(|times| times.weights)),
        transfer: 0,
    };
    let idle = kind.idle(RANKS, MICRO_BATCHES, &costs) as f64;
    let busy = passes * (costs.forward + costs.backward()) as f64;
    idle / (idle + busy)
}
