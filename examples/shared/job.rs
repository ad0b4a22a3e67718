//! A trainer as a job of several ranks: how a rank joins the others, with how many threads it computes, how it ends.

use std::process::ExitCode;
use std::time::Duration;

use anyhow::Result;
use phalanx_comm::environment::{Launcher, NcclSettingError};
use phalanx_comm::{Backend as CommBackend, Group, GroupOptions};
use phalanx_ddp_core::Cuda;

use super::config::{Backend, Config};
use super::failure;
use super::machine::Usage;

/// Before an error of them.
pub(crate) const NCCL_SETTINGS: &str = "the configuration's NCCL settings";

/// Shows what the libraries have to say (who is waited for, strangers at the port, lost connections).
pub(crate) fn log_to_stderr() {
    let log = tracing_subscriber::fmt().with_writer(std::io::stderr).with_ansi(false);
    log.with_max_level(tracing::Level::INFO).compact().init();
}

/// What NCCL will see.
pub(crate) type Nccl = Result<Vec<(String, String, bool)>, NcclSettingError>;

/// Where NCCL may be used. Once, while this process has one thread.
pub(crate) fn apply_nccl(config: &Config) -> Option<Nccl> {
    let may_use_nccl = matches!(config.ddp.backend, Backend::Auto | Backend::Nccl);
    may_use_nccl.then(|| config.nccl.apply())
}

/// A signal has ended the run, whose step is saved: Slurm's says that time is up, and the job is to start again. Rank 0 has
/// the `config` to say where.
#[expect(clippy::print_stdout, reason = "this is the program's output")]
pub(crate) fn stopped(step: u64, signal: i32, config: Option<&Config>) -> ExitCode {
    if let Some(config) = config {
        let place = match config.checkpoint.folder {
            Some(_) => "",
            None => " in the launcher's memory",
        };
        println!("stopped by signal {signal}; step {step} is saved{place}");
    }
    ExitCode::from(failure::stopped_by(signal))
}

/// As many threads as the configuration says, else this rank's share of the cores.
pub(crate) fn set_threads(config: &Config, group: &Group) -> usize {
    // Our launcher has worked the share out; a lone process takes what libtorch takes. Other
    // launchers do not know that ranks compute with threads: torchrun sets 1.
    let share = match group.launcher() {
        Launcher::Phalanx | Launcher::Single => {
            usize::try_from(tch::get_num_threads()).unwrap_or(1)
        }
        _ => group.core_share(),
    };
    let threads = config.train.threads.unwrap_or(share).max(1);
    use_threads(threads);
    threads
}

/// libtorch computes with so many.
pub(crate) fn use_threads(threads: usize) {
    tch::set_num_threads(i32::try_from(threads).unwrap_or(i32::MAX));
}

/// For whom a rank waits how long.
pub(crate) fn times(config: &Config) -> GroupOptions {
    let dead_after = Duration::from_secs_f64(config.ddp.dead_after_s);
    // Ten heartbeats, as by default.
    GroupOptions {
        timeout: Duration::from_secs(config.ddp.timeout_s),
        heartbeat: dead_after / 10,
        dead_after,
        ..GroupOptions::default()
    }
}

/// Meets the other ranks, over the backend that the configuration names.
#[expect(clippy::print_stdout, reason = "this is the program's output")]
pub(crate) fn join(config: &Config, cuda: &Cuda, root: bool) -> Result<Group> {
    let options = times(config);
    let options = match config.ddp.backend {
        Backend::Host => options,
        Backend::Nccl => GroupOptions { backend: CommBackend::Nccl, ..options },
        // On a GPU where there is one that libtorch can use.
        Backend::Mpi if matches!(cuda, Cuda::Available { device_count: 1.. }) => {
            GroupOptions { backend: CommBackend::Mpi, gpu_memory: true, ..options }
        }
        Backend::Mpi => GroupOptions { backend: CommBackend::Mpi, ..options },
        Backend::Auto => GroupOptions { backend: CommBackend::Auto, ..options },
    };
    // libtorch's half of CUDA: without it the group must not choose the GPU.
    let trouble = match cuda {
        Cuda::Available { device_count: 1.. } | Cuda::NoDriver => None,
        Cuda::Available { .. } => {
            Some("libtorch sees no GPU: look at nvidia-smi and CUDA_VISIBLE_DEVICES".to_owned())
        }
        Cuda::NoLibtorchCuda { message } => Some(format!(
            "libtorch's CUDA support cannot be loaded ({message}): run scripts/setup.sh --cuda, or put \
             the torch/lib folder of the full wheel on LD_LIBRARY_PATH"
        )),
    };
    let options = match (config.ddp.backend, &trouble) {
        // All ranks hear it.
        (Backend::Auto | Backend::Nccl, Some(trouble)) => {
            GroupOptions { gpu_trouble: Some(trouble.into()), ..options }
        }
        _ => options,
    };
    let group = Group::from_environment(options)?;
    if let (Backend::Mpi, true) = (config.ddp.backend, root) {
        match (group.device(), trouble) {
            (Some(_), _) => println!("device GPU: its memory travels over MPI"),
            (None, Some(trouble)) => println!("device CPU: {trouble}"),
            (None, None) => println!("device CPU: no NVIDIA driver is installed here"),
        }
    }
    Ok(group)
}

/// What every rank took. Collective.
pub(crate) fn gather_usage(group: &mut Group) -> Result<Vec<Usage>> {
    let mine = serde_json::to_vec(&Usage::of_this_process())?;
    let all = group.all_gather_bytes(&mine)?;
    all.iter().map(|bytes| Ok(serde_json::from_slice(bytes)?)).collect()
}
