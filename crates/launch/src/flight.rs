//! What the ranks' flight recorders say about a failure: who is to blame, who saw it first, where everybody was.

use std::fs::{File, OpenOptions};
use std::io::{self, Write as _};
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;
use std::time::Duration;

use phalanx_comm::recorder::{lineup, summary, FlightRecord, Operation, OperationState, WORLD};
use phalanx_comm::Op;
use rustix::time::{clock_gettime, ClockId};

use crate::rank::Rank;
use crate::report::Evidence;

/// What [`investigate`] found.
pub(crate) struct Finding {
    /// The index of the rank that is the root cause.
    pub(crate) culprit: usize,
    pub(crate) evidence: Evidence,
}

/// How a rank opens the memory that its launcher holds.
pub(crate) fn path(memory: &File) -> String {
    format!("/proc/{}/fd/{}", std::process::id(), memory.as_raw_fd())
}

/// The clock that the recorders use.
pub(crate) fn clock_ns() -> u64 {
    let time = clock_gettime(ClockId::MonotonicCoarse);
    let seconds = u64::try_from(time.tv_sec).unwrap_or(0);
    seconds.wrapping_mul(1_000_000_000).wrapping_add(u64::try_from(time.tv_nsec).unwrap_or(0))
}

/// Whether a rank's group failed because of another rank.
pub(crate) fn accuses(record: &FlightRecord) -> bool {
    let blamed = record.failure.as_ref().and_then(|failure| failure.blamed);
    blamed.is_some_and(|rank| rank != record.rank)
}

/// Follows the accusation of the rank at `suspect` to a rank of this launcher, gathers what all have recorded, and
/// writes the complete line-up to `lineup_path`.
pub(crate) fn investigate(ranks: &[Rank], suspect: usize, lineup_path: &Path) -> Finding {
    let records: Vec<Option<FlightRecord>> = ranks.iter().map(Rank::record).collect();
    let accused = |at: usize| {
        let record = records[at].as_ref().filter(|record| accuses(record))?;
        let blamed = record.failure.as_ref()?.blamed?;
        ranks.iter().position(|rank| rank.number == blamed)
    };
    // One step only: whoever is accused by a witness may itself have been told by another.
    let culprit = accused(suspect).unwrap_or(suspect);
    let number = ranks[culprit].number;
    let mut evidence = Evidence { log: ranks[culprit].log_path.clone(), ..Evidence::default() };
    let all: Vec<FlightRecord> = records.iter().flatten().cloned().collect();
    if let Some(record) = &records[culprit] {
        evidence.operation = last_of_world(record).map(operation);
    }
    let witness = all
        .iter()
        .filter(|record| record.rank != number)
        .filter_map(|record| Some((record, record.failure.as_ref()?)))
        .min_by_key(|(_, failure)| failure.at_ns);
    if let Some((record, failure)) = witness {
        let end_ns = ranks[culprit].ended.map(|ended| ended.clock_ns);
        let after = end_ns.map(|end| Duration::from_nanos(failure.at_ns.saturating_sub(end)));
        evidence.witness = Some((record.rank, after));
        evidence.testimony = Some(failure.text.clone());
    }
    evidence.lineup = summary(&all);
    if evidence.lineup.is_some() {
        match write(lineup_path, &lineup(&all)) {
            Ok(()) => evidence.lineup_path = Some(lineup_path.to_owned()),
            Err(error) => {
                tracing::warn!(path = %lineup_path.display(), %error, "the line-up is not written");
            }
        }
    }
    Finding { culprit, evidence }
}

/// Writes the line-up of the ranks of all nodes beside that of this node; says where it is and what is in it.
pub(crate) fn line_up_nodes(all: &[FlightRecord], lineup_path: &Path) -> Option<String> {
    let said = summary(all)?;
    let stem = lineup_path.file_stem().unwrap_or_default().to_string_lossy();
    let path = lineup_path.with_file_name(format!("{stem}-all-nodes.txt"));
    match write(&path, &lineup(all)) {
        Ok(()) => Some(format!("ranks of all nodes: {said} | operations: {}", path.display())),
        Err(error) => {
            tracing::warn!(path = %path.display(), %error, "the line-up of all nodes is not written");
            Some(format!("ranks of all nodes: {said}"))
        }
    }
}

/// Only for this user, and never over a file or link of somebody else.
fn write(path: &Path, text: &str) -> io::Result<()> {
    let mut options = OpenOptions::new();
    options.write(true).create_new(true).mode(0o600);
    options.open(path)?.write_all(text.as_bytes())
}

fn last_of_world(record: &FlightRecord) -> Option<&Operation> {
    let is_message = |operation: &Operation| matches!(operation.call.op, Op::Send | Op::Receive);
    record
        .operations
        .iter()
        .filter(|operation| operation.group == WORLD && !is_message(operation))
        .max_by_key(|operation| operation.call.seq)
}

/// `op=all_reduce seq=412 tag=bucket3 bytes=1048576 at=src/train.rs:88`
fn operation(operation: &Operation) -> String {
    let call = &operation.call;
    let mut text = format!("op={} seq={}", call.op.name(), call.seq);
    if !call.tag.is_empty() {
        text += &format!(" tag={:?}", call.tag);
    }
    if let Some(dtype) = call.dtype {
        text += &format!(" bytes={}", call.len.saturating_mul(dtype.size_bytes() as u64));
    }
    text += &format!(" at={}", operation.site);
    match operation.state {
        OperationState::Finished(_) => text + " (finished)",
        OperationState::Started | OperationState::Failed(_) => text,
    }
}
