//! What checkpoints cost: a save until it is durable, a load, and training that saves beside training that does not.
//!
//! ```text
//! cargo bench --bench checkpoint -- --nnodes 2 --threads 1 --folder /some/disk
//! cargo bench --bench checkpoint -- --nnodes 2 --threads 1 --config configs/bert_small.json --folder /some/disk --training
//! ```
//!
//! The first saves and loads weights and both moments of AdamW (ZeRO-1) several times; `scripts/bench_checkpoint.sh` puts
//! `torch.distributed.checkpoint` beside it. The second alternates blocks of 20 steps that begin with a save and blocks that do
//! not, with the polling between steps in both, and prints the ratio of their medians.

#![expect(clippy::print_stdout, clippy::print_stderr, reason = "a program talks to its user")]
#![allow(clippy::cast_precision_loss, reason = "token counts are far below 2^53")]
#![allow(dead_code, unused_imports, reason = "uses a part of the example's modules")]

#[path = "../examples/bert/config/mod.rs"]
mod config;
#[path = "../examples/bert/model.rs"]
mod model;

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Instant;

use anyhow::{ensure, Context as _, Result};
use clap::Parser;
use phalanx::checkpoint::{Checkpointer, CheckpointerOptions, Keep, Next, OnError};
use phalanx::comm::Max;
use phalanx::launch::{launch_or_join, Joined, LaunchArgs};
use phalanx::{Ddp, DdpOptions, Group, GroupOptions, Zero};
use phalanx_ddp_core::optim::{AdamW, Optimizer};
use phalanx_ddp_core::Sync;
use tch::{nn, Device, Kind, Tensor};

/// Steps of a block: one save each.
const BLOCK: u64 = 20;

#[derive(Debug, Parser)]
#[expect(
    clippy::struct_excessive_bools,
    reason = "two flags that have nothing to do with each other"
)]
struct Flags {
    #[command(flatten)]
    launch: LaunchArgs,
    /// Model to save.
    #[arg(long, default_value = "configs/bert_large.json")]
    config: PathBuf,
    /// Where to; a folder in here is made and removed.
    #[arg(long, default_value = "target")]
    folder: PathBuf,
    /// Saves and loads of which the medians are printed, or blocks of each kind.
    #[arg(long, default_value_t = 3)]
    rounds: u64,
    /// Measure training that saves.
    #[arg(long)]
    training: bool,
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

/// One rank's training.
struct Training {
    network: model::BertForMaskedLm,
    ddp: Ddp,
    optimizer: Optimizer,
    ids: Tensor,
    labels: Tensor,
    bytes: usize,
}

impl Training {
    fn new(config: &config::Config, group: &mut Group) -> Result<Self> {
        let vs = nn::VarStore::new(Device::Cpu);
        let network = model::build(&vs, &config.model, 1, group.rank())?;
        let ddp = Ddp::new(&vs, group, DdpOptions { zero: Zero::One, ..DdpOptions::default() })?;
        let optimizer = Optimizer::new(&ddp, AdamW::default(), model::groups(config::Rule::Adamw))?;
        let at = Tensor::arange(8 * 128, (Kind::Int64, Device::Cpu)).reshape([8, 128]);
        let ids = (&at * 7919 + 13).remainder(config.model.vocab_size - 5) + 5;
        let labels = ids.where_self(&at.remainder(7).eq(0), &Tensor::from(model::IGNORED));
        let elements: usize = vs.trainable_variables().iter().map(Tensor::numel).sum();
        // Weights, and two moments: f32 all.
        Ok(Self { network, ddp, optimizer, ids, labels, bytes: 12 * elements })
    }

