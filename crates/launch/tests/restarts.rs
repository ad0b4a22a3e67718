//! Jobs that fail and are started again: how often, what is said, what is left.

mod support;

use std::path::Path;

use rustix::process::Signal;
use support::{assert_gone, Finished, Job, LIMIT};

/// Three ranks, of which rank 1 fails.
fn train(options: &str) -> Finished {
    Job::start(&format!("--nproc-per-node 3 --act train --rank 1 {options}")).finish()
}

/// The launcher's own lines that have this in them.
fn notices<'f>(finished: &'f Finished, part: &str) -> Vec<&'f str> {
    let lines = finished.errors.iter().filter(|line| line.starts_with("phalanx: "));
    lines.map(String::as_str).filter(|line| line.contains(part)).collect()
}

#[test]
fn a_killed_rank_starts_all_ranks_again() {
    let finished = train("--fault kill --max-restarts 3");
    assert_eq!(finished.code, Some(0), "{:#?}", finished.errors);
    let restarts = notices(&finished, "restart 1/3: ");
    assert_eq!(restarts.len(), 1, "one line for a restart: {:#?}", finished.errors);
    let said = restarts[0];
    assert!(said.starts_with("phalanx: restart 1/3: rank 1 on host "), "{said}");
    assert!(said.contains("died: signal 9 (SIGKILL) after "), "{said}");
    assert!(said.contains("; step 3 | operations of all ranks: "), "{said}");
    let done = |line: &&String| line.ends_with("done in attempt 1");
    assert_eq!(finished.output.iter().filter(done).count(), 3, "{:#?}", finished.output);
    assert_eq!(notices(&finished, "the ranks have ended well, after 1 restart").len(), 1);
    assert!(!finished.errors.iter().any(|line| line.contains("error[")), "{:?}", finished.errors);
}

#[test]
fn the_budget_ends_the_job_with_the_last_failure() {
    let finished = train("--code 74 --failing 9 --further 4 --max-restarts 2");
    assert_eq!(finished.code, Some(74));
    assert_eq!(notices(&finished, ": restart ").len(), 2, "{:#?}", finished.errors);
    let said = "giving up after 2 restarts: 2 restarts are used up";
    assert_eq!(notices(&finished, said).len(), 1, "{:#?}", finished.errors);
    assert!(finished.report().contains("rank 1 on host"), "{}", finished.report());
    // The report is the last word.
    assert_eq!(finished.errors.last().map(String::as_str), Some(finished.report()));
}

#[test]
fn attempts_that_come_no_further_are_a_crash_loop() {
    let finished = train("--code 1 --failing 9 --max-restarts 9");
    assert_eq!(finished.code, Some(70));
    let said = "giving up after 2 restarts: no progress since step 3 in 3 attempts";
    assert_eq!(notices(&finished, said).len(), 1, "{:#?}", finished.errors);
}

#[test]
fn what_would_come_again_is_final_and_75_is_a_wish() {
    let usage = train("--code 64 --max-restarts 3");
    assert_eq!(usage.code, Some(64));
    assert_eq!(notices(&usage, ": restart ").len(), 0, "{:#?}", usage.errors);
    assert_eq!(notices(&usage, "exit code 64 would come again").len(), 1, "{:#?}", usage.errors);
    // More often than the budget has it: there is progress.
    let wished = train("--code 75 --failing 3 --further 4 --max-restarts 1");
    assert_eq!(wished.code, Some(0), "{:#?}", wished.errors);
    assert_eq!(notices(&wished, "after 3 restarts").len(), 1, "{:#?}", wished.errors);
}

/// The process of each rank in an attempt.
fn processes(finished: &Finished, attempt: u32) -> Vec<i32> {
    let of = |rank: usize| {
        let said = format!("attempt {attempt} rank {rank} pid ");
        let pid = finished.output.iter().find_map(|line| Some(line.split_once(&said)?.1));
        pid.unwrap_or_else(|| panic!("{said}: {:#?}", finished.output)).parse().expect("a number")
    };
    (0..3).map(of).collect()
}

