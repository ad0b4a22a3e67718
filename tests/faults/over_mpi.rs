//! Faults where MPI starts the ranks and moves the data: nobody starts them again by itself, and the next start goes on.

use std::fs;
use std::path::Path;
use std::process::{Command, Output, Stdio};

use super::memory::{ranks_of, signal};
use super::soak::last_step;
use super::support::{example, skip, Owned};
use super::{losses, wait_until, weights, DEADLINE};

const RANKS: usize = 2;

/// The lab on two ranks of Open MPI, with checkpoints in `folder` if it is to survive.
fn start(folder: &Path, survives: bool) -> Owned {
    fs::create_dir_all(folder.join("lab")).expect("a folder");
    let mut command = Command::new("mpirun.openmpi");
    command.current_dir(env!("CARGO_MANIFEST_DIR"));
    command.args(["--allow-run-as-root", "--oversubscribe", "--bind-to", "none"]);
    command.args(["--mca", "mpi_yield_when_idle", "1", "-n", &RANKS.to_string()]);
    command.arg(example("fault_lab")).arg("--lab").arg(folder.join("lab"));
    command.args(["--config", "configs/bert_tiny.json", "--backend", "mpi"]);
    command.args(["--micro-batch", "2", "--threads", "1", "--steps", "14"]);
    command.arg("--metrics").arg(folder.join("metrics.jsonl"));
    command.arg("--output").arg(folder.join("out"));
    if survives {
        command.args(["--save-every", "2", "--checkpoint"]).arg(folder.join("checkpoints"));
    }
    command.env("OMPI_MCA_orte_tmpdir_base", folder.join("mpi"));
    Owned::start(command.stdout(Stdio::piped()).stderr(Stdio::piped()))
}

fn said(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr)
}

/// One start whose ranks `fault` meets after `step`; what it has said at its end.
fn broken(folder: &Path, step: u64, fault: impl Fn(&Owned)) -> String {
    let hold = folder.join(format!("lab/hold-{step}"));
    fs::create_dir_all(folder.join("lab")).expect("a folder");
    fs::write(&hold, "").expect("a wish");
    let run = start(folder, true);
    wait_until("a step", || last_step(folder) == step);
    fault(&run);
    fs::remove_file(&hold).expect("removed");
    let output = run.finish(DEADLINE);
    assert!(!output.status.success(), "{}", said(&output));
    said(&output)
}

/// The step that a run has gone on from.
fn resumed(said: &str) -> u64 {
    let step = said.split_once("resume step ").and_then(|(_, rest)| rest.split(' ').next());
    step.and_then(|step| step.parse().ok()).unwrap_or(0)
}

#[test]
fn over_mpi_a_job_that_is_killed_poisoned_and_stopped_goes_on_with_the_same_bits() {
    if cfg!(not(feature = "mpi")) {
        return skip("mpi", "this test was built without --features mpi");
    }
    if Command::new("mpirun.openmpi").arg("--version").output().is_err() {
        return skip("mpi", "no Open MPI");
    }
    let [whole, folder] = [(); 2].map(|()| tempfile::tempdir().expect("a temporary folder"));
    let output = start(whole.path(), false).finish(DEADLINE);
    assert!(output.status.success(), "{}", said(&output));
    let folder = folder.path();
    broken(folder, 4, |run| {
        let ranks = ranks_of(run.0.id());
        assert_eq!(ranks.len(), RANKS);
        signal("-KILL", ranks[1]);
    });
    let poisoned = broken(folder, 7, |_| fs::write(folder.join("lab/nan-1"), "").expect("a wish"));
    assert!(poisoned.contains("rank 1: ") && poisoned.contains("are not finite"), "{poisoned}");
    // The warning that time is up, and the request to end, save their step; what was saved before is a matter of the disk. mpirun passes
    // the former on; the latter it follows with a kill after a second, so the ranks get it as from a scheduler.
    let warned = broken(folder, 9, |run| signal("-USR1", run.0.id()));
    assert!(resumed(&warned) <= 7, "{warned}");
    let ask = |run: &Owned| ranks_of(run.0.id()).into_iter().for_each(|rank| signal("-TERM", rank));
    let ended = broken(folder, 11, ask);
    assert!(resumed(&ended) >= 9, "{ended}");
    let again = start(folder, true).finish(DEADLINE);
    let last = said(&again);
    assert!(again.status.success() && resumed(&last) >= 11, "{last}");
    assert!(weights(folder) == weights(whole.path()), "{last}");
    assert_eq!(losses(folder), losses(whole.path()));
}