    fn step(&mut self) -> Result<()> {
        let inputs = model::Inputs { ids: &self.ids, labels: &self.labels, attention_mask: None };
        let pass = model::Pass { train: true, kind: Kind::Float };
        let sum = self.network.loss(&inputs, pass).context("forward")?;
        self.ddp.backward(&sum.loss, sum.masked_count as f64, Sync::Reduce)?;
        self.optimizer.step(None)?;
        Ok(())
    }
}

fn measure(flags: &Flags) -> Result<()> {
    ensure!(flags.rounds > 0, "--rounds 0: at least one");
    let threads: i32 = std::env::var("OMP_NUM_THREADS").unwrap_or_default().parse().unwrap_or(1);
    tch::set_num_threads(threads);
    let mut group = Group::from_environment(GroupOptions::default())?;
    let config = config::Config::read(&flags.config)?;
    let mut training = Training::new(&config, &mut group)?;
    let folder = flags.folder.join("bench-checkpoints");
    let options = CheckpointerOptions {
        keep: Keep { last: 1, every: None },
        on_error: OnError::Fail,
        ..CheckpointerOptions::default()
    };
    let mut checkpointer = Checkpointer::new(&folder, &training.ddp, options)?;
    let done = match flags.training {
        true => compare(&mut group, &mut training, &mut checkpointer, flags.rounds),
        false => save_and_load(&mut group, &mut training, &mut checkpointer, flags.rounds),
    };
    drop(checkpointer);
    group.barrier()?.wait()?;
    if group.rank() == 0 {
        std::fs::remove_dir_all(&folder).context("removing what was saved")?;
    }
    done
}

/// The slowest rank's milliseconds.
fn slowest(group: &mut Group, start: Instant) -> Result<f64> {
    let mut time = [start.elapsed().as_secs_f64() * 1e3];
    group.all_reduce(&mut time[..], Max)?.wait()?;
    Ok(time[0])
}

fn save_and_load(
    group: &mut Group,
    training: &mut Training,
    checkpointer: &mut Checkpointer,
    rounds: u64,
) -> Result<()> {
    let (mut copies, mut saves, mut loads) = (Vec::new(), Vec::new(), Vec::new());
    // The first one touches the memory of the copy for the first time, and is not counted.
    for round in 0..=rounds {
        group.barrier()?.wait()?;
        let start = Instant::now();
        checkpointer.save(round + 1, Some(&mut training.optimizer), || ())?;
        let copy = slowest(group, start)?;
        checkpointer.finish()?;
        let save = slowest(group, start)?;
        group.barrier()?.wait()?;
        let begun = Instant::now();
        checkpointer.resume(Some(&mut training.optimizer))?.context("what was just saved")?;
        let load = slowest(group, begun)?;
        if round > 0 {
            copies.push(copy);
            saves.push(save);
            loads.push(load);
        }
    }
    if group.rank() == 0 {
        println!(
            "{{\"bytes\": {}, \"copy_ms\": {:.1}, \"save_ms\": {:.1}, \"load_ms\": {:.1}}}",
            training.bytes,
            median(copies),
            median(saves),
            median(loads)
        );
    }
    Ok(())
}

/// Blocks of steps that save and blocks that do not, taking turns.
fn compare(
    group: &mut Group,
    training: &mut Training,
    checkpointer: &mut Checkpointer,
    rounds: u64,
) -> Result<()> {
    let mut times = [Vec::new(), Vec::new()];
    let mut busy = [Vec::new(), Vec::new()];
    let mut copies = Vec::new();
    let mut step = 0;
    for round in 0..=rounds {
        for saves in [round % 2 == 0, round % 2 == 1] {
            group.barrier()?.wait()?;
            let (start, before) = (Instant::now(), processor_ms()?);
            for at in 0..BLOCK {
                step += 1;
                training.step()?;
                if at == 0 && saves {
                    let begun = Instant::now();
                    checkpointer.save(step, Some(&mut training.optimizer), || ())?;
                    copies.push(begun.elapsed().as_secs_f64() * 1e3);
                }
                let next = checkpointer.step(step, Some(&mut training.optimizer), || ())?;
                ensure!(next == Next::Continue, "stopped by a signal");
            }
            let time = slowest(group, start)?;
            if round > 0 {
                times[usize::from(saves)].push(time);
                busy[usize::from(saves)].push(processor_ms()? - before);
            }
        }
    }
    checkpointer.finish()?;
    if group.rank() == 0 {
        let [without, with] = times.map(median);
        let [busy_without, busy_with] = busy.map(median);
        println!(
            "{BLOCK} steps with a save {with:.1} ms, without {without:.1} ms, ratio {:.4} (medians of {rounds}); the call itself \
             {:.1} ms; processor time of rank 0 {busy_with:.1} and {busy_without:.1} ms, ratio {:.4}",
            with / without,
            median(copies),
            busy_with / busy_without,
        );
    }
    Ok(())
}

/// What this process has used so far, all its threads.
fn processor_ms() -> Result<f64> {
    let stat = std::fs::read_to_string("/proc/self/stat")?;
    let fields = stat.rsplit(')').next().unwrap_or_default().split_whitespace().skip(11).take(2);
    let ticks = fields.map(|ticks| Ok(ticks.parse::<u32>()?)).sum::<Result<u32>>()?;
    // A hundred a second, on every Linux.
    Ok(f64::from(ticks) * 10.0)
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}
