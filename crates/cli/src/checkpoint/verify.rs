//! `phalanx checkpoint verify`: every checksum of a checkpoint, or of all in a folder.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{bail, Result};
use clap::Args;
use phalanx_checkpoint::{Checkpoint, Error, Folder, State, Weights};
use serde_json::{json, Value};

use crate::failure::{self, Usage};
use crate::report::{self, bytes, count};

#[derive(Args, Debug)]
#[expect(clippy::struct_excessive_bools, reason = "flags")]
pub(crate) struct VerifyArgs {
    /// A checkpoint (step-…), or a folder of them.
    #[arg(value_name = "PATH")]
    path: PathBuf,
    /// Of a folder all checkpoints, not the newest alone.
    #[arg(long)]
    all: bool,
    /// Write one JSON object instead of lines.
    #[arg(long)]
    json: bool,
}

/// What was found of one checkpoint.
struct Found {
    path: PathBuf,
    files: usize,
    blocks: u64,
    bytes: u64,
    damage: Vec<String>,
}

pub(crate) fn run(args: &VerifyArgs) -> Result<ExitCode> {
    let found = found(args)?;
    let is_good = found.iter().all(|one| one.damage.is_empty());
    if args.json {
        let checkpoints: Vec<Value> = found.iter().map(as_json).collect();
        report::print_json(&json!({ "good": is_good, "checkpoints": checkpoints }))?;
    } else {
        report::print(&found.iter().map(as_lines).collect::<String>())?;
    }
    Ok(ExitCode::from(if is_good { 0 } else { failure::DATA }))
}

fn found(args: &VerifyArgs) -> Result<Vec<Found>> {
    let mut listed = Folder::new(&args.path).list().unwrap_or_default();
    listed.retain(|one| !matches!(one.state, State::Incomplete));
    if listed.is_empty() {
        return Ok(vec![verified(args.path.clone(), Checkpoint::open(&args.path))?]);
    }
    let first = if args.all { 0 } else { listed.len() - 1 };
    let chosen = listed.drain(first..).map(|one| {
        let opened = match one.state {
            State::Complete(checkpoint) => Ok(*checkpoint),
            State::Damaged(error) => Err(error),
            _ => Err(Error::NotFound { path: one.path.clone() }),
        };
        verified(one.path, opened)
    });
    chosen.collect()
}

/// Reads a checkpoint; that it is damaged is no error here, that there is none is.
fn verified(path: PathBuf, opened: phalanx_checkpoint::Result<Checkpoint>) -> Result<Found> {
    match opened {
        Ok(checkpoint) => {
            let found = checkpoint.verify();
            let damage = found.damage.iter().map(ToString::to_string).collect();
            Ok(Found { path, files: found.files, blocks: found.blocks, bytes: found.bytes, damage })
        }
        Err(error) if error.is_damage() => {
            Ok(Found { path, files: 0, blocks: 0, bytes: 0, damage: vec![error.to_string()] })
        }
        Err(Error::NotFound { .. }) if Weights::open(&path).is_ok() => {
            bail!(Usage(format!("{} has no checksums: only checkpoints have", path.display())))
        }
        Err(error) => Err(error.into()),
    }
}

fn as_json(found: &Found) -> Value {
    json!({
        "path": found.path, "good": found.damage.is_empty(), "files": found.files,
        "blocks": found.blocks, "bytes": found.bytes, "damage": found.damage,
    })
}

fn as_lines(found: &Found) -> String {
    let mut out: String = found.damage.iter().map(|error| format!("damaged: {error}\n")).collect();
    let result = match found.damage.len() {
        0 => "all good".to_owned(),
        1 => "damaged in 1 place".to_owned(),
        n => format!("damaged in {n} places"),
    };
    let (blocks, size) = (count(found.blocks), bytes(found.bytes));
    let path = found.path.display();
    out += &format!("{path}: {} files, {blocks} blocks, {size}: {result}\n", found.files);
    out
}
