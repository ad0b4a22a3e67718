//! The launcher's options on a program's own command line, and a `main` that is launcher and rank in one.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use phalanx_comm::environment::World;

use crate::error::{system, LaunchError};
use crate::options::{LaunchOptions, Prefix};
use crate::report::Report;
use crate::run::{is_worker, run};

/// Options for starting ranks; flatten them into a program's own (`#[command(flatten)]`).
#[derive(Clone, Debug, clap::Args)]
#[command(next_help_heading = "Launching")]
pub struct LaunchArgs {
    /// Nodes of the job; without --node-rank they are emulated on this machine [default: 1]
    #[arg(long, value_name = "N")]
    pub nnodes: Option<usize>,
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
    /// Keep the output of each rank, and a record of errors, in a new folder in here
    #[arg(long, value_name = "DIR")]
    pub log_dir: Option<PathBuf>,
    /// Serve a PyTorch `TCPStore` on this address of node 0, for Python programs beside the job; it has no authentication
    #[arg(long, value_name = "IP:PORT")]
    pub torch_store: Option<SocketAddr>,
}

fn seconds(text: &str) -> Result<f64, String> {
    match text.parse() {
        Ok(seconds) if (0.0..=86_400.0).contains(&seconds) => Ok(seconds),
        _ => Err("expected seconds, 0 to 86400".to_owned()),
    }
}

impl LaunchArgs {
    /// The same as [`LaunchOptions`].
    #[must_use]
    pub fn options(&self) -> LaunchOptions {
        LaunchOptions {
            nnodes: self.nnodes.unwrap_or(1),
            nproc_per_node: self.nproc_per_node.unwrap_or(1),
            node_rank: self.node_rank,
            master_addr: self.master_addr.clone(),
            master_port: self.master_port,
            threads: self.threads,
            prefix: if self.no_prefix { Prefix::Off } else { Prefix::Auto },
            grace: Duration::from_secs_f64(self.grace),
            log_dir: self.log_dir.clone(),
            torch_store: self.torch_store,
            ..LaunchOptions::default()
        }
    }
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
/// on one machine needs no launcher and no second process: it is [`Joined::Worker`] as well, unless `--threads` or
/// `--log-dir` call for one.
///
/// # Errors
///
/// As [`run`], and [`LaunchError::Contradiction`]; end with [`LaunchError::exit_code`].
pub fn launch_or_join(args: &LaunchArgs) -> Result<Joined, LaunchError> {
    if is_worker() {
        args.check_against(&World::from_env()?)?;
        return Ok(Joined::Worker);
    }
    let options = args.options();
    let asked = options.nnodes.saturating_mul(options.nproc_per_node);
    if asked == 1 && args.threads.is_none() && args.log_dir.is_none() {
        return Ok(Joined::Worker);
    }
    let program = std::env::current_exe().map_err(system("find this program's own path"))?;
    let arguments: Vec<_> = std::env::args_os().skip(1).collect();
    run(&options, &program, &arguments).map(Joined::Finished)
}
