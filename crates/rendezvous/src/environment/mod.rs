//! Who am I? The one module of this crate that reads the environment.
//!
//! Each launcher leaves variables of its own. [`World::from_lookup`] is a pure function over a lookup, so
//! that every case is tested without touching the process; [`World::from_env`] hands it the real environment.
//!
//! Precedence, first match wins:
//!
//! 1. `RANK`, `WORLD_SIZE` and `MASTER_ADDR`: our launcher, torchrun, or set by hand;
//! 2. `OMPI_COMM_WORLD_*`: Open MPI's `mpirun`. Before Slurm, because `mpirun` inside `sbatch` lets every rank inherit
//!    the batch step's `SLURM_PROCID=0`;
//! 3. `MV2_COMM_WORLD_*`: MVAPICH2; `HOROVOD_*`;
//! 4. `PMI_RANK`, `PMI_SIZE`: MPICH's Hydra, Intel MPI (a Slurm step that says the same is preferred: it knows the nodes);
//! 5. a Slurm step (`SLURM_STEP_ID`): `srun`;
//! 6. none of them: a world of one.
//!
//! Every variable is listed in `docs/environment.md`.

mod job_token;
mod launchers;
mod mpi;
mod mpi_library;
mod nccl;
mod nccl_settings;
mod platform;
mod recorder;
mod slurm;
mod slurm_step;
mod snapshots;
mod stay;
#[cfg(test)]
mod tests;
mod threads;
mod variables;

use sha2::{Digest, Sha256};

pub use job_token::JobToken;
pub use mpi_library::{
    data_checks, host_link, is_started_by_mpi, launched, master_addr, mpi_cuda_aware, mpi_threads,
    store_port,
};
#[cfg(any(test, feature = "testing"))]
pub use nccl::is_required;
pub use nccl::{nccl_host_id, nccl_lacks, nccl_library};
pub use nccl_settings::{NcclSettingError, NcclSettings};
pub use platform::{LaunchDefaults, RanksPerNode};
pub use recorder::flight_recorder;
pub use snapshots::snapshot_memory;
pub use stay::{take_place, StayOffer};
pub use threads::ThreadVariables;

/// Who started this process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Launcher {
    /// Our own.
    Phalanx,
    /// PyTorch's.
    Torchrun,
    /// Open MPI's `mpirun`.
    OpenMpi,
    /// MPICH's Hydra, Intel MPI.
    Pmi,
    /// MVAPICH2's `mpirun_rsh`.
    Mvapich,
    /// Horovod's `horovodrun`.
    Horovod,
    /// Slurm's `srun`.
    Slurm,
    /// `RANK`, `WORLD_SIZE`, `MASTER_ADDR`, `MASTER_PORT` set by hand or by a container platform.
    Manual,
    /// Nobody: a world of one.
    Single,
}

impl Launcher {
    /// What users call it.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Phalanx => "phalanx's launcher",
            Self::Torchrun => "torchrun",
            Self::OpenMpi => "mpirun (Open MPI)",
            Self::Pmi => "mpiexec (MPICH, Intel MPI)",
            Self::Mvapich => "mpirun_rsh (MVAPICH2)",
            Self::Horovod => "horovodrun",
            Self::Slurm => "srun",
            Self::Manual => "whoever set RANK, WORLD_SIZE and MASTER_ADDR",
            Self::Single => "nobody",
        }
    }
}

/// Who hosts the store.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StoreHost {
    /// This rank starts the server, then connects to it.
    ThisRank,
    /// The launcher, or rank 0 when that is not this rank.
    Elsewhere,
    /// Rank 0 on a free port, which it advertises in the `TCPStore` that torchrun's agent serves at `master_addr` and
    /// `master_port`.
    Agent,
    /// Rank 0 on a free port, which it tells the others over MPI: for programs built with the feature `mpi` whose launcher
    /// does not say enough to meet without it. Address, port, run id and nodes are known when they have met
    /// (`Group::from_environment`).
    Mpi,
}

