//! Starts the ranks of a job on this machine, shows what they say, and leaves none behind.
//!
//! Without [`LaunchOptions::node_rank`] all nodes are emulated on this machine: `nnodes × nproc_per_node` processes that
//! meet on loopback. With it this machine is one of several, and node 0's launcher hosts the store where all meet.
//!
//! The launcher is a program's own output device: unlike other library crates it writes to standard output and error.
//!
//! * Each rank is a process group of its own with a parent-death signal; a guard kills what ranks have started when the
//!   launcher itself is killed.
//! * The first failure is the root cause; the others are asked to end, and killed after a grace.
//! * [`LaunchOptions::max_restarts`]: then all ranks are started again, unless the failure would come again or the
//!   attempts come no further. Ranks say how far they are ([`progress`]) and that they must not be cut off
//!   ([`committing`]), and look whether they should stop ([`should_stop`]).
//! * A program that would rather stay trains in [`each_generation`]: then only ranks that are lost are started again.
//! * Ctrl-C, SIGTERM, SIGHUP, SIGUSR1 and SIGUSR2 reach the ranks; a second Ctrl-C kills at once.
//! * Lines are prefixed by `[rank N]`. On a terminal rank 0's standard error is a terminal, too, so that its progress bar
//!   shows; lines of other ranks clear the bar, which redraws itself. Ranks have no standard input.
//! * The report is one line, the exit code says what kind of failure it was: see [`Report::code`].
//!
//! # Example
//!
//! A program that starts its own ranks (feature `clap`): `./train --nnodes 4`.
//!
//! ```no_run
//! # #[cfg(feature = "clap")] {
//! use clap::Parser;
//! use phalanx_launch::{launch_or_join, Joined, LaunchArgs};
//!
//! #[derive(Parser)]
//! struct Args {
//!     #[command(flatten)]
//!     launch: LaunchArgs,
//! }
//!
//! fn main() -> std::process::ExitCode {
//!     match launch_or_join(&Args::parse().launch) {
//!         Ok(Joined::Finished(report)) => report.exit_code(),
//!         Ok(Joined::Worker) => std::process::ExitCode::SUCCESS, // this is a rank: train
//!         Err(error) => std::process::ExitCode::from(error.exit_code()),
//!     }
//! }
//! # }
//! ```

#[cfg(feature = "clap")]
mod agreement;
#[cfg(feature = "clap")]
mod args;
mod attempts;
mod control_group;
mod elastic;
mod error;
mod error_file;
mod flight;
mod generations;
mod gpus;
mod guard;
#[cfg(feature = "clap")]
mod hosts;
mod lines;
mod logs;
mod membership;
mod messenger;
mod nodes;
mod options;
mod out_of_memory;
mod plan;
mod process;
mod rank;
mod report;
mod restart;
mod run;
mod screen;
mod signals;
mod start;
mod stay;
mod stop;
mod supervise;
mod suspect;

#[cfg(feature = "clap")]
pub use args::{launch_or_join, Joined, LaunchArgs, NodeCount};
pub use error::LaunchError;
pub use error_file::{record_failure, record_panics};
pub use generations::each_generation;
pub use gpus::gpu_count;
#[cfg(any(test, feature = "testing"))]
pub use membership::simulation;
pub use options::{LaunchOptions, Prefix};
pub use out_of_memory::OutOfMemory;
pub use phalanx_comm::recorder::{committing, progress, Committing};
pub use process::Exit;
pub use report::{Evidence, Failure, RankFailure, Report};
pub use restart::GiveUp;
pub use run::{is_worker, run};
pub use stop::{heed_signals, should_stop};
