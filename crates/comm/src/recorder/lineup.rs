//! Several ranks' records side by side: who is at which collective, and who is missing. Pure.

use std::cmp::Reverse;
use std::collections::BTreeMap;
use std::fmt::Write as _;

use super::record::{FlightRecord, Operation, OperationState};
use super::WORLD;
use crate::fingerprint::Op;

/// Operations of each rank that the complete report shows.
const SHOWN: usize = 40;

impl FlightRecord {
    /// The collectives, oldest first.
    fn collectives(&self) -> impl Iterator<Item = &Operation> {
        let is_message =
            |operation: &Operation| matches!(operation.call.op, Op::Send | Op::Receive);
        self.operations.iter().filter(move |operation| !is_message(operation))
    }

    /// The collective that matters, of whatever group: the newest that has not ended well, else the newest.
    #[must_use]
    pub fn last_collective(&self) -> Option<&Operation> {
        last_collective(std::slice::from_ref(self))
    }
}

/// The rank that most failures blame; of equals the one that was blamed first. The clocks of different machines do not compare.
fn most_blamed(records: &[FlightRecord]) -> Option<usize> {
    let mut blamed: BTreeMap<usize, (usize, Reverse<u64>)> = BTreeMap::new();
    for failure in records.iter().filter_map(|record| record.failure.as_ref()) {
        let Some(rank) = failure.blamed else { continue };
        let (votes, first) = blamed.entry(rank).or_insert((0, Reverse(u64::MAX)));
        *votes += 1;
        *first = Reverse(first.0.min(failure.at_ns));
    }
    blamed.into_iter().max_by_key(|(_, said)| *said).map(|(rank, _)| rank)
}

/// Of those that have not ended well rather one of the rank that is blamed, then one of the group whose failure blames it.
/// Of equals the newest.
fn last_collective(records: &[FlightRecord]) -> Option<&Operation> {
    let culprit = most_blamed(records);
    let failures = records.iter().filter_map(|record| record.failure.as_ref());
    let first =
        failures.filter(|failure| failure.blamed == culprit).min_by_key(|failure| failure.at_ns);
    let is_culprits = |operation: &Operation| culprit == Some(operation.rank);
    let has_failed =
        |operation: &Operation| first.is_some_and(|failure| failure.group == operation.group);
    records.iter().flat_map(FlightRecord::collectives).max_by_key(|operation| {
        let is_open = !matches!(operation.state, OperationState::Finished(_));
        let matters = is_open.then(|| (is_culprits(operation), has_failed(operation)));
        (matters, operation.started_ns)
    })
}

/// Where each rank is in each group: the last collective that it has started there.
fn last_of(records: &[FlightRecord]) -> BTreeMap<u64, BTreeMap<usize, &Operation>> {
    let mut groups: BTreeMap<u64, BTreeMap<usize, &Operation>> = BTreeMap::new();
    for operation in records.iter().flat_map(FlightRecord::collectives) {
        let last = groups.entry(operation.group).or_default();
        let known = last.entry(operation.rank).or_insert(operation);
        if operation.call.seq >= known.call.seq {
            *known = operation;
        }
    }
    groups
}

fn place(operation: &Operation) -> String {
    let how = match operation.state {
        OperationState::Finished(_) => "after",
        OperationState::Started | OperationState::Failed(_) => "in",
    };
    format!("{how} {} ({})", operation.call, operation.site)
}

pub(super) fn ranks_text(ranks: &[usize]) -> String {
    const SHOWN_RANKS: usize = 16;
    let list: Vec<String> = ranks.iter().take(SHOWN_RANKS).map(ToString::to_string).collect();
    let plural = if ranks.len() == 1 { "rank" } else { "ranks" };
    let more = if ranks.len() > SHOWN_RANKS { ",…" } else { "" };
    format!("{plural} {}{more}", list.join(","))
}

/// Ranks by where they are, furthest first.
fn places(last: &BTreeMap<usize, &Operation>) -> Vec<(String, Vec<usize>)> {
    let mut by_place: BTreeMap<(Reverse<u64>, String), Vec<usize>> = BTreeMap::new();
    for (rank, operation) in last {
        let key = (Reverse(operation.call.seq), place(operation));
        by_place.entry(key).or_default().push(*rank);
    }
    by_place.into_iter().map(|((_, place), ranks)| (place, ranks)).collect()
}

