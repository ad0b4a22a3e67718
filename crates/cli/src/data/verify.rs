//! `phalanx data verify`: every checksum of a folder, on all processors.

use std::process::ExitCode;
use std::time::Instant;

use anyhow::Result;
use clap::Args;
use phalanx_data::damage::{record_damage, verify, Verified};
use phalanx_data::Error;
use serde_json::json;

use super::{megatron, Data, Folder, ProgressFlag, Threads};
use crate::failure;
use crate::report::{self, bytes, count, real};

#[derive(Args, Debug)]
#[expect(clippy::struct_excessive_bools, reason = "flags")]
pub(crate) struct VerifyArgs {
    #[command(flatten)]
    folder: Folder,
    #[command(flatten)]
    threads: Threads,
    /// Write the damaged blocks to DIR/damage.json, for loaders that leave them out (`OnDamage::Skip`); a list that is there is
    /// replaced, or removed if nothing is damaged.
    #[arg(long)]
    record: bool,
    /// Write one JSON object instead of lines.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    progress: ProgressFlag,
}

pub(crate) fn run(args: &VerifyArgs) -> Result<ExitCode> {
    let folder = match args.folder.checked()? {
        Data::Folder(folder) => folder,
        Data::Megatron(_) if args.record => {
            let reason = "Megatron's files have no checksums, so no damage is found in them";
            let (option, value) = ("record", "true".to_owned());
            return Err(Error::InvalidOption { option, value, reason: reason.to_owned() }.into());
        }
        Data::Megatron(prefix) => {
            megatron::verify(&prefix, args.json)?;
            return Ok(ExitCode::SUCCESS);
        }
    };
    let started = Instant::now();
    let found = verify(folder, args.threads.threads, &*args.progress.reporter())?;
    let seconds = started.elapsed().as_secs_f64();
    if args.json {
        let damage: Vec<String> = found.damage.iter().map(ToString::to_string).collect();
        report::print_json(&json!({
            "good": damage.is_empty(), "files": found.file_count, "blocks": found.block_count,
            "bytes": found.bytes, "seconds": seconds, "damage": damage, "lost": found.lost,
        }))?;
    } else {
        report::print(&as_lines(&found, seconds))?;
    }
    if args.record {
        record_damage(folder, &found)?;
    }
    Ok(ExitCode::from(if found.damage.is_empty() { 0 } else { failure::DATA }))
}

fn as_lines(found: &Verified, seconds: f64) -> String {
    let mut out: String = found.damage.iter().map(|error| format!("damaged: {error}\n")).collect();
    let rate = real(found.bytes) / seconds.max(1e-9) / 1e6;
    let (files, blocks, size) = (found.file_count, count(found.block_count), bytes(found.bytes));
    let result = match found.damage.len() {
        0 => "all good".to_owned(),
        1 => "1 of them is damaged".to_owned(),
        n => format!("{n} of them are damaged"),
    };
    out += &format!("{files} files, {blocks} blocks, {size} at {rate:.0} MB/s: {result}\n");
    out
}
