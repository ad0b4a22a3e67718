//! Ranks as processes of this test's own: the whole suite over the host backend's links.

use std::io::Read;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use phalanx_comm::testing::free_port;
use phalanx_comm::{Backend, Group, GroupOptions, Work};

use crate::CHECKS;

/// What a rank's process runs.
pub(crate) const ROLE: &str = "PHALANX_TEST_ROLE";
const LIMIT: Duration = Duration::from_secs(240);

/// The arguments with which this binary runs a rank.
pub(crate) const ARGUMENTS: [&str; 5] =
    ["--exact", "launched::rank_process", "--ignored", "--nocapture", "--test-threads=1"];

/// What a rank's process runs; started by the other tests.
#[test]
#[ignore = "a rank of the other tests, which start it"]
fn rank_process() {
    let role = std::env::var(ROLE).expect("only the other tests start this one");
    let timeout = Duration::from_secs(30);
    let options = GroupOptions::default().with_timeout(timeout);
    match &role[..] {
        "suite on host" => suite(Group::from_environment(options).expect("the ranks meet")),
        #[cfg(feature = "mpi")]
        "suite on mpi" => {
            let options = options.with_backend(Backend::Mpi);
            suite(Group::from_mpi(options).expect("the ranks meet"));
        }
        #[cfg(feature = "mpi")]
        gpu if gpu.starts_with("gpu") => {
            let limit = Duration::from_secs(if gpu == "gpu absent" { 1 } else { 30 });
            let options = options.with_backend(Backend::Mpi).with_gpu_memory().with_timeout(limit);
            crate::without_gpu::over_mpi(gpu, Group::from_mpi(options));
        }
        nccl if nccl.starts_with("nccl") => crate::without_gpu::rank(nccl),
        fault => crate::faults::rank(fault, options.with_backend(Backend::Mpi)),
    }
}

/// Each check on a duplicate of its own: some leave theirs dead.
fn suite(mut group: Group) {
    for (name, check) in CHECKS {
        let twin = group.duplicate().expect("a duplicate");
        let start = Instant::now();
        check(twin);
        group.barrier().and_then(Work::wait).expect("the others passed too");
        if group.rank() == 0 {
            println!("{name}: {:?}", start.elapsed());
        }
    }
    let (rank, size, nodes) = (group.rank(), group.world_size(), group.node_count());
    println!("rank {rank} of {size} on node {} of {nodes} nodes: all passed", group.node_rank());
}

/// A process and what comes after it, killed when the test ends.
pub(crate) struct Running(Child);

impl Running {
    pub(crate) fn start(command: &mut Command) -> Self {
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        Self(command.spawn().unwrap_or_else(|error| panic!("{command:?}: {error}")))
    }

    /// Waits for its end: whether it ended well, and what it said.
    pub(crate) fn finish(mut self, limit: Duration) -> (std::process::ExitStatus, String) {
        let read = |pipe: Box<dyn Read + Send>| {
            std::thread::spawn(move || {
                let mut text = Vec::new();
                drop({ pipe }.read_to_end(&mut text));
                String::from_utf8_lossy(&text).into_owned()
            })
        };
        let stdout = read(Box::new(self.0.stdout.take().expect("piped")));
        let stderr = read(Box::new(self.0.stderr.take().expect("piped")));
        let deadline = Instant::now() + limit;
        let status = loop {
            if let Some(status) = self.0.try_wait().expect("wait") {
                break status;
            }
            assert!(Instant::now() < deadline, "a process has not ended in {limit:?}");
            std::thread::park_timeout(Duration::from_millis(5));
        };
        (status, stdout.join().expect("output") + &stderr.join().expect("output"))
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // It may have ended already.
        drop(self.0.kill());
        drop(self.0.wait());
    }
}

/// Starts the ranks of a world of this machine; `add` completes a rank's command.
pub(crate) fn ranks(world: usize, role: &str, add: impl Fn(&mut Command, usize)) -> Vec<Running> {
    let (program, port) = (std::env::current_exe().expect("this test's own path"), free_port());
    let token = format!("{:064x}", u128::from(std::process::id()) << 16 | u128::from(port));
    let start = |rank: usize| {
        let mut command = Command::new(&program);
        command.args(ARGUMENTS).env(ROLE, role).env("RUST_BACKTRACE", "0");
        command.env("RANK", rank.to_string()).env("LOCAL_RANK", rank.to_string());
        command.env("WORLD_SIZE", world.to_string());
        command.env("LOCAL_WORLD_SIZE", world.to_string());
        command.env("MASTER_ADDR", "127.0.0.1").env("MASTER_PORT", port.to_string());
        command.env("PHALANX_JOB_TOKEN", &token);
        add(&mut command, rank);
        Running::start(&mut command)
    };
    (0..world).map(start).collect()
}

fn on_host(world: usize, link: &str) {
    let link = |command: &mut Command, _| {
        command.env("PHALANX_HOST_LINK", link);
    };
    let ended: Vec<_> =
        ranks(world, "suite on host", link).into_iter().map(|rank| rank.finish(LIMIT)).collect();
    let passed =
        ended.iter().all(|(status, output)| status.success() && output.contains("all passed"));
    // All of them: the first that fails often tells only of the one that failed before it.
    assert!(passed, "{ended:#?}");
}

#[test]
fn the_suite_passes_in_processes_that_share_memory() {
    on_host(3, "shm");
}

#[test]
fn the_suite_passes_in_processes_over_sockets() {
    on_host(3, "tcp");
}
