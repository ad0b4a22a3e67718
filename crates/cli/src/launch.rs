//! `phalanx launch`: any program as the ranks of a job.

use std::ffi::OsString;
use std::path::Path;
use std::process::ExitCode;

use anyhow::Result;
use clap::Args;
use phalanx_launch::LaunchArgs;

#[derive(Args, Debug)]
pub(crate) struct LaunchCommand {
    #[command(flatten)]
    launch: LaunchArgs,
    /// The program that every rank runs, and its arguments.
    #[arg(last = true, required = true, value_name = "PROGRAM")]
    command: Vec<OsString>,
}

/// Ends with the job's exit code.
pub(crate) fn run(args: &LaunchCommand) -> Result<ExitCode> {
    let Some((program, arguments)) = args.command.split_first() else {
        anyhow::bail!("there is no program to launch") // clap asks for one
    };
    Ok(args.launch.run(Path::new(program), arguments)?.exit_code())
}
