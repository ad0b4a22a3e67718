//! The suite over MPI, under the real launcher of the library that this test was built with.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use phalanx_comm::testing::free_port;

use crate::launched::{Running, ARGUMENTS, ROLE};
use crate::namespaces::{namespaces, Namespaces, ADDRESSES};
use crate::without_gpu::libraries;

const LIMIT: Duration = Duration::from_secs(240);

#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Library {
    OpenMpi,
    Mpich,
}

/// The library that this process has loaded.
pub(crate) fn library() -> Library {
    let maps = std::fs::read_to_string("/proc/self/maps").expect("Linux");
    if maps.contains("/libmpich") {
        Library::Mpich
    } else {
        Library::OpenMpi
    }
}

impl Library {
    fn launcher(self) -> &'static str {
        match self {
            Library::OpenMpi => "mpirun",
            Library::Mpich => "mpiexec.hydra",
        }
    }

    /// The options that let root start more ranks than there are cores.
    fn options(self) -> &'static [&'static str] {
        match self {
            Library::OpenMpi => &["--allow-run-as-root", "--oversubscribe", "--bind-to", "none"],
            Library::Mpich => &[],
        }
    }

    /// The option that lets the survivors of a failure live.
    pub(crate) fn lets_survivors_live(self) -> &'static str {
        match self {
            Library::OpenMpi => "--enable-recovery",
            Library::Mpich => "-disable-auto-cleanup",
        }
    }
}

/// Where Open MPI keeps a job's files. By itself it makes and removes one folder for all jobs of a user, and fails where two jobs make
/// it at once.
const SESSIONS: &str = "OMPI_MCA_orte_tmpdir_base";

fn session_folder() -> PathBuf {
    static COUNT: AtomicUsize = AtomicUsize::new(0);
    let name = format!("mpi-{}-{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
    Path::new(env!("CARGO_TARGET_TMPDIR")).join(name)
}

/// `None`, said aloud, where MPI is missing; a failure when `PHALANX_REQUIRE` names it.
pub(crate) fn mpirun(ranks: usize, role: &str) -> Option<Command> {
    let launcher = library().launcher();
    let works = Command::new(launcher).arg("--version").output().is_ok_and(|o| o.status.success());
    let why = match (cfg!(feature = "mpi"), works) {
        (true, true) => {
            let mut command = Command::new(launcher);
            command.args(library().options()).args(["-n", &ranks.to_string()]);
            command.env(ROLE, role).env("RUST_BACKTRACE", "0");
            // So many jobs at once: two of them may compute the same port.
            command.env("MASTER_PORT", free_port().to_string());
            command.env(SESSIONS, session_folder());
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

/// Memory of a GPU, on the stand-in for the driver: copied, or in place where MPI would take its addresses.
#[test]
fn memory_of_a_gpu_travels_over_mpi() {
    for (ranks, role, cuda_aware, said) in [
        (1, "gpu suite", "0", "all passed"),
        (2, "gpu suite", "", "all passed"),
        (3, "gpu suite", "0", "all passed"),
        (4, "gpu suite", "1", "all passed"),
        (3, "gpu suite", "1", "all passed"),
        (2, "gpu crossed", "0", "crossed"),
        (3, "gpu streams", "0", "in order"),
        (3, "gpu streams", "1", "in order"),
        (2, "gpu refused", "perhaps", "PHALANX_MPI_CUDA_AWARE=\"perhaps\" is not 1 or 0"),
    ] {
        let Some(mut command) = mpirun(ranks, role) else { return };
        command.env("LD_LIBRARY_PATH", libraries()).env("PHALANX_MPI_CUDA_AWARE", cuda_aware);
        let (status, output) = Running::start(program(&mut command)).finish(LIMIT);
        assert!(status.success(), "{role}, {ranks} ranks: {status}\n{output}");
        assert_eq!(output.matches(said).count(), ranks, "{role}, {ranks} ranks: {output}");
    }
}

#[test]
fn a_rank_whose_gpu_is_missing_is_named_over_mpi() {
    let Some(mut command) = mpirun(2, "gpu refused") else { return };
    command.env("LD_LIBRARY_PATH", libraries()).env("DOUBLE_GPUS", "0");
    let (status, output) = Running::start(program(&mut command)).finish(LIMIT);
    assert!(status.success(), "{status}\n{output}");
    assert_eq!(output.matches("shows this process no GPU").count(), 2, "{output}");
}

/// Starts two ranks on each of two machines, which have nothing but an address; what it needs for that lies in `folder`,
/// and ranks get `variables` too.
pub(crate) fn between_machines(
    machines: &Namespaces,
    folder: &Path,
    role: &str,
    variables: &[&str],
) -> Command {
    let agent = folder.join("agent");
    machines.write_agent(&agent);
    // The launcher is on the first machine and has its name.
    let mut command = Command::new(&agent);
    command.args([ADDRESSES[0], library().launcher()]).args(library().options());
    let hosts = ADDRESSES.map(|address| format!("{address}:2")).join(",");
    let agent = agent.display().to_string();
    match library() {
        Library::OpenMpi => {
            command.args(["--mca", "plm_rsh_agent", &agent, "--host", &hosts]);
            for variable in [&[ROLE, "RUST_BACKTRACE"], variables].concat() {
                command.args(["-x", variable]);
            }
        }
        Library::Mpich => {
            command.args(["-launcher", "ssh", "-launcher-exec", &agent, "-hosts", &hosts]);
            command.args(["-localhost", ADDRESSES[0], "-iface", "veth0"]);
        }
    }
    command.args(["-n", "4"]).env(ROLE, role).env("RUST_BACKTRACE", "0");
    command.env(SESSIONS, session_folder());
    command
}

#[test]
fn the_suite_passes_over_mpi_between_machines() {
    if mpirun(4, "suite on mpi").is_none() {
        return;
    }
    let Some(machines) = namespaces() else { return };
    let folder = std::env::temp_dir().join(&machines.names[0]);
    std::fs::create_dir(&folder).expect("a folder of our own");
    let mut command = between_machines(&machines, &folder, "suite on mpi", &[]);
    let (status, output) = Running::start(program(&mut command)).finish(LIMIT);
    drop(std::fs::remove_dir_all(&folder));
    assert!(status.success(), "{status}\n{output}");
    assert_eq!(output.matches("of 2 nodes: all passed").count(), 4, "{output}");
}
