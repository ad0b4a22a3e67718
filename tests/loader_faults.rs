//! A loader that is slow or breaks on one rank: all ranks learn which one it is.

#[path = "support/mod.rs"]
mod support;
mod trial;

use std::time::Duration;

use support::bert;
use trial::Trial;

/// Steps that take far less than the half second of a slow loader's batch, also on a busy machine.
const TINY: [&str; 8] = [
    "--config",
    "configs/bert_tiny.json",
    "--nnodes",
    "2",
    "--threads",
    "1",
    "--global-batch",
    "2",
];
const RUN: Duration = Duration::from_secs(180);

fn tiny<'a>(more: &[&'a str]) -> Vec<&'a str> {
    TINY.iter().chain(more).copied().collect()
}

/// The ranks' waiting in the last steps.
fn waits(run: &support::Run) -> Vec<[f64; 2]> {
    let by_rank = |step: &serde_json::Value| {
        let all = step["data_wait_ms_by_rank"].as_array().expect("one for each rank");
        assert_eq!(all.len(), 2);
        [0, 1].map(|rank| all[rank].as_f64().expect("a time"))
    };
    run.steps.iter().map(by_rank).collect()
}

#[test]
fn a_slow_loader_is_attributed_to_its_rank_within_twenty_steps() {
    let run = bert(&tiny(&["--steps", "20", "--disturb-loader", "slow:1"]));
    let output = String::from_utf8_lossy(&run.output.stdout).into_owned();
    let note = output.lines().find(|line| line.contains("note   rank "));
    let note = note.unwrap_or_else(|| panic!("nothing is said:\n{output}"));
    assert!(note.contains("rank 1: ") && note.contains("% of step waiting for data"), "{note}");
    let said = note.split("note").nth(1).expect("after it");
    assert!(!said.contains("rank 0"), "{note}");
    let at_end = output.rfind("% of step waiting for data").expect("at the end as well");
    assert!(at_end > output.find("where the time of a step went").expect("the report"), "{output}");
    // Batches that were built while the ranks met are used up by then.
    let last = waits(&run).split_off(10);
    let [other, slow] = [0, 1].map(|rank| last.iter().map(|step| step[rank]).sum::<f64>());
    assert!(other < slow, "{other} and {slow} ms in ten steps");
}

#[test]
fn balanced_loaders_are_no_news() {
    let run = bert(&tiny(&["--steps", "100"]));
    let output = String::from_utf8_lossy(&run.output.stdout).into_owned();
    assert!(!output.contains("% of step waiting for data"), "{output}");
    assert_eq!(waits(&run).len(), 100);
}

#[test]
fn a_loader_that_panics_ends_its_rank_and_the_others_name_it() {
    let mut trial = Trial::start(&tiny(&["--steps", "60", "--disturb-loader", "panic:1"]), RUN);
    trial.wait_for_output("this loader was to break");
    // Batches that were built before are computed first.
    trial.wait_for_output("error: a loader thread panicked");
    let ended = trial.end();
    assert!(!ended.status.success(), "{}", ended.output);
    let said = "a loader thread panicked at epoch 0, global sample";
    assert!(ended.output.contains(said), "{}", ended.output);
    let named = ended.output.lines().any(|line| {
        line.contains("rank 0") && line.contains("rank 1") && !line.contains("this loader")
    });
    assert!(named, "rank 0 does not name rank 1:\n{}", ended.output);
    assert!(!ended.output.contains("passed on rank"), "no time runs out:\n{}", ended.output);
}