/// One line: where the ranks are, in the group with a collective that has not ended (of several: in which the rank that is
/// most blame is, else that failed first, else with the newest), else in that of the newest. `None` when nobody has called
/// anything.
///
/// `ranks 0,2 in all_reduce #412 "bucket 3" (262144 × f32, sum) (src/train.rs:88); rank 1 after …`
#[must_use]
pub fn summary(records: &[FlightRecord]) -> Option<String> {
    let group = last_collective(records)?.group;
    let groups = last_of(records);
    let last = groups.get(&group)?;
    let mut parts: Vec<String> = places(last)
        .into_iter()
        .map(|(place, ranks)| format!("{} {place}", ranks_text(&ranks)))
        .collect();
    let silent: Vec<usize> =
        records.iter().map(|record| record.rank).filter(|rank| !last.contains_key(rank)).collect();
    if !silent.is_empty() {
        let of_what = if group == WORLD { "yet" } else { "of this group" };
        parts.push(format!("{} in no collective {of_what}", ranks_text(&silent)));
    }
    Some(parts.join("; "))
}

/// The complete report: every group's line-up, then every rank's last operations.
#[must_use]
pub fn lineup(records: &[FlightRecord]) -> String {
    let mut text = String::new();
    for (group, last) in last_of(records) {
        let name = if group == WORLD {
            "the group of all ranks".to_owned()
        } else {
            format!("group {group:016x}")
        };
        _ = writeln!(text, "{name}:");
        let furthest = last.values().map(|operation| operation.call.seq).max().unwrap_or(0);
        for (place, ranks) in places(&last) {
            let seq = ranks.first().and_then(|rank| last.get(rank)).map_or(0, |op| op.call.seq);
            let behind = match furthest - seq {
                0 => String::new(),
                count => format!(", {count} behind"),
            };
            _ = writeln!(text, "  {} {place}{behind}", ranks_text(&ranks));
        }
    }
    let end = records.iter().flat_map(|record| &record.operations).map(latest).max().unwrap_or(0);
    for record in records {
        let FlightRecord { rank, world_size, pid, started, .. } = record;
        _ = writeln!(
            text,
            "\nrank {rank} of {world_size} (pid {pid}): {started} operations; seconds before the last event of all ranks, the newest {SHOWN}:"
        );
        if let Some(failure) = &record.failure {
            _ = writeln!(text, "  {:>9} failed: {}", before(end, failure.at_ns), failure.text);
        }
        let skipped = record.operations.len().saturating_sub(SHOWN);
        for operation in &record.operations[skipped..] {
            let state = match operation.state {
                OperationState::Started => "not ended".to_owned(),
                OperationState::Finished(0) => "finished".to_owned(),
                OperationState::Failed(0) => "failed".to_owned(),
                OperationState::Finished(at) => format!("finished {}", before(end, at)),
                OperationState::Failed(at) => format!("failed {}", before(end, at)),
            };
            let Operation { call, site, started_ns, .. } = operation;
            _ = writeln!(text, "  {:>9} {call} at {site}: {state}", before(end, *started_ns));
        }
    }
    text
}

fn latest(operation: &Operation) -> u64 {
    match operation.state {
        OperationState::Started => operation.started_ns,
        OperationState::Finished(at) | OperationState::Failed(at) => at.max(operation.started_ns),
    }
}