/// How ranks of one machine talk to each other (`PHALANX_HOST_LINK`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum HostLink {
    /// Shared memory where it works, else TCP, with a warning.
    #[default]
    Auto,
    /// Shared memory; an error where it does not work, as between machines.
    Shm,
    /// TCP also inside a machine (for tests, and to compare).
    Tcp,
}

/// This rank's place in the job, and where the others are to be met.
#[derive(Clone, Debug)]
pub struct World {
    /// 0 … `world_size` − 1.
    pub rank: usize,
    /// How many ranks there are.
    pub world_size: usize,
    /// 0 … `local_world_size` − 1 on this node.
    pub local_rank: usize,
    /// How many ranks this node has.
    pub local_world_size: usize,
    /// 0 … `node_count` − 1. Under Open MPI and PMI over several machines this assumes placement in blocks of equal
    /// length: those launchers do not say. A group knows better, once its ranks have met.
    pub node_rank: usize,
    /// How many nodes there are; emulated ones count.
    pub node_count: usize,
    /// Host name or IP address of node 0.
    pub master_addr: String,
    /// Port of the store on node 0.
    pub master_port: u16,
    /// Names the job; not secret.
    pub run_id: String,
    /// How often the job was restarted.
    pub restart_count: u32,
    /// The secret of the job.
    pub job_token: JobToken,
    /// Who hosts the store.
    pub store_host: StoreHost,
    /// Who started this process.
    pub launcher: Launcher,
    /// How ranks of one machine talk.
    pub host_link: HostLink,
    /// Whether what collectives send to other machines over TCP has checksums (`PHALANX_DATA_CHECKS`). A group goes without
    /// them where none of its ranks wants them.
    pub data_checks: bool,
}

/// The environment does not say who we are, or contradicts itself.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum EnvironmentError {
    /// A variable that the others call for is absent.
    #[error("{variable} is not set, but {because}: set it too, or unset the others")]
    Missing {
        /// The absent variable.
        variable: &'static str,
        /// Which other variable calls for it.
        because: String,
    },
    /// A variable has a value that makes no sense.
    #[error("{variable}={value:?} is not {expected}")]
    Invalid {
        /// The variable.
        variable: &'static str,
        /// What it holds.
        value: String,
        /// What would be right.
        expected: String,
    },
    /// The launcher says nothing about where node 0 is, and there are several machines.
    #[error("{launcher} does not say where rank 0 runs, and the job spans several machines ({local_world_size} of {world_size} ranks are here): set MASTER_ADDR to rank 0's machine, e.g. {example}")]
    NoMasterAddress {
        /// The launcher's name.
        launcher: &'static str,
        /// Ranks on this machine.
        local_world_size: usize,
        /// Ranks in all.
        world_size: usize,
        /// The option that passes the variable on.
        example: &'static str,
    },
}

impl World {
    /// Reads the process's environment.
    ///
    /// # Errors
    ///
    /// [`EnvironmentError`] naming the variable, its value and what was expected.
    pub fn from_env() -> Result<Self, EnvironmentError> {
        let variables = variables::Variables::new(&process_variable);
        launchers::world(&variables.meeting_over_mpi(cfg!(feature = "mpi")))
    }

    /// As [`World::from_env`] over any environment: `lookup` gives the value of a variable. Empty counts as unset. Never
    /// with [`StoreHost::Mpi`].
    ///
    /// # Errors
    ///
    /// As [`World::from_env`].
    pub fn from_lookup(lookup: &dyn Fn(&str) -> Option<String>) -> Result<Self, EnvironmentError> {
        launchers::world(&variables::Variables::new(lookup))
    }

    /// Whether the process's environment says that a launcher started this process as a rank. An ill-formed
    /// environment counts as yes: [`World::from_env`] then says what is wrong.
    #[must_use]
    pub fn is_in_env() -> bool {
        !matches!(Self::from_env(), Ok(Self { launcher: Launcher::Single, .. }))
    }

