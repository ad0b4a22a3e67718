//! A rank for the fault lab: `bert_large`'s own parts, and what nobody can do to a rank from outside.
//!
//! In the folder of `--lab` it looks after each step for files that a test makes: `hold-STEP` keeps all ranks there until the file is
//! gone, so that a test can break them at a moment that no busy machine moves; `nan-RANK` spoils a weight of that rank, once.

#![expect(clippy::print_stdout, clippy::print_stderr, reason = "a program talks to its user")]

#[path = "../../../examples/bert/mod.rs"]
#[expect(dead_code, reason = "the lab uses a part of the example")]
mod bert;

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};
use std::{env, fs, thread};

use anyhow::{ensure, Result};
use clap::Parser;
use phalanx::comm::environment::World;
use phalanx::data::progress::Silent;
use phalanx::tch::{self, nn, Device};
use phalanx::{checkpoint, comm, launch, Group};

use bert::config::Backend;
use bert::flags::{Flags, Settings};
use bert::journal::Journal;
use bert::resume::Checkpoints;
use bert::train::Trainer;
use bert::{data, failure, model, source};

/// More than a test needs to break something.
const HOLD_MAX: Duration = Duration::from_secs(240);

#[derive(Debug, Parser)]
struct Lab {
    /// Where a test leaves its wishes.
    #[arg(long)]
    lab: PathBuf,
    /// Do not stay from one generation to the next.
    #[arg(long)]
    anew: bool,
    #[command(flatten)]
    flags: Flags,
}

fn main() -> ExitCode {
    bert::job::log_to_stderr();
    run(&Lab::parse()).unwrap_or_else(|error| {
        eprintln!("error: {}", failure::message(&error));
        ExitCode::from(failure::exit_code(&error))
    })
}

fn run(lab: &Lab) -> Result<ExitCode> {
    let settings = lab.flags.settings()?;
    if launch::is_worker() && lab.anew {
        return rank(lab, &settings);
    }
    if launch::is_worker() {
        return launch::each_generation(|| rank(lab, &settings));
    }
    drop(data::open(&settings.config, &Silent)?);
    let launch = lab.flags.launch(&settings);
    let args: Vec<_> = env::args_os().skip(1).collect();
    Ok(launch.run(&env::current_exe()?, &args)?.exit_code())
}

/// As in `bert_large`, without what is said and measured.
fn rank(lab: &Lab, settings: &Settings) -> Result<ExitCode> {
    let (config, world) = (&settings.config, World::from_env()?);
    let batching = settings.batching(world.world_size)?;
    let source = data::open(config, &Silent)?;
    let metrics = lab.flags.train.metrics.as_deref();
    let mut journal = (world.rank == 0)
        .then(|| Journal::open(config, &settings.name, metrics, world.world_size))
        .transpose()?;
    let mut group = Group::from_environment(match config.ddp.backend {
        Backend::Mpi => {
            comm::GroupOptions { backend: comm::Backend::Mpi, ..bert::job::times(config) }
        }
        _ => bert::job::times(config),
    })?;
    tch::set_num_threads(1);
    let vs = nn::VarStore::new(Device::Cpu);
    let network = model::build(&vs, &config.model, config.train.seed, world.rank)?;
    let mut trainer = Trainer::new(network, &vs, &mut group, (config, batching, true))?;
    let (mut checkpoints, start) = Checkpoints::open(config, &mut trainer)?;
    let place = (Device::Cpu, start.data.as_ref());
    let mut feed = source::feed(&source, config, batching, (world.rank, world.world_size), place)?;
    feed.agree(&mut group)?;
    if let Some(journal) = &mut journal {
        journal.go_on(start.step)?;
        start.note.iter().for_each(|note| println!("{note}"));
    }
    for step in start.step + 1..=config.train.steps {
        let record = trainer.step(step, &mut feed, &mut group)?;
        if let Some(journal) = &mut journal {
            journal.step(record)?;
        }
        if let Some(signal) = checkpoints.step(step, (&mut trainer, &feed, config))? {
            return Ok(ExitCode::from(failure::stopped_by(signal)));
        }
        disturb(&lab.lab, step, world.rank, &vs)?;
    }
    if let (0, Some(folder)) = (world.rank, &lab.flags.train.output) {
        let mut weights: Vec<_> = vs.variables().into_iter().collect();
        weights.sort_by(|one, other| one.0.cmp(&other.0));
        checkpoint::save_safetensors(&folder.join("model.safetensors"), &weights)?;
    }
    Ok(ExitCode::SUCCESS)
}

/// Does what a test wishes after `step`.
fn disturb(lab: &Path, step: u64, rank: usize, vs: &nn::VarStore) -> Result<()> {
    let (hold, end) = (lab.join(format!("hold-{step}")), Instant::now() + HOLD_MAX);
    while hold.exists() {
        ensure!(Instant::now() < end, "{} is still there", hold.display());
        thread::park_timeout(Duration::from_millis(1));
    }
    if fs::remove_file(lab.join(format!("nan-{rank}"))).is_ok() {
        let norms = |(name, _): &(String, _)| name.ends_with("LayerNorm.weight");
        let spoilt = vs.variables().into_iter().filter(norms).min_by(|a, b| a.0.cmp(&b.0));
        let (_, weight) = spoilt.ok_or_else(|| anyhow::anyhow!("no weight to spoil"))?;
        drop(tch::no_grad(|| weight.f_get(0)?.f_fill_(f64::NAN))?);
    }
    Ok(())
}
