//! Faults in the middle of collectives, under the launcher: one line names the root cause, whatever the other ranks
//! make of it, and a file shows where every rank was.

mod support;

use std::time::{Duration, Instant};

use support::{Finished, Job};

/// A job of three whose rank 1 has `fault` at its 41st step; its report and the file that the report names.
fn job(fault: &str) -> (Finished, String, Duration) {
    let dir = tempfile::tempdir().expect("a folder");
    let path = dir.path().display();
    let start = Instant::now();
    let args = format!("--nproc-per-node 3 --act group --rank 1 --fault {fault} --log-dir {path}");
    let finished = Job::start(&args).finish();
    let elapsed = start.elapsed();
    let (_, named) = finished.report().split_once("operations of all ranks: ").expect("a file");
    let file = named.split(" | ").next().expect("split gives one");
    let lineup = std::fs::read_to_string(file).expect("the file is there");
    (finished, lineup, elapsed)
}

/// The report blames rank 1, says `what`, and knows which collective it had reached.
fn blames(fault: &str, code: i32, what: &[&str]) -> String {
    let (finished, lineup, elapsed) = job(fault);
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
    assert!(elapsed < Duration::from_secs(10), "{fault}: {elapsed:?}");
    lineup
}

#[test]
fn deaths_are_named_with_their_operation_and_their_witness() {
    let seen = "first seen by rank ";
    let lineup = blames("kill", 70, &["PHX0701", "died: signal 9 (SIGKILL)", seen]);
    assert!(lineup.contains("in all_reduce #40 \"bucket 3\""), "{lineup}");
    blames("abort", 70, &["PHX0701", "died: signal 6 (SIGABRT)", seen]);
    blames("segv", 70, &["PHX0701", "died: signal 11 (SIGSEGV)", seen]);
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
    let text = blames("idle", 70, &["PHX0703", "has not ended", "2s passed on rank"]);
    assert!(text.contains("rank 1 after"), "{text}");
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
    let (finished, lineup, elapsed) = job("other");
    let report = finished.report();
    assert!(report.contains("barrier #40 \"other\""), "{report}");
    assert!(report.contains("all_reduce #40 \"bucket 3\""), "{report}");
    assert!(report.contains("rank 1 in barrier #40"), "{report}");
    // Rank 0 or rank 2 or both: the first of them to come finds the difference.
    let shown =
        ["rank 0 in", "rank 2 in", "ranks 0,2 in"].map(|who| format!("{who} all_reduce #40"));
    assert!(shown.iter().any(|line| lineup.contains(line)), "{lineup}");
    assert!(elapsed < Duration::from_secs(3), "{elapsed:?}");
}