    /// Whether [`World::node_rank`] and [`World::node_count`] are a guess, of a launcher that does not say which ranks
    /// share a node (or, as Horovod with its `CROSS` variables, not where nodes differ in size).
    #[must_use]
    pub const fn nodes_are_guessed(&self) -> bool {
        let is_silent = matches!(
            self.launcher,
            Launcher::OpenMpi | Launcher::Pmi | Launcher::Mvapich | Launcher::Horovod
        );
        is_silent && self.local_world_size < self.world_size
    }

    /// A world of one, whatever the environment says.
    #[must_use]
    pub fn single() -> Self {
        Self::threads(0, 1)
    }

    /// One of `world_size` ranks that are threads of this process (with a
    /// [`MemoryStore`](crate::MemoryStore)).
    ///
    /// # Panics
    ///
    /// When `rank` is not below `world_size`.
    #[must_use]
    pub fn threads(rank: usize, world_size: usize) -> Self {
        assert!(rank < world_size, "rank {rank} is not below the world size {world_size}");
        let run_id = format!("process-{}", std::process::id());
        Self {
            rank,
            world_size,
            local_rank: rank,
            local_world_size: world_size,
            node_rank: 0,
            node_count: 1,
            master_addr: LOOPBACK.to_owned(),
            master_port: 0,
            job_token: JobToken::derive(&[&run_id]),
            run_id,
            restart_count: 0,
            store_host: if rank == 0 { StoreHost::ThisRank } else { StoreHost::Elsewhere },
            launcher: Launcher::Single,
            host_link: HostLink::Auto,
            data_checks: true,
        }
    }

    /// Where the store (or, with [`StoreHost::Agent`], the way to it) is to be found: loopback when the job is on one machine, whatever name the machine has.
    #[must_use]
    pub fn store_address(&self) -> (&str, u16) {
        let host = if self.node_count == 1 { LOOPBACK } else { &self.master_addr };
        (host, self.master_port)
    }
}

/// What a launcher reads from its own environment, which it does not share with its ranks as it stands.
#[derive(Clone, Debug, Default)]
pub struct LauncherEnvironment {
    /// `PHALANX_JOB_TOKEN`.
    pub job_token: Option<JobToken>,
    /// `PHALANX_RUN_ID`.
    pub run_id: Option<String>,
    /// `OMP_NUM_THREADS` as it stands: the user's choice, which the launcher leaves alone.
    pub omp_num_threads: Option<String>,
    /// `CUDA_VISIBLE_DEVICES`: which GPUs the ranks will see.
    pub visible_gpus: Option<String>,
}

impl LauncherEnvironment {
    /// Reads the process's environment.
    ///
    /// # Errors
    ///
    /// [`EnvironmentError::Invalid`] for an ill-formed token.
    pub fn from_env() -> Result<Self, EnvironmentError> {
        launchers::launcher_environment(&variables::Variables::new(&process_variable))
    }
}

/// Where torchrun looks for the message of a worker that failed (`TORCHELASTIC_ERROR_FILE`).
#[must_use]
pub fn torchrun_error_file() -> Option<std::path::PathBuf> {
    // torchrun leaves it empty when it keeps no logs.
    std::env::var_os("TORCHELASTIC_ERROR_FILE").filter(|path| !path.is_empty()).map(Into::into)
}

fn process_variable(name: &str) -> Option<String> {
    stay::told(name).or_else(|| given_variable(name))
}

/// As the process was started with it.
fn given_variable(name: &str) -> Option<String> {
    std::env::var_os(name).map(|value| value.to_string_lossy().into_owned())
}

/// The address of jobs on one machine.
pub const LOOPBACK: &str = "127.0.0.1";

/// A port that all ranks of a run compute alike: 20000 … 31999, below the range that Linux hands out to clients
/// (32768 up), where a chance connection could hold it.
fn derived_port(run_id: &str) -> u16 {
    const FIRST: u16 = 20_000;
    const COUNT: u16 = 12_000;
    let hash = Sha256::digest(run_id);
    let seed = u16::from_le_bytes([hash[0], hash[1]]);
    FIRST + seed % COUNT
}
