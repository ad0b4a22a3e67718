//! The launcher's options on a program's own command line, and a `main` that is launcher and rank in one.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::time::Duration;

use phalanx_rendezvous::environment::{LaunchDefaults, RanksPerNode, World};

use crate::error::{system, LaunchError};
use crate::gpus::gpu_count;
use crate::hosts::Fleet;
use crate::options::{LaunchOptions, Prefix};
use crate::report::Report;
use crate::run::{is_worker, run};

/// Options for starting ranks; flatten them into a program's own (`#[command(flatten)]`).
#[derive(Clone, Debug, clap::Args)]
#[command(next_help_heading = "Launching")]
pub struct LaunchArgs {
    /// Nodes of the job; without --node-rank they are emulated on this machine. MIN:MAX: real ones, which may come and go [default: 1]
    #[arg(long, value_name = "N|MIN:MAX")]
    pub nnodes: Option<NodeCount>,
    /// Ranks that each node starts [default: 1]
    #[arg(long, value_name = "P")]
    pub nproc_per_node: Option<usize>,
    /// This machine's number, when the nodes are real
    #[arg(long, value_name = "R")]
    pub node_rank: Option<usize>,
    /// Name or address of node 0, when the nodes are real
    #[arg(long, value_name = "HOST")]
    pub master_addr: Option<String>,
    /// Port of the store on node 0 [default: any free one on one machine, else 29500]
    #[arg(long, value_name = "PORT")]
    pub master_port: Option<u16>,
    /// Threads of each rank [default: `OMP_NUM_THREADS` if set, else cores / ranks on this machine]
    #[arg(long, value_name = "T")]
    pub threads: Option<usize>,
    /// Do not put `[rank N]` before lines
    #[arg(long)]
    pub no_prefix: bool,
    /// Seconds that ranks get to end before they are killed
    #[arg(long, value_name = "SECONDS", default_value_t = 10.0, value_parser = seconds)]
    pub grace: f64,
    /// Start all ranks again after a failure, so often at most [default: 0]
    #[arg(long, value_name = "N")]
    pub max_restarts: Option<u32>,
    /// --max-restarts counts within so many seconds, not within the whole job
    #[arg(long, value_name = "SECONDS", value_parser = seconds, requires = "max_restarts")]
    pub restart_window: Option<f64>,
    /// Give up when so many attempts one after the other come no further than the same step
    #[arg(long, value_name = "ATTEMPTS", default_value_t = 3, value_parser = clap::value_parser!(u32).range(2..))]
    pub crash_loop: u32,
    /// Keep the output of each rank, and a record of errors, in a new folder in here
    #[arg(long, value_name = "DIR")]
    pub log_dir: Option<PathBuf>,
    /// A file of hosts, one a line, with `slots=N` for its ranks: this machine is the first, and starts this same command on the others
    #[arg(long, value_name = "FILE")]
    pub hostfile: Option<PathBuf>,
    /// The command that starts something on a host of --hostfile
    #[arg(long, value_name = "COMMAND", default_value = "ssh -o BatchMode=yes")]
    pub ssh: String,
}

/// How many nodes: `4`, or `2:4` for at least two and at most four.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NodeCount {
    /// The job goes on with so many. `None`: with all or not at all.
    pub min: Option<usize>,
    /// As many as there may be.
    pub max: usize,
}

impl std::str::FromStr for NodeCount {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let number = |word: &str| {
            word.parse::<usize>().map_err(|error| format!("expected N or MIN:MAX ({error})"))
        };
        match text.split_once(':') {
            None => Ok(Self { min: None, max: number(text)? }),
            Some((min, max)) => Ok(Self { min: Some(number(min)?), max: number(max)? }),
        }
    }
}

fn seconds(text: &str) -> Result<f64, String> {
    match text.parse() {
        Ok(seconds) if (0.0..=86_400.0).contains(&seconds) => Ok(seconds),
        _ => Err("expected seconds, 0 to 86400".to_owned()),
    }
}

impl LaunchArgs {
    /// Starts `program` as the flags say, on this machine or on those of the hostfile; what a flag does not say a container
    /// platform may ([`LaunchDefaults`]).
    ///
    /// # Errors
    ///
    /// As [`run`].
    pub fn run(&self, program: &Path, arguments: &[OsString]) -> Result<Report, LaunchError> {
        let defaults = LaunchDefaults::from_env()?;
        let options = self.options_with(&defaults)?;
        match &self.hostfile {
            // Who was told its number is one of the others.
            Some(file) if options.node_rank.is_none() => {
                Fleet { file, flags: self }.run(options, program, arguments)
            }
            _ => run(&options, program, arguments),
        }
    }

