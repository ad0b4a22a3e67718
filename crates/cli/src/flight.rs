//! `phalanx flight`: the records that ranks left under `PHALANX_FLIGHT_RECORDER`, side by side.

use std::collections::BTreeMap;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::SystemTime;

use anyhow::{bail, Context as _, Result};
use clap::Args;
use phalanx_comm::recorder::{lineup, summary, FlightRecord};

use crate::report::print;

#[derive(Debug, Args)]
pub(crate) struct FlightArgs {
    /// Folders that `PHALANX_FLIGHT_RECORDER` named, or single records in them.
    #[arg(required = true)]
    places: Vec<PathBuf>,
}

/// A rank's newest record, and when it was last written.
type Newest = BTreeMap<usize, (SystemTime, FlightRecord)>;

pub(crate) fn run(args: &FlightArgs) -> Result<ExitCode> {
    let mut newest = Newest::new();
    for place in &args.places {
        for file in files(place)? {
            take(&file, &mut newest)?;
        }
    }
    let records: Vec<FlightRecord> = newest.into_values().map(|(_, record)| record).collect();
    let Some(first) = records.first() else {
        let places: Vec<String> = args.places.iter().map(|p| p.display().to_string()).collect();
        bail!(
            "no rank has recorded anything in {}: start the ranks with PHALANX_FLIGHT_RECORDER=FOLDER",
            places.join(", ")
        );
    };
    let (world_size, found) = (first.world_size, records.len());
    let absent = (0..world_size).filter(|rank| !records.iter().any(|record| record.rank == *rank));
    let absent: Vec<String> = absent.map(|rank| rank.to_string()).collect();
    let mut text = format!("records of {found} of {world_size} ranks");
    if !absent.is_empty() {
        text += &format!("; none of {}", absent.join(","));
    }
    if let Some(summary) = summary(&records) {
        text += &format!("\n{summary}");
    }
    print(&format!("{text}\n\n{}", lineup(&records)))?;
    Ok(ExitCode::SUCCESS)
}

/// The records in a folder, or the one that was named.
fn files(place: &Path) -> Result<Vec<PathBuf>> {
    if place.is_file() {
        return Ok(vec![place.to_path_buf()]);
    }
    let entries = std::fs::read_dir(place).with_context(|| format!("open {}", place.display()))?;
    let mut files = Vec::new();
    for entry in entries {
        let entry = entry.with_context(|| format!("read {}", place.display()))?;
        if entry.file_name().to_string_lossy().starts_with("flight-") {
            files.push(entry.path());
        }
    }
    Ok(files)
}

/// A rank that was started again has several records in a folder; the newest counts.
fn take(path: &Path, newest: &mut Newest) -> Result<()> {
    let reading = || format!("read {}", path.display());
    let file = File::open(path).with_context(reading)?;
    let written = file.metadata().and_then(|metadata| metadata.modified()).with_context(reading)?;
    let Some(record) = FlightRecord::read(&file).with_context(reading)? else { return Ok(()) };
    let rank = record.rank;
    match newest.get(&rank) {
        Some((before, _)) if *before >= written => {}
        _ => drop(newest.insert(rank, (written, record))),
    }
    Ok(())
}
