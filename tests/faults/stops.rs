//! Signals that ask a run to end, with its work saved (F32).

use std::fs;

use super::{finish, losses, start, steps_done, wait_until, weights, DEADLINE, FOUR};

/// A run that is sent `signal` after some steps, goes on, and ends with the bits of one that was left alone.
fn stopped_by(signal: &str, code: i32) {
    let whole = tempfile::tempdir().expect("a temporary folder");
    let steps = ["--steps", "10"];
    finish(whole.path(), &[&FOUR[..], &steps].concat());
    let folder = tempfile::tempdir().expect("a temporary folder");
    let checkpoints = folder.path().join("checkpoints");
    let place = checkpoints.display().to_string();
    let args = [&FOUR[..], &steps, &["--checkpoint", &place]].concat();
    let run = start(folder.path(), &args);
    wait_until("a step", || steps_done(folder.path()) >= 4);
    // To the launcher alone: it passes it on.
    let to = run.0.id().to_string();
    let kill = std::process::Command::new("kill").args([signal, &to]).status();
    assert!(kill.expect("kill").success());
    let output = run.finish(DEADLINE);
    let said = String::from_utf8_lossy(&output.stdout).into_owned()
        + &String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(code), "{said}");
    assert!(said.contains("is saved"), "{said}");
    let saved: Vec<_> = fs::read_dir(&checkpoints).expect("checkpoints").collect();
    assert_eq!(saved.len(), 1, "nothing but the step at which it was stopped: {saved:?}");
    let again = finish(folder.path(), &args);
    let resumed = String::from_utf8_lossy(&again.stdout).into_owned();
    assert!(resumed.contains("resume step "), "{resumed}");
    assert!(weights(folder.path()) == weights(whole.path()), "{resumed}");
    assert_eq!(losses(folder.path()), losses(whole.path()));
}

#[test]
fn a_run_that_is_asked_to_end_saves_and_goes_on_later() {
    stopped_by("-TERM", 143);
}

/// Slurm's warning before the time is up: the exit code says that the job is to start again.
#[test]
fn a_run_whose_time_is_up_saves_and_says_that_it_is_to_start_again() {
    stopped_by("-USR1", 75);
}