    /// The flags as [`LaunchOptions`], completed by what a container platform says. Pure but for the count of GPUs.
    ///
    /// # Errors
    ///
    /// [`LaunchError::Environment`] when the environment holds something ill-formed.
    pub fn options_with(&self, defaults: &LaunchDefaults) -> Result<LaunchOptions, LaunchError> {
        let mut options = self.options();
        if let (None, Some((min, max))) = (self.nnodes, defaults.nnodes) {
            (options.nnodes_min, options.nnodes) = (min, max);
        }
        if let (None, Some(ranks)) = (self.nproc_per_node, defaults.ranks_per_node) {
            options.nproc_per_node = rank_count(ranks)?;
        }
        options.master_addr = options.master_addr.or_else(|| defaults.master_addr.clone());
        options.master_port = options.master_port.or(defaults.master_port);
        // The number of a pod is that of a node only where nodes meet somewhere.
        let index = defaults.completion_index.filter(|_| options.master_addr.is_some());
        options.node_rank = options.node_rank.or(defaults.node_rank).or(index);
        options.max_restarts = self.max_restarts.or(defaults.max_restarts).unwrap_or(0);
        Ok(options)
    }

    /// The flags alone, as [`LaunchOptions`].
    #[must_use]
    pub(crate) fn options(&self) -> LaunchOptions {
        LaunchOptions {
            nnodes: self.nnodes.map_or(1, |count| count.max),
            nnodes_min: self.nnodes.and_then(|count| count.min),
            nproc_per_node: self.nproc_per_node.unwrap_or(1),
            node_rank: self.node_rank,
            master_addr: self.master_addr.clone(),
            master_port: self.master_port,
            threads: self.threads,
            prefix: if self.no_prefix { Prefix::Off } else { Prefix::Auto },
            grace: Duration::from_secs_f64(self.grace),
            log_dir: self.log_dir.clone(),
            max_restarts: self.max_restarts.unwrap_or(0),
            restart_window: self.restart_window.map(Duration::from_secs_f64),
            crash_loop: self.crash_loop,
            ..LaunchOptions::default()
        }
    }
}

fn rank_count(ranks: RanksPerNode) -> Result<usize, LaunchError> {
    let cores = || std::thread::available_parallelism().map_or(1, usize::from);
    Ok(match ranks {
        RanksPerNode::Count(count) => count,
        RanksPerNode::PerGpu => gpu_count()?.max(1),
        RanksPerNode::PerCore => cores(),
        RanksPerNode::Auto => match gpu_count()? {
            0 => cores(),
            count => count,
        },
    })
}

/// Which side of the launch this process is on.
#[derive(Debug)]
pub enum Joined {
    /// A rank: go on and train.
    Worker,
    /// The launcher, whose ranks have ended: return [`Report::exit_code`].
    Finished(Report),
}

/// Makes a program its own launcher: the first process starts this same program, with the same arguments, as every rank
/// and returns [`Joined::Finished`]; the ranks get [`Joined::Worker`].
///
/// A process that another launcher (torchrun, mpirun, srun) has started is a rank at once; what `args` say must then be
/// what that launcher says ([`LaunchArgs::check_against`]). One rank
/// on one machine needs no launcher and no second process: it is [`Joined::Worker`] as well, unless `--threads`,
/// `--log-dir` or `--max-restarts` call for one.
///
/// # Errors
///
/// As [`run`], and [`LaunchError::Contradiction`]; end with [`LaunchError::exit_code`].
pub fn launch_or_join(args: &LaunchArgs) -> Result<Joined, LaunchError> {
    if is_worker() {
        args.check_against(&World::from_env()?)?;
        return Ok(Joined::Worker);
    }
    let options = args.options_with(&LaunchDefaults::from_env()?)?;
    let asked = options.nnodes.saturating_mul(options.nproc_per_node);
    let needs_launcher = options.threads.is_some()
        || options.log_dir.is_some()
        || options.max_restarts > 0
        || args.hostfile.is_some();
    if asked == 1 && !needs_launcher {
        return Ok(Joined::Worker);
    }
    let program = std::env::current_exe().map_err(system("find this program's own path"))?;
    let arguments: Vec<_> = std::env::args_os().skip(1).collect();
    args.run(&program, &arguments).map(Joined::Finished)
}
