//! Faults in the middle of collectives, under the launcher: one line names the root cause, whatever the other ranks
//! make of it, and a file shows where every rank was.

mod support;

use std::time::{Duration, Instant};

use support::{Finished, Job};

/// A job of three whose rank 1 has `fault` at its 41st step; its report and the file that the report names. `of` are
/// the options that say in which group that is.
fn job(fault: &str, of: &str) -> (Finished, String) {
    let dir = tempfile::tempdir().expect("a folder");
    let path = dir.path().display();
    let act = format!("--act group --rank 1 --fault {fault} {of}");
    let args = format!("--nproc-per-node 3 {act} --log-dir {path}");
    let finished = Job::start(&args).finish();
    let (_, named) = finished.report().split_once("operations of all ranks: ").expect("a file");
    let file = named.split(" | ").next().expect("split gives one");
    let lineup = std::fs::read_to_string(file).expect("the file is there");
    (finished, lineup)
}

/// The report blames rank 1, says `what`, and knows which collective it had reached.
fn blames(fault: &str, code: i32, what: &[&str]) -> String {
    let (finished, lineup) = job(fault, "");
    let report = finished.report();
    assert!(report.contains("rank 1 on host "), "{fault}: {report}");
    assert!(report.contains("op=all_reduce seq=39 tag=\"bucket 3\" bytes=40000"), "{report}");
    assert!(report.contains("rank.rs:"), "the line of the call: {report}");
    assert!(report.contains("| log: ") && report.contains("| help: "), "{report}");
    for part in what {
        assert!(report.contains(part), "{fault}: no {part:?} in {report}");
    }
    assert_eq!(finished.code, Some(code), "{fault}: {report}");
    assert!(lineup.contains("after all_reduce #39 \"bucket 3\""), "{fault}: {lineup}");
    assert!(lineup.contains("rank 2 of 3 (pid "), "{lineup}");
    lineup
}

#[test]
fn deaths_are_named_with_their_operation_and_their_witness() {
    let seen = "first seen by rank ";
    blames("kill", 70, &["PHX0701", "died: signal 9 (SIGKILL)", seen]);
    blames("abort", 70, &["PHX0701", "died: signal 6 (SIGABRT)", seen]);
    blames("segv", 70, &["PHX0701", "died: signal 11 (SIGSEGV)", seen]);
}

/// Here it has begun the call; where it dies before, others may hear of that before they begin it.
#[test]
fn a_death_in_the_middle_of_a_collective_is_shown_in_it() {
    let (finished, lineup) = job("kill", "--inside");
    assert!(finished.report().contains("rank 1 on host "), "{}", finished.report());
    assert!(lineup.contains("in all_reduce #40 \"bucket 3\""), "{lineup}");
}

#[test]
fn who_panics_over_a_lost_peer_does_not_hide_the_peer() {
    blames("panic", 70, &["PHX0702", "ended with exit code 101", "out of paper"]);
    blames("error", 65, &["PHX0702", "ended with exit code 65", "cannot go on"]);
    let early = ["PHX0702", "left early, with exit code 0", "first seen by rank "];
    blames("exit", 70, &early);
    blames("leave", 70, &[&early[..], &["left the group after 40 collectives"]].concat());
}

#[test]
fn a_stopped_rank_is_the_cause_though_it_never_ends() {
    let state = "process state T (stopped: SIGCONT lets it go on)";
    let what = ["PHX0703", "has not ended", "first seen by rank ", "not responding for 5", state];
    blames("stop", 70, &what);
}

#[test]
fn a_rank_that_stays_away_is_the_cause_though_it_never_ends() {
    let text = blames("idle", 70, &["PHX0703", "has not ended", "5s passed on rank"]);
    assert!(text.contains("rank 1 after"), "{text}");
}

/// `Ddp` works on a duplicate of the group of all ranks; in the part, rank 1 has the number 0.
const PARTS: [&str; 2] = ["--of duplicate", "--of part"];

