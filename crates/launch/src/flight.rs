//! What the ranks' flight recorders say about a failure: who is to blame, who saw it first, where everybody was.

use std::fs::{File, OpenOptions};
use std::io::{self, Write as _};
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use phalanx_comm::recorder::{lineup, summary, FlightRecord, Operation, OperationState};
use rustix::time::{clock_gettime, ClockId};

use crate::logs::create_beside;
use crate::rank::Rank;
use crate::report::Evidence;

/// The rank that is the root cause.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Culprit {
    /// The rank of this launcher at this index.
    Here(usize),
    /// A rank of another node, by its number.
    Elsewhere(usize),
}

/// What [`investigate`] found.
pub(crate) struct Finding {
    pub(crate) culprit: Culprit,
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

/// The other rank, of `world_size`, because of which a rank's group failed.
pub(crate) fn accused(record: &FlightRecord, ranks: &[Rank], world_size: usize) -> Option<Culprit> {
    let number = record.failure.as_ref()?.blamed.filter(|number| *number != record.rank)?;
    match ranks.iter().position(|rank| rank.number == number) {
        Some(at) => Some(Culprit::Here(at)),
        None => (number < world_size).then_some(Culprit::Elsewhere(number)),
    }
}

/// What a rank's record says of the failure of a group.
#[derive(Clone, Copy)]
struct Accusation {
    whom: Culprit,
    group: u64,
    at_ns: u64,
}

/// Whom the accusation of `suspect` leads to. Of the ranks of one group it is followed by one step only: whoever is accused by a
/// witness may itself have been told by another. But who failed a group because another group of its own had failed is a witness,
/// too.
fn root(suspect: usize, accuses: impl Fn(usize) -> Option<Accusation>) -> Culprit {
    let Some(first) = accuses(suspect) else { return Culprit::Here(suspect) };
    let (mut last, mut seen) = (first, vec![suspect]);
    while let Culprit::Here(at) = last.whom {
        if seen.contains(&at) {
            return first.whom;
        }
        seen.push(at);
        match accuses(at) {
            Some(next) if next.group != last.group && next.at_ns <= last.at_ns => last = next,
            _ => break,
        }
    }
    last.whom
}

/// Follows the accusation of the rank at `suspect`, gathers what all have recorded, and writes the complete line-up to
/// `lineup_path`.
pub(crate) fn investigate(
    ranks: &[Rank],
    suspect: usize,
    world_size: usize,
    lineup_path: &Path,
) -> Finding {
    let records: Vec<Option<FlightRecord>> = ranks.iter().map(Rank::record).collect();
    let culprit = root(suspect, |at| {
        let record = records[at].as_ref()?;
        let failure = record.failure.as_ref()?;
        let whom = accused(record, ranks, world_size)?;
        Some(Accusation { whom, group: failure.group, at_ns: failure.at_ns })
    });
    let (number, at) = match culprit {
        Culprit::Here(at) => (ranks[at].number, Some(at)),
        Culprit::Elsewhere(number) => (number, None),
    };
    let mut evidence = Evidence::default();
    let all: Vec<FlightRecord> = records.iter().flatten().cloned().collect();
    if let Some(at) = at {
        evidence.log.clone_from(&ranks[at].log_path);
        let record = records[at].as_ref();
        evidence.role = record.and_then(|record| record.role.clone());
        evidence.operation = record.and_then(FlightRecord::last_collective).map(operation);
    }
    // An error of its own that blames nobody, and it lives: all ranks have it.
    let own = at.filter(|&at| ranks[at].ended.is_none()).and_then(|at| records[at].as_ref());
    let own = own.and_then(|record| record.failure.as_ref()).filter(|it| it.blamed.is_none());
    evidence.testimony = own.map(|failure| failure.text.clone());
    let witness = all
        .iter()
        .filter(|_| own.is_none())
        .filter(|record| record.rank != number)
        .filter_map(|record| Some((record, record.failure.as_ref()?)))
        .min_by_key(|(_, failure)| failure.at_ns);
    if let Some((record, failure)) = witness {
        let end_ns = at.and_then(|at| ranks[at].ended).map(|ended| ended.clock_ns);
        let after = end_ns.map(|end| Duration::from_nanos(failure.at_ns.saturating_sub(end)));
        evidence.witness = Some((record.rank, after));
        evidence.testimony = Some(failure.text.clone());
    }
    evidence.lineup = summary(&all);
    if evidence.lineup.is_some() {
        match write(lineup_path, &lineup(&all)) {
            Ok(path) => evidence.lineup_path = Some(path),
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
        Ok(at) => Some(format!("ranks of all nodes: {said} | operations: {}", at.display())),
        Err(error) => {
            tracing::warn!(path = %path.display(), %error, "the line-up of all nodes is not written");
            Some(format!("ranks of all nodes: {said}"))
        }
    }
}

/// Only for this user, and never over a file or link of somebody else or another run: its name may get a number.
fn write(path: &Path, text: &str) -> io::Result<PathBuf> {
    let mut options = OpenOptions::new();
    options.write(true).create_new(true).mode(0o600);
    let folder = path.parent().unwrap_or(Path::new(""));
    let stem = path.file_stem().unwrap_or_default().to_string_lossy();
    let (mut file, made) = create_beside(folder, &stem, ".txt", |free| options.open(free))?;
    file.write_all(text.as_bytes())?;
    Ok(made)
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

#[cfg(test)]
mod tests {
    use super::*;

    /// Where it leads when ranks 0, 1, … accuse these: another rank, of the failure of which group, and when.
    fn lead(suspect: usize, accusations: &[Option<(usize, u64, u64)>]) -> Culprit {
        root(suspect, |at| {
            let (whom, group, at_ns) = accusations[at]?;
            let is_here = whom < accusations.len();
            let whom = if is_here { Culprit::Here(whom) } else { Culprit::Elsewhere(whom) };
            Some(Accusation { whom, group, at_ns })
        })
    }

    #[test]
    fn an_accusation_is_followed_into_the_group_that_failed_before() {
        const PART: u64 = 7;
        let chain = [Some((1, 0, 20)), Some((2, PART, 10)), None];
        assert_eq!(lead(0, &chain), Culprit::Here(2));
        assert_eq!(lead(1, &chain), Culprit::Here(2));
        assert_eq!(lead(2, &chain), Culprit::Here(2));
        let elsewhere = [Some((1, 0, 20)), Some((5, PART, 20))];
        assert_eq!(lead(0, &elsewhere), Culprit::Elsewhere(5));
    }

    #[test]
    fn it_is_followed_by_one_step_within_a_group_and_never_into_what_came_later() {
        // Rank 1 stays away; it is told by rank 0, whose time was over first.
        let told = [Some((1, 0, 10)), Some((0, 0, 10)), Some((1, 0, 10))];
        assert_eq!(lead(0, &told), Culprit::Here(1));
        assert_eq!(lead(2, &told), Culprit::Here(1));
        assert_eq!(lead(0, &[Some((1, 0, 10)), Some((2, 7, 30)), None]), Culprit::Here(1));
        // Whoever is in a circle is no better a culprit than the first.
        let circle = [Some((1, 0, 10)), Some((2, 7, 10)), Some((1, 8, 10))];
        assert_eq!(lead(0, &circle), Culprit::Here(1));
    }
}
