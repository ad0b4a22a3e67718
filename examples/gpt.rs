//! Trains GPT-2, Llama or Mixtral on the next tokens of text, on a mesh of ranks that it starts itself.
//!
//! ```text
//! cargo run --release --example gpt -- --nnodes 4 --tp 2 --pp 2
//! ```
//!
//! The same program is launcher and rank: started by hand it checks everything that can be checked
//! without ranks, then starts them; started by itself, torchrun, mpirun or srun it is a rank.
//! What happens stands here, in its order; how, in `gpt/`.

#![expect(clippy::print_stdout, clippy::print_stderr, reason = "a program talks to its user")]

#[path = "gpt/mod.rs"]
mod gpt;

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context as _, Result};
use phalanx::comm::environment::{LaunchDefaults, Launcher, NcclSettings, World};
use phalanx::data::progress::{Progress, Silent, Terminal};
use phalanx::ddp::{self, Cuda};
use phalanx::tch::{nn, Device};
use phalanx::{launch, Group};
use phalanx_model_parallel::Mesh;

use gpt::batching::Batching;
use gpt::config::{Backend, Config, Precision};
use gpt::data::Text;
use gpt::flags::{Flags, Settings};
use gpt::job::{
    apply_nccl, gather_usage, join, set_threads, stopped, use_threads, Nccl, NCCL_SETTINGS,
};
use gpt::journal::Journal;
use gpt::machine::{self, Estimate, Usage};
use gpt::metrics::{Summary, Versions};
use gpt::place::{self, Place};
use gpt::resume::Checkpoints;
use gpt::sample::{self, Choice};
use gpt::train::Trainer;
use gpt::{data, failure, report, source, stages, weights};

/// Tokens of the data that a sample of text begins with.
const PROMPT_MAX: usize = 8;

fn main() -> ExitCode {
    let flags = match Flags::parse_or_explain() {
        Ok(flags) => flags,
        Err(code) => return ExitCode::from(code),
    };
    launch::record_panics();
    gpt::job::log_to_stderr();
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
    if let Some(path) = &flags.train.init_weights {
        weights::check(path, &settings.config.model)?;
    }
    if world_size > 0 {
        // Of none, the launcher complains. Text is prepared here, where the terminal is, and once for all ranks of this machine.
        let of_world = check(flags, &settings, world_size, local_ranks)?;
        let text = data::open(&settings.config, &Terminal::stderr())?;
        check_text(&settings.config, &of_world.0, &text)?;
    }
    if world_size == 1 && options.max_restarts == 0 && launch.hostfile.is_none() {
        let nccl = apply_nccl(&settings.config);
        return rank(flags, &settings, &World::single(), nccl);
    }
    let program = std::env::current_exe().context("finding this program's own file")?;
    let args: Vec<_> = std::env::args_os().skip(1).collect();
    Ok(launch.run(&program, &args)?.exit_code())
}

/// The mesh and the cut of the batch, if they fit the model.
fn of_world(settings: &Settings, world_size: usize) -> Result<(Mesh, Batching)> {
    let mesh = settings.config.mesh.of_world(world_size)?;
    let batching = settings.batching(place::readers(&mesh))?;
    place::check(&settings.config, &mesh, batching)?;
    Ok((mesh, batching))
}

/// [`of_world`], memory for the ranks of this machine, and what NCCL's settings name of it.
fn check(
    flags: &Flags,
    settings: &Settings,
    world_size: usize,
    local_ranks: usize,
) -> Result<(Mesh, Batching)> {
    let (mesh, batching) = of_world(settings, world_size)?;
    let config = &settings.config;
    let may_use_nccl = match config.ddp.backend {
        Backend::Nccl => true,
        Backend::Auto => launch::gpu_count()? > 0,
        Backend::Host | Backend::Mpi => false,
    };
    if may_use_nccl {
        config.nccl.check().context(NCCL_SETTINGS)?;
    }
    if let Some(free) = machine::free(Path::new("/")).filter(|_| !flags.train.ignore_memory) {
        let shipped = gpt::config::file::shipped()?;
        let fits = |other: &Config| place::check(other, &mesh, batching).is_ok();
        let smaller: Vec<_> = shipped
            .iter()
            .filter(|(_, other)| fits(other))
            .map(|(name, other)| (*name, Estimate::new(other, &mesh, batching)))
            .collect();
        machine::check(Estimate::new(config, &mesh, batching), local_ranks, &free, &smaller)?;
    }
    Ok((mesh, batching))
}

