//! Pre-trains BERT by masked language modelling, data-parallel over ranks that it starts itself.
//!
//! ```text
//! cargo run --release --example bert_large -- --nnodes 4
//! ```
//!
//! The same program is launcher and rank: started by hand it checks everything that can be checked
//! without ranks, then starts them; started by itself, torchrun, mpirun or srun it is a rank.
//! What happens stands here, in its order; how, in `bert/`.

#![expect(clippy::print_stdout, clippy::print_stderr, reason = "a program talks to its user")]

mod bert;

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context as _, Result};
use phalanx::comm::environment::{LaunchDefaults, Launcher, NcclSettings, World};
use phalanx::data::progress::{Progress, Silent, Terminal};
use phalanx::ddp::{self, Cuda};
use phalanx::tch::{nn, Device};
use phalanx::{launch, Group};

use bert::batching::Batching;
use bert::config::{Backend, Config, Hook, Precision};
use bert::flags::{Flags, Settings};
use bert::job::{
    apply_nccl, gather_usage, join, set_threads, stopped, use_threads, Nccl, NCCL_SETTINGS,
};
use bert::journal::Journal;
use bert::machine::{self, Estimate, Usage};
use bert::metrics::{Summary, Versions};
use bert::resume::Checkpoints;
use bert::train::Trainer;
use bert::{data, failure, model, report, source, weights};

fn main() -> ExitCode {
    let flags = match Flags::parse_or_explain() {
        Ok(flags) => flags,
        Err(code) => return ExitCode::from(code),
    };
    launch::record_panics();
    bert::job::log_to_stderr();
    run(&flags).unwrap_or_else(|error| {
        let message = failure::message(&error);
        launch::record_failure(&message);
        eprintln!("error: {message}");
        ExitCode::from(failure::exit_code(&error))
    })
}

fn run(flags: &Flags) -> Result<ExitCode> {
    let settings = flags.settings()?;
    if launch::is_worker() {
        let mut nccl = apply_nccl(&settings.config);
        return launch::each_generation(|| {
            let world = World::from_env()?;
            flags.launch.check_against(&world)?;
            rank(flags, &settings, &world, nccl.take())
        });
    }
    let launch = flags.launch(&settings);
    let options = launch.options_with(&LaunchDefaults::from_env()?)?;
    let world_size = options.nnodes.saturating_mul(options.nproc_per_node);
    let local_ranks = options.node_rank.map_or(world_size, |_| options.nproc_per_node);
    if world_size > 0 {
        check(flags, &settings, world_size, local_ranks)?; // of none, the launcher complains
    }
    if let Some(path) = &flags.train.init_weights {
        weights::check(path, &settings.config.model)?;
    }
    if world_size == 1 && options.max_restarts == 0 && launch.hostfile.is_none() {
        let nccl = apply_nccl(&settings.config);
        return rank(flags, &settings, &World::single(), nccl);
    }
    // Prepared here, where the terminal is, and once for all ranks of this machine.
    drop(data::open(&settings.config, &Terminal::stderr())?);
    let program = std::env::current_exe().context("finding this program's own file")?;
    let args: Vec<_> = std::env::args_os().skip(1).collect();
    Ok(launch.run(&program, &args)?.exit_code())
}

/// Batches that add up, memory for the ranks of this machine, and what NCCL's settings name of it.
fn check(flags: &Flags, settings: &Settings, world: usize, local_ranks: usize) -> Result<Batching> {
    let batching = settings.batching(world)?;
    let may_use_nccl = match settings.config.ddp.backend {
        Backend::Nccl => true,
        Backend::Auto => launch::gpu_count()? > 0,
        Backend::Host | Backend::Mpi => false,
    };
    if may_use_nccl {
        settings.config.nccl.check().context(NCCL_SETTINGS)?;
    }
    let estimate = |config: &Config| Estimate::new(config, world, batching.micro_batch);
    if let Some(free) = machine::free(Path::new("/")).filter(|_| !flags.train.ignore_memory) {
        let shipped = bert::config::file::shipped()?;
        let smaller: Vec<_> = shipped.iter().map(|(name, c)| (*name, estimate(c))).collect();
        machine::check(estimate(&settings.config), local_ranks, &free, &smaller)?;
    }
    Ok(batching)
}