#[test]
fn a_death_in_a_part_of_the_group_is_shown_with_the_parts_collective() {
    for of in PARTS {
        let (finished, lineup) = job("kill", &format!("{of} --inside"));
        let report = finished.report();
        assert!(report.contains("PHX0701]: rank 1 on host"), "{of}: {report}");
        let operation = "| op=all_reduce seq=40 tag=\"bucket 3\" bytes=40000 at=";
        assert!(report.contains(operation), "{of}: {report}");
        let (_, ranks) = report.split_once("| ranks: ").expect("where they were");
        let (ranks, _) = ranks.split_once(" | ").expect("more follows");
        assert!(ranks.contains("in all_reduce #40 \"bucket 3\""), "{of}: {ranks}");
        assert!(!ranks.contains("loss"), "{of}: {ranks}");
        assert!(lineup.contains("\"loss\""), "the file has both groups: {lineup}");
        assert_eq!(finished.code, Some(70), "{of}: {report}");
    }
}

/// The report blames rank 1 with `number` and says `what`; the exit code is 70.
fn blames_in_parts(fault: &str, number: &str, what: &str) -> [(String, String); 2] {
    PARTS.map(|of| {
        let (finished, lineup) = job(fault, of);
        let report = finished.report().to_owned();
        let start = format!("error[{number}]: rank 1 on host ");
        assert!(report.starts_with(&start), "{of}: {report}");
        assert!(report.contains(what), "{of}: no {what:?} in {report}");
        assert_eq!(finished.code, Some(70), "{of}: {report}");
        (report, lineup)
    })
}

#[test]
fn a_rank_that_stays_away_from_a_part_of_the_group_is_the_cause() {
    let [duplicate, part] = blames_in_parts("idle", "PHX0703", "5s passed on rank");
    for (report, who) in [(&duplicate.0, "ranks 0,2"), (&part.0, "rank 2")] {
        let place = format!("| ranks: {who} in all_reduce #40 \"bucket 3\"");
        assert!(report.contains(&place), "{report}");
        assert!(report.contains("; rank 1 after all_reduce #39 \"bucket 3\""), "{report}");
    }
    assert!(part.0.contains("; rank 0 in no collective of this group"), "{}", part.0);
    let numbered = "in the group of ranks 1,2, where they are numbered from 0: all_reduce #40";
    assert!(part.0.contains(numbered), "{}", part.0);
}

#[test]
fn a_panic_in_a_part_of_the_group_is_the_cause() {
    blames_in_parts("panic", "PHX0702", "is out of paper");
}

#[test]
fn a_rank_that_is_stopped_in_a_part_of_the_group_is_the_cause() {
    blames_in_parts("stop", "PHX0703", "process state T (stopped");
}

#[test]
fn a_rank_that_is_stopped_for_three_seconds_is_no_failure() {
    let start = Instant::now();
    let finished = Job::start("--nproc-per-node 3 --act group --rank 1 --fault pause").finish();
    assert_eq!(finished.code, Some(0), "{:?}", finished.errors);
    assert!(!finished.errors.iter().any(|line| line.contains("error")), "{:?}", finished.errors);
    assert!(start.elapsed() > Duration::from_secs(3), "it was stopped");
}

#[test]
fn a_rank_that_calls_something_else_is_shown_beside_the_others() {
    let (finished, lineup) = job("other", "");
    let report = finished.report();
    assert!(report.contains("barrier #40 \"other\""), "{report}");
    assert!(report.contains("all_reduce #40 \"bucket 3\""), "{report}");
    assert!(report.contains("rank 1 in barrier #40"), "{report}");
    // Rank 0 or rank 2 or both: the first of them to come finds the difference.
    let shown =
        ["rank 0 in", "rank 2 in", "ranks 0,2 in"].map(|who| format!("{who} all_reduce #40"));
    assert!(shown.iter().any(|line| lineup.contains(line)), "{lineup}");
}