fn before(end: u64, at: u64) -> String {
    let nanos = end.saturating_sub(at);
    format!("-{}.{:03}", nanos / 1_000_000_000, nanos / 1_000_000 % 1000)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fingerprint::CallRecord;
    use crate::recorder::RecordedFailure;

    fn operation(rank: usize, op: Op, seq: u64, state: OperationState) -> Operation {
        let call = CallRecord {
            op,
            seq,
            dtype: None,
            len: 0,
            reduction: "",
            root: None,
            tag: format!("t{seq}"),
        };
        let site = "src/train.rs:88".to_owned();
        Operation { rank, group: WORLD, call, site, started_ns: seq * 1_000_000_000, state }
    }

    fn record(rank: usize, operations: Vec<Operation>) -> FlightRecord {
        let started = operations.len() as u64;
        let progress = None;
        FlightRecord {
            rank,
            world_size: 4,
            pid: 100,
            role: None,
            started,
            progress,
            failure: None,
            operations,
        }
    }

    fn ranks() -> Vec<FlightRecord> {
        let done = OperationState::Finished(411_500_000_000);
        let at = |rank, seq, state| operation(rank, Op::AllReduce, seq, state);
        vec![
            record(0, vec![at(0, 411, done), at(0, 412, OperationState::Started)]),
            record(1, vec![at(1, 411, done)]),
            record(2, vec![at(2, 411, done), at(2, 412, OperationState::Failed(0))]),
            record(3, vec![operation(3, Op::Send, 500, OperationState::Started)]),
        ]
    }

    #[test]
    fn the_summary_says_who_is_where() {
        assert_eq!(
            summary(&ranks()).unwrap(),
            "ranks 0,2 in all_reduce #412 \"t412\" (src/train.rs:88); \
             rank 1 after all_reduce #411 \"t411\" (src/train.rs:88); \
             rank 3 in no collective yet"
        );
        assert_eq!(summary(&[record(0, vec![])]), None);
    }

    fn with_part(mut record: FlightRecord, seq: u64, state: OperationState) -> FlightRecord {
        let group = 7;
        let in_part = operation(record.rank, Op::AllReduce, seq, state);
        record.operations.push(Operation { group, ..in_part });
        record.started += 1;
        record
    }

    #[test]
    fn the_summary_is_of_the_group_in_which_a_collective_has_not_ended() {
        let loss = |rank| {
            record(rank, vec![operation(rank, Op::AllReduce, 9, OperationState::Finished(0))])
        };
        let records = [
            with_part(loss(0), 3, OperationState::Failed(0)),
            with_part(loss(1), 2, OperationState::Finished(0)),
            loss(2),
        ];
        assert_eq!(
            summary(&records).unwrap(),
            "rank 0 in all_reduce #3 \"t3\" (src/train.rs:88); \
             rank 1 after all_reduce #2 \"t2\" (src/train.rs:88); \
             rank 2 in no collective of this group"
        );
        let seqs = records.map(|record| record.last_collective().unwrap().call.seq);
        // Of rank 1 all have ended: the newest of them.
        assert_eq!(seqs, [3, 9, 9]);
    }

    #[test]
    fn of_groups_whose_collectives_have_not_ended_the_first_that_failed_counts() {
        let later = record(0, vec![operation(0, Op::AllReduce, 50, OperationState::Failed(0))]);
        let fails = |mut record: FlightRecord, at_ns, group| {
            let text = String::new();
            record.failure = Some(RecordedFailure { at_ns, group, text, blamed: None });
            record
        };
        let of_part = with_part(record(1, vec![]), 3, OperationState::Failed(0));
        let records = [fails(later, 20, WORLD), fails(of_part, 10, 7)];
        assert!(summary(&records).unwrap().starts_with("rank 1 in all_reduce #3"));
        let blames = |mut record: FlightRecord| {
            record.failure.as_mut().unwrap().blamed = Some(0);
            record
        };
        let blaming = [records[0].clone(), blames(records[1].clone())];
        assert!(summary(&blaming).unwrap().starts_with("rank 0 in all_reduce #50"));
        // Of another machine, whose clock is behind: two accuse rank 0, one rank 1.
        let accuses = |rank, blamed, at_ns| {
            let mut record = fails(record(rank, vec![]), at_ns, WORLD);
            record.failure.as_mut().unwrap().blamed = Some(blamed);
            record
        };
        let machines =
            [blaming[0].clone(), blaming[1].clone(), accuses(2, 0, 30), accuses(3, 1, 1)];
        assert!(summary(&machines).unwrap().starts_with("rank 0 in all_reduce #50"));
        let silent = [records[0].clone(), fails(record(1, vec![]), 10, 7)];
        assert!(summary(&silent).unwrap().starts_with("rank 0 in all_reduce #50"));
    }

    #[test]
    fn ranks_that_called_different_things_stand_apart() {
        let at = |rank, op| record(rank, vec![operation(rank, op, 7, OperationState::Started)]);
        let text = summary(&[at(0, Op::AllReduce), at(1, Op::AllGather)]).unwrap();
        assert!(text.contains("rank 0 in all_reduce #7"), "{text}");
        assert!(text.contains("rank 1 in all_gather #7"), "{text}");
    }

    #[test]
    fn the_report_has_every_ranks_operations() {
        let text = lineup(&ranks());
        assert!(text.contains("rank 1 after all_reduce #411 \"t411\" (src/train.rs:88), 1 behind"));
        assert!(text.contains("rank 3 of 4 (pid 100): 1 operations"), "{text}");
        assert!(text.contains("all_reduce #412 \"t412\" at src/train.rs:88: not ended"), "{text}");
        let many = (0..100).map(|seq| operation(0, Op::Barrier, seq, OperationState::Started));
        assert_eq!(lineup(&[record(0, many.collect())]).lines().count(), 2 + 2 + SHOWN);
    }
}