/// The life of one rank, in one generation of the job.
fn rank(flags: &Flags, settings: &Settings, world: &World, nccl: Option<Nccl>) -> Result<ExitCode> {
    let config = &settings.config;
    // First of all that libtorch is asked: it finds CUDA in its first look, or never.
    let cuda = ddp::load_cuda();
    let root = world.rank == 0;
    // On a machine without a GPU the adapters that they name may well be missing.
    if let (Some(nccl), Cuda::Available { device_count: 1.. }) = (nccl, cuda) {
        for line in NcclSettings::lines(&nccl.context(NCCL_SETTINGS)?, world.rank) {
            println!("{line}");
        }
    }
    // Our own launcher has checked for all ranks of this machine. Of other launchers' ranks the
    // first of a machine does, before any of them takes memory.
    let ours = matches!(world.launcher, Launcher::Phalanx | Launcher::Single);
    let batching = if ours || world.local_rank != 0 {
        settings.batching(world.world_size)?
    } else {
        check(flags, settings, world.world_size, world.local_world_size)?
    };
    let progress: &dyn Progress = if root { &Terminal::stderr() } else { &Silent };
    let mut source = data::open(config, progress)?;
    if let Some(disturbance) = flags.disturb_loader.filter(|one| one.rank == world.rank) {
        source.samples = disturbance.of(source.samples);
    }
    // Before the others are met: a place that cannot be written is then this rank's trouble alone.
    let mut journal = root
        .then(|| {
            Journal::open(config, &settings.name, flags.train.metrics.as_deref(), world.world_size)
        })
        .transpose()?;
    let mut group = join(config, cuda, root)?;
    let threads = set_threads(config, &group);
    if root {
        announce(settings, &group, batching, threads, &source.description);
    }
    let device = group.device().map_or(Device::Cpu, Device::Cuda);
    let vs = nn::VarStore::new(device);
    let network = model::build(&vs, &config.model, config.train.seed, world.rank)?;
    if let Some(path) = flags.train.init_weights.as_ref().filter(|_| root) {
        weights::check(path, &config.model)?;
    }
    let exchange = !flags.train.no_exchange;
    let mut trainer = Trainer::new(network, &vs, &mut group, (config, batching, exchange))?;
    if let Some(path) = &flags.train.init_weights {
        let left = trainer.load_weights(path)?;
        if let Some(name) = left.first().filter(|_| root) {
            println!("note   {} tensors of {} are not used: {name} …", left.len(), path.display());
        }
    }
    // `--threads 1` under torchrun looks to Ddp like torchrun's own default.
    use_threads(threads);
    let (mut checkpoints, start) = Checkpoints::open(config, &mut trainer)?;
    let place = (device, start.data.as_ref());
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
            return Ok(stopped(step, signal, root.then_some(config)));
        }
    }
    let peak_memory = gather_usage(&mut group)?;
    // All ranks, for none may have all of the model.
    trainer.save_weights(&journal.as_ref().map_or_else(PathBuf::new, Journal::weights))?;
    if let Some(journal) = journal {
        let summary = summary(config, &group, batching, (threads, peak_memory), &trainer)?;
        print!("{}", journal.close(config, &summary)?);
    }
    Ok(ExitCode::SUCCESS)
}

fn announce(settings: &Settings, group: &Group, batching: Batching, threads: usize, data: &str) {
    let Config { model, optimizer, train, ddp, .. } = &settings.config;
    let Batching { global_batch, micro_batch, accumulate, .. } = batching;
    println!(
        "model  {} M parameters: {} layers × {}, {} heads, {:?}{}",
        report::millions(model.parameter_count()),
        model.num_hidden_layers,
        model.hidden_size,
        model.num_attention_heads,
        train.precision,
        if train.recompute { ", layers computed again in backward" } else { "" },
    );
    println!("data   {data}");
    println!(
        "ranks  {} on {} node(s), {threads} thread(s) each, backend {}, zero {}{}",
        group.world_size(),
        group.node_count(),
        group.backend().name(),
        ddp.zero,
        if ddp.hook == Hook::None { String::new() } else { format!(", hook {}", ddp.hook) },
    );
    if let Some(choice) = group.backend_choice() {
        println!("device {}: {choice}", if group.device().is_some() { "GPU" } else { "CPU" });
    }
    println!(
        "batch  {global_batch} a step, at most {micro_batch} at once, {accumulate} micro-batch(es); {} \
         steps of {:?}, lr {:e}",
        train.steps, optimizer.rule, optimizer.lr
    );
    let on_cpu = group.device().is_none();
    if on_cpu && train.precision == Precision::Bf16 && !machine::has_bf16_products() {
        println!("note   this processor has no bf16 products: fp32 will be faster here");
    }
}

fn summary(
    config: &Config,
    group: &Group,
    batching: Batching,
    (threads, peak_memory): (usize, Vec<Usage>),
    trainer: &Trainer,
) -> Result<Summary> {
    Ok(Summary {
        steps: config.train.steps,
        parameters: config.model.parameter_count(),
        world_size: group.world_size(),
        mesh: None,
        stage_blocks: None,
        estimated_bytes: Vec::new(),
        readers: group.world_size(),
        node_count: group.node_count(),
        backend: group.backend().name().to_owned(),
        threads,
        global_batch: batching.global_batch,
        micro_batch: batching.micro_batch,
        accumulate: batching.accumulate,
        precision: config.train.precision,
        zero: config.ddp.zero,
        hook: config.ddp.hook,
        skipped: trainer.skipped_count(),
        stragglers: trainer.stragglers()?,
        peak_memory_sum_bytes: peak_memory.iter().map(|m| m.proportional_peak_bytes).sum(),
        peak_memory,
        versions: Versions::new(),
    })
}