/// Whether the sequences can be cut as the mesh wants it.
fn check_text(config: &Config, mesh: &Mesh, text: &Text) -> Result<()> {
    let columns = text.source.samples.columns();
    let length = columns.first().and_then(|column| column.shape.first()).copied();
    place::check_length(config, mesh, length.unwrap_or(config.data.sequence_length))
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
    let (mesh, batching) = if ours || world.local_rank != 0 {
        of_world(settings, world.world_size)?
    } else {
        check(flags, settings, world.world_size, world.local_world_size)?
    };
    let progress: &dyn Progress = if root { &Terminal::stderr() } else { &Silent };
    let text = data::open(config, progress)?;
    check_text(config, &mesh, &text)?;
    // Before the others are met: a place that cannot be written is then this rank's trouble alone.
    let readers = mesh.group_size(phalanx_model_parallel::Axes::DP_CP);
    let metrics = flags.train.metrics.as_deref();
    let mut journal =
        root.then(|| Journal::open(config, &settings.name, metrics, readers)).transpose()?;
    let mut group = join(config, cuda, root)?;
    let threads = set_threads(config, &group);
    let device = group.device().map_or(Device::Cpu, Device::Cuda);
    let place = Place::new((config, batching), mesh.clone(), &mut group)?;
    let warning = place.warning(&mut group)?;
    if root {
        announce(settings, (&group, &place), batching, threads, &text.source.description);
        warning.iter().for_each(|warning| println!("note   {warning}"));
    }
    let reader = place.reader();
    let vs = nn::VarStore::new(device);
    let exchange = !flags.train.no_exchange;
    let mut trainer = Trainer::new(&vs, (place, &mut group), (config, batching, exchange))?;
    if let Some(path) = &flags.train.init_weights {
        let left = trainer.load_weights(path)?;
        if let Some(name) = left.first().filter(|_| root) {
            println!("note   {} tensors of {} are not used: {name} …", left.len(), path.display());
        }
    }
    // `--threads 1` under torchrun looks to Ddp like torchrun's own default.
    use_threads(threads);
    let (mut checkpoints, start) = Checkpoints::open(config, &mut trainer)?;
    let from = (device, start.data.as_ref());
    let mut feed = source::feed(&text.source, config, batching, reader, from)?;
    feed.agree(trainer.readers())?;
    if let Some(journal) = &mut journal {
        journal.go_on(start.step)?;
        start.note.iter().for_each(|note| println!("{note}"));
    }
    for step in start.step + 1..=config.train.steps {
        let record = trainer.step(step, (&mut feed, &mut group))?;
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
    let sampled = sampled(flags, config, &trainer, &text)?;
    if let Some(journal) = journal {
        let summary = summary(config, (&group, &mesh), batching, (threads, peak_memory), &trainer)?;
        print!("{}", journal.close(config, &summary)?);
        sampled.iter().for_each(|line| println!("\n{line}"));
    }
    Ok(ExitCode::SUCCESS)
}

/// What the model writes behind the first words of the data. Collective.
fn sampled(
    flags: &Flags,
    config: &Config,
    trainer: &Trainer,
    text: &Text,
) -> Result<Option<String>> {
    let longest = usize::try_from(config.model.max_position_embeddings)?;
    let prompt = trainer.beginning(PROMPT_MAX.min(longest.div_ceil(2)))?;
    let room = (longest - longest % config.mesh.tokens_of()).saturating_sub(prompt.len());
    let count = flags.sample.min(room);
    if count == 0 || prompt.is_empty() {
        return Ok(None);
    }
    let choice = Choice { temperature: flags.temperature, seed: config.train.seed, keeps: true };
    let tokens = sample::generate(trainer, config.mesh.schedule()?, (&prompt, count), choice)?;
    let (prompt, tokens) = (sample::text(text, &prompt)?, sample::text(text, &tokens)?);
    Ok(Some(format!("sample [{prompt}] {tokens}")))
}

fn announce(
    settings: &Settings,
    (group, place): (&Group, &Place),
    batching: Batching,
    threads: usize,
    data: &str,
) {
    let mesh = &place.mesh;
    let Config { model, optimizer, train, ddp, mesh: section, .. } = &settings.config;
    let Batching { global_batch, micro_batch, accumulate, .. } = batching;
    println!(
        "model  {} M parameters: {:?}, {} layers × {}, {} heads, {:?}{}",
        report::millions(model.parameter_count()),
        model.model_type,
        model.num_hidden_layers,
        model.hidden_size,
        model.num_attention_heads,
        train.precision,
        if train.recompute { ", layers computed again in backward" } else { "" },
    );
    println!("data   {data}");
    println!(
        "ranks  {} on {} node(s), {threads} thread(s) each, backend {}, zero {}",
        group.world_size(),
        group.node_count(),
        group.backend().name(),
        ddp.zero,
    );
    if mesh.world_size() > 1 {
        let sequence = if section.sequence_parallel { ", sequence parallel" } else { "" };
        let schedule = match mesh.shape().pp {
            1 => String::new(),
            _ => format!(", schedule {}", section.schedule),
        };
        println!("mesh   {}{sequence}{schedule}", mesh.shape());
    }
    if mesh.shape().pp > 1 {
        println!("stages {} ({})", stages::described(&place.cut), section.stages);
    }
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
    (group, mesh): (&Group, &Mesh),
    batching: Batching,
    (threads, peak_memory): (usize, Vec<Usage>),
    trainer: &Trainer,
) -> Result<Summary> {
    Ok(Summary {
        steps: config.train.steps,
        parameters: config.model.parameter_count(),
        world_size: group.world_size(),
        mesh: Some(mesh.shape().to_string()),
        stage_blocks: (mesh.shape().pp > 1).then(|| trainer.stage_blocks().to_vec()),
        readers: place::readers(mesh),
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
        estimated_bytes: place::estimates(config, mesh, batching, trainer.stage_blocks())?,
        versions: Versions::new(),
    })
}
