//! `phalanx checkpoint …`

mod convert;
mod diff;
mod inspect;
mod verify;

use std::process::ExitCode;

use anyhow::Result;
use clap::Subcommand;

/// What to do with checkpoints.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Shows what a checkpoint, a folder of them, or files of weights hold.
    Inspect(inspect::InspectArgs),
    /// Reads everything once and compares all checksums. Names all damage and ends with 65 if there is some.
    Verify(verify::VerifyArgs),
    /// Writes a checkpoint or weights anew: as weights that others read (model.safetensors), or as a checkpoint of other shards.
    Convert(convert::ConvertArgs),
    /// Compares two checkpoints or weights: tensors element by element, and values. Ends with 1 if they differ.
    Diff(diff::DiffArgs),
}

/// Runs a command.
pub(crate) fn run(command: &Command) -> Result<ExitCode> {
    match command {
        Command::Inspect(args) => inspect::run(args),
        Command::Verify(args) => verify::run(args),
        Command::Convert(args) => convert::run(args),
        Command::Diff(args) => diff::run(args),
    }
}