#[test]
fn ranks_that_would_stay_are_the_same_processes_and_only_the_lost_one_is_new() {
    let job = "--nproc-per-node 3 --act stay --rank 1 --fault kill --failing 2 --further 4 --max-restarts 3";
    let finished = Job::start(job).finish();
    assert_eq!(finished.code, Some(0), "{:#?}", finished.errors);
    let attempts = [0, 1, 2].map(|attempt| processes(&finished, attempt));
    for pair in attempts.windows(2) {
        let same = pair[0].iter().zip(&pair[1]).map(|(one, other)| one == other);
        assert_eq!(same.collect::<Vec<_>>(), [true, false, true], "{attempts:?}");
    }
    let done = |line: &&String| line.ends_with("done in attempt 2");
    assert_eq!(finished.output.iter().filter(done).count(), 3, "{:#?}", finished.output);
    let restarts = notices(&finished, ": restart ");
    assert!(restarts[1].contains("; step 7 | operations of all ranks: "), "{restarts:?}");
    assert_gone(&attempts.concat(), LIMIT);
}

#[test]
fn ranks_that_wait_for_a_generation_that_never_comes_end_with_what_they_had_to_say() {
    let job =
        "--nproc-per-node 3 --act stay --rank 1 --code 74 --failing 9 --further 4 --max-restarts 1";
    let finished = Job::start(job).finish();
    assert_eq!(finished.code, Some(74), "{:#?}", finished.errors);
    assert_eq!(notices(&finished, "giving up after 1 restart").len(), 1, "{:#?}", finished.errors);
    let [before, last] = [0, 1].map(|attempt| processes(&finished, attempt));
    for rank in [0, 2] {
        assert_eq!(before[rank], last[rank]);
    }
    assert_gone(&[before, last].concat(), LIMIT);
}

#[test]
fn one_rank_alone_is_started_again_too() {
    let job = "--act train --fault kill --max-restarts 1 --failing 1";
    let finished = Job::start(job).finish();
    assert_eq!(finished.code, Some(0), "{:#?}", finished.errors);
    assert_eq!(notices(&finished, "restart 1/1: rank 0 on host ").len(), 1);
}

#[test]
fn logs_and_errors_are_kept_of_every_attempt() {
    let dir = tempfile::tempdir().expect("a folder");
    let path = dir.path().display();
    let finished =
        train(&format!("--code 1 --failing 2 --further 4 --max-restarts 3 --log-dir {path}"));
    assert_eq!(finished.code, Some(0), "{:#?}", finished.errors);
    let run = std::fs::read_dir(dir.path()).expect("it is there").next();
    let run = run.expect("one run").expect("read").path();
    let text = |file: &str| std::fs::read_to_string(run.join(file)).expect(file);
    for (file, attempt) in
        [("rank0.log", 0), ("attempt-1/rank0.log", 1), ("attempt-2/rank0.log", 2)]
    {
        assert!(text(file).starts_with(&format!("attempt {attempt} rank 0 ")), "{file}");
    }
    let errors = text("errors.jsonl");
    let records: Vec<serde_json::Value> =
        errors.lines().map(|line| serde_json::from_str(line).expect("JSON")).collect();
    let facts = |record: &serde_json::Value| {
        ["attempt", "step", "rank"].map(|name| record[name].as_u64().expect("a number"))
    };
    assert_eq!(records.iter().map(facts).collect::<Vec<_>>(), [[0, 3, 1], [1, 7, 1]]);
    assert!(Path::new(records[1]["log"].as_str().expect("a path")).ends_with("attempt-1/rank1.log"));
}

#[test]
fn survivors_are_killed_soon_and_who_commits_may_finish() {
    let job = Job::start(
        "--nproc-per-node 3 --act commit --rank 1 --fault kill --max-restarts 1 --grace 600",
    );
    let first = job.numbers("pid", 3);
    let finished = job.finish();
    assert_eq!(finished.code, Some(0), "{:#?}", finished.errors);
    let committed = |line: &&String| line.ends_with("committed");
    assert_eq!(finished.output.iter().filter(committed).count(), 1, "{:#?}", finished.output);
    assert_gone(&first, LIMIT);
}

#[test]
fn ctrl_c_is_no_reason_to_start_again() {
    let job = Job::start("--nproc-per-node 2 --act polite --max-restarts 3");
    job.numbers("pid", 2);
    job.signal(Signal::INT);
    let finished = job.finish();
    assert_eq!(finished.code, Some(130));
    assert_eq!(notices(&finished, ": restart ").len(), 0, "{:#?}", finished.errors);
}
