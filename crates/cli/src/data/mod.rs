//! `phalanx data …`

mod bench;
mod convert;
mod inspect;
mod megatron;
mod records;
mod verify;

use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::Result;
use clap::{Args, Subcommand, ValueEnum};
use phalanx_data::format::TokenIndex;
use phalanx_data::progress::{Progress, Silent, Terminal};
use phalanx_data::{Access, Error};

/// What to do with data.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Turns text (plain, JSON lines, tables) into shards of tokens, and arrays and columns into records. Repeat the command after an interruption: it goes on.
    Convert(convert::ConvertArgs),
    /// Shows what a folder holds: shards, tokens, documents, vocabulary, fingerprint, and some of it.
    Inspect(inspect::InspectArgs),
    /// Reads everything once and compares all checksums. Names every damaged block and ends with 65 if there is one.
    Verify(verify::VerifyArgs),
    /// Times the loader on a folder: sequences and tokens a second, the first batch, and how long each step waited.
    Bench(bench::BenchArgs),
}

/// Runs a command.
pub(crate) fn run(command: &Command) -> Result<ExitCode> {
    match command {
        Command::Convert(args) => convert::run(args),
        Command::Inspect(args) => inspect::run(args),
        Command::Verify(args) => verify::run(args),
        Command::Bench(args) => bench::run(args),
    }
}

/// A folder of prepared data.
#[derive(Args, Debug)]
pub(crate) struct Folder {
    /// A prepared folder (it holds `index.json` and shards), or the prefix of Megatron's files PREFIX.bin and PREFIX.idx.
    #[arg(value_name = "DIR")]
    path: PathBuf,
}

impl Folder {
    /// What it is, or what to do if it is no prepared folder.
    fn checked(&self) -> Result<Data<'_>> {
        if let Some(prefix) = megatron::prefix(&self.path) {
            return Ok(Data::Megatron(prefix));
        }
        if !self.path.exists() {
            return Err(Error::DataMissing { path: self.path.clone() }.into());
        }
        if !TokenIndex::is_in(&self.path) {
            return Err(Error::NotPrepared { path: self.path.clone() }.into());
        }
        Ok(Data::Folder(&self.path))
    }
}

/// What a path stands for.
enum Data<'a> {
    Folder(&'a Path),
    /// Megatron's files with this prefix.
    Megatron(PathBuf),
}

/// How many threads work.
#[derive(Args, Clone, Copy, Debug)]
pub(crate) struct Threads {
    /// Threads that work; all processors if not given.
    #[arg(long, value_name = "N")]
    threads: Option<NonZeroUsize>,
}

/// Whether progress is shown.
#[derive(Args, Clone, Copy, Debug)]
pub(crate) struct ProgressFlag {
    /// No progress on standard error.
    #[arg(long)]
    quiet: bool,
}

impl ProgressFlag {
    fn reporter(self) -> Box<dyn Progress> {
        if self.quiet {
            Box::new(Silent)
        } else {
            Box::new(Terminal::stderr())
        }
    }
}

/// How files are read.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub(crate) enum AccessFlag {
    /// Maps on a disk of this machine, pread on a network's file system.
    Auto,
    /// pread: for network filesystems and data that somebody may touch.
    Read,
    /// Memory maps: for local data that nobody writes to.
    Map,
}

impl From<AccessFlag> for Access {
    fn from(flag: AccessFlag) -> Access {
        match flag {
            AccessFlag::Auto => Access::Auto,
            AccessFlag::Read => Access::Read,
            AccessFlag::Map => Access::Map,
        }
    }
}
