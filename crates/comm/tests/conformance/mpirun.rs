//! The suite over MPI, under the real `mpirun`.

use std::process::Command;
use std::time::Duration;

use crate::launched::{Running, ARGUMENTS, ROLE};

const LIMIT: Duration = Duration::from_secs(240);

/// `None`, said aloud, where MPI is missing; a failure when `PHALANX_REQUIRE` names it.
pub(crate) fn mpirun(ranks: usize, role: &str) -> Option<Command> {
    let works = Command::new("mpirun").arg("--version").output().is_ok_and(|o| o.status.success());
    let why = match (cfg!(feature = "mpi"), works) {
        (true, true) => {
            let mut command = Command::new("mpirun");
            command.args(["--allow-run-as-root", "--oversubscribe", "-n", &ranks.to_string()]);
            command.env(ROLE, role).env("RUST_BACKTRACE", "0");
            return Some(command);
        }
        (false, _) => "this test was built without --features mpi",
        (true, false) => "mpirun is not installed (scripts/setup.sh --test-extras)",
    };
    let required = std::env::var("PHALANX_REQUIRE").unwrap_or_default();
    // Without the feature there is nothing to be required of.
    let is_required = cfg!(feature = "mpi") && required.split(',').any(|name| name == "mpi");
    assert!(!is_required, "PHALANX_REQUIRE names mpi, but {why}");
    eprintln!("SKIPPED: {why}");
    None
}

/// Adds what the ranks run.
pub(crate) fn program(command: &mut Command) -> &mut Command {
    command.arg(std::env::current_exe().expect("this test's own path")).args(ARGUMENTS)
}

fn suite(ranks: usize, threads: &str) {
    let Some(mut command) = mpirun(ranks, "suite on mpi") else { return };
    command.env("PHALANX_MPI_THREADS", threads);
    let (status, output) = Running::start(program(&mut command)).finish(LIMIT);
    assert!(status.success(), "{ranks} ranks: {status}\n{output}");
    assert_eq!(output.matches("all passed").count(), ranks, "{output}");
    assert!(!output.contains("mpirun"), "mpirun complains:\n{output}");
}

#[test]
fn the_suite_passes_over_mpi() {
    for ranks in [1, 2, 3, 4] {
        suite(ranks, "multiple");
    }
}

#[test]
fn the_suite_passes_where_one_thread_alone_may_call_mpi() {
    suite(3, "funneled");
}
