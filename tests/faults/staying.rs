//! Ranks that stay: only what is lost is started again (F35).
//!
//! By hand `PHALANX_DEATHS=20 cargo test --test faults staying -- --nocapture` prints the time from the death of a rank to the next step, where
//! the others stay and where all are started again.

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use super::kills::number;
use super::memory::{ranks_of, signal};
use super::soak::last_step;
use super::support::{example, Owned};
use super::{losses, wait_until, weights, DEADLINE};

/// Steps between two deaths.
const EVERY: u64 = 6;

fn lab(folder: &Path, deaths: u64, more: &[&str]) -> Owned {
    fs::create_dir_all(folder.join("lab")).expect("a folder");
    let mut command = Command::new(example("fault_lab"));
    command.current_dir(env!("CARGO_MANIFEST_DIR")).arg("--lab").arg(folder.join("lab"));
    command.args(["--config", "configs/bert_tiny.json", "--micro-batch", "2", "--threads", "1"]);
    command.args(["--nnodes", "3", "--steps", &(EVERY * (deaths + 1)).to_string()]).args(more);
    command.arg("--metrics").arg(folder.join("metrics.jsonl"));
    command.arg("--output").arg(folder.join("out"));
    Owned::start(command.stdout(Stdio::piped()).stderr(Stdio::piped()))
}

fn finish(run: Owned) -> String {
    let output = run.finish(DEADLINE);
    let said = String::from_utf8_lossy(&output.stdout).into_owned()
        + &String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said}");
    said
}

/// Kills a rank again and again; how long each time until the next step. `stays`: the others are the same processes afterwards.
fn deaths(folder: &Path, deaths: u64, stays: bool) -> Vec<Duration> {
    fs::create_dir_all(folder.join("lab")).expect("a folder");
    let hold = |at: u64| folder.join(format!("lab/hold-{}", at * EVERY));
    (1..=deaths).for_each(|at| fs::write(hold(at), "").expect("a wish"));
    let keeping = ["--memory-every", "2", "--max-restarts", "1000"];
    let how: &[&str] = if stays { &[] } else { &["--anew"] };
    let run = lab(folder, deaths, &[&keeping, how].concat());
    let mut times = Vec::new();
    for at in 1..=deaths {
        wait_until("a step", || last_step(folder) == at * EVERY);
        let before = ranks_of(run.0.id());
        assert_eq!(before.len(), 3);
        let (victim, begun) = (before[usize::try_from(at % 3).expect("small")], Instant::now());
        signal("-KILL", victim);
        fs::remove_file(hold(at)).expect("removed");
        wait_until("the next step", || last_step(folder) > at * EVERY);
        times.push(begun.elapsed());
        let after = ranks_of(run.0.id());
        let same = after.iter().filter(|rank| before.contains(rank)).count();
        let expected = if stays { 2 } else { 0 };
        assert_eq!((after.len(), same), (3, expected), "before {before:?}, after {after:?}");
    }
    let said = finish(run);
    assert!(said.contains("from snapshot in memory"), "{said}");
    times
}

#[test]
fn a_rank_that_is_lost_is_replaced_and_the_others_stay() {
    let count = number("PHALANX_DEATHS", 1);
    let [whole, kept, anew] = [(); 3].map(|()| tempfile::tempdir().expect("a temporary folder"));
    finish(lab(whole.path(), count, &[]));
    for (folder, stays) in [(&kept, true), (&anew, false)] {
        let mut times = deaths(folder.path(), count, stays);
        assert!(weights(folder.path()) == weights(whole.path()), "stays: {stays}");
        assert_eq!(losses(folder.path()), losses(whole.path()), "stays: {stays}");
        times.sort();
        let (median, worst) = (times[times.len() / 2], times[times.len() - 1]);
        println!(
            "stays {stays}: {count} deaths, to the next step {median:.2?}, at most {worst:.2?}"
        );
    }
}

/// An error that all ranks have: nobody is lost.
#[test]
fn gradients_that_are_not_finite_begin_again_in_the_same_processes() {
    let [whole, spoilt] = [(); 2].map(|()| tempfile::tempdir().expect("a temporary folder"));
    finish(lab(whole.path(), 1, &[]));
    let folder = spoilt.path();
    fs::create_dir_all(folder.join("lab")).expect("a folder");
    let hold = folder.join(format!("lab/hold-{EVERY}"));
    fs::write(&hold, "").expect("a wish");
    let run = lab(folder, 1, &["--memory-every", "2", "--max-restarts", "1"]);
    wait_until("a step", || last_step(folder) == EVERY);
    let before = ranks_of(run.0.id());
    fs::write(folder.join("lab/nan-1"), "").expect("a wish");
    fs::remove_file(hold).expect("removed");
    wait_until("the next step", || last_step(folder) > EVERY);
    assert_eq!(ranks_of(run.0.id()), before);
    let said = finish(run);
    assert!(said.contains("not finite") && said.contains("restart 1/1"), "{said}");
    assert!(weights(folder) == weights(whole.path()));
    assert_eq!(losses(folder), losses(whole.path()));
}
