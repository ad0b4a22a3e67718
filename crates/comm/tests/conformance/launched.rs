//! Ranks as processes of this test's own: the whole suite over the host backend's links.

#![expect(unsafe_code, reason = "loads the CUDA driver")]

use std::io::Read;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use phalanx_comm::testing::free_port;
use phalanx_comm::{Backend, Group, GroupOptions, Work};

use crate::namespaces::{namespaces, Namespaces, ADDRESSES};
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
    let options = GroupOptions { timeout, ..GroupOptions::default() };
    match &role[..] {
        "suite on host" => suite(Group::from_environment(options).expect("the ranks meet")),
        #[cfg(feature = "mpi")]
        "suite on mpi" => {
            let options = GroupOptions { backend: Backend::Mpi, ..options };
            suite(Group::from_mpi(options).expect("the ranks meet"));
        }
        #[cfg(feature = "mpi")]
        gpu if gpu.starts_with("gpu") => {
            let limit = Duration::from_secs(if gpu == "gpu absent" { 1 } else { 30 });
            let options =
                GroupOptions { backend: Backend::Mpi, gpu_memory: true, timeout: limit, ..options };
            crate::without_gpu::over_mpi(gpu, Group::from_mpi(options));
        }
        "mpi permutations" => {
            let options = GroupOptions { backend: Backend::Mpi, ..options };
            let group = Group::from_environment(options).expect("the ranks meet");
            crate::mpi_permutations::rank(group);
        }
        "bootstrap" => crate::mpi_bootstrap::rank(options),
        mpi if mpi.starts_with("mpi fault") => {
            let options = GroupOptions { backend: Backend::Mpi, ..options };
            let group = Group::from_environment(options).expect("the ranks meet");
            crate::mpi_faults::rank(mpi, group);
        }
        nccl if nccl.starts_with("nccl") => crate::without_gpu::rank(nccl),
        fault => crate::faults::rank(fault, GroupOptions { backend: Backend::Mpi, ..options }),
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
                break Some(status);
            }
            if Instant::now() > deadline {
                // A launcher takes its ranks with it, and with them the ends of the pipes.
                drop(self.0.kill());
                break None;
            }
            std::thread::park_timeout(Duration::from_millis(5));
        };
        let Some(status) = status else {
            let end = Instant::now() + Duration::from_secs(10);
            while !(stdout.is_finished() && stderr.is_finished()) {
                assert!(Instant::now() < end, "a process has not ended in {limit:?}");
                std::thread::park_timeout(Duration::from_millis(5));
            }
            let said = [stdout, stderr].map(|reader| reader.join().expect("output")).concat();
            panic!("a process has not ended in {limit:?}:\n{said}");
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
    let program = std::env::current_exe().expect("this test's own path");
    let command = |_: usize| Command::new(&program);
    ranks_of(world, role, command, |command, rank| {
        command.env("LOCAL_RANK", rank.to_string()).env("LOCAL_WORLD_SIZE", world.to_string());
        command.env("MASTER_ADDR", "127.0.0.1");
        add(command, rank);
    })
}

/// As [`ranks`], with a command of each rank's own, whose place on its machine `add` says.
pub(crate) fn ranks_of(
    world: usize,
    role: &str,
    command: impl Fn(usize) -> Command,
    add: impl Fn(&mut Command, usize),
) -> Vec<Running> {
    let port = free_port();
    let token = format!("{:064x}", u128::from(std::process::id()) << 16 | u128::from(port));
    let start = |rank: usize| {
        let mut command = command(rank);
        command.args(ARGUMENTS).env(ROLE, role).env("RUST_BACKTRACE", "0");
        command.env("RANK", rank.to_string()).env("WORLD_SIZE", world.to_string());
        command.env("MASTER_PORT", port.to_string()).env("PHALANX_JOB_TOKEN", &token);
        add(&mut command, rank);
        Running::start(&mut command)
    };
    (0..world).map(start).collect()
}

fn pass(running: Vec<Running>) {
    let ended: Vec<_> = running.into_iter().map(|rank| rank.finish(LIMIT)).collect();
    let passed =
        ended.iter().all(|(status, output)| status.success() && output.contains("all passed"));
    // All of them: the first that fails often tells only of the one that failed before it.
    assert!(passed, "{ended:#?}");
}

fn on_host(world: usize, link: &str) {
    let link = |command: &mut Command, _| {
        command.env("PHALANX_HOST_LINK", link);
    };
    pass(ranks(world, "suite on host", link));
}

/// Two ranks on each of two machines, and one of three alone on its.
#[test]
fn the_suite_passes_between_machines() {
    for world in [4, 3] {
        let Some(machines) = namespaces() else { return };
        let program = std::env::current_exe().expect("this test's own path");
        let command = |rank: usize| machines.command(rank / 2, &program);
        let running = ranks_of(world, "suite on host", command, |command, rank| {
            let on_node = (world - rank / 2 * 2).min(2);
            command.env("LOCAL_RANK", (rank % 2).to_string());
            command.env("LOCAL_WORLD_SIZE", on_node.to_string());
            command.env("GROUP_RANK", (rank / 2).to_string()).env("GROUP_WORLD_SIZE", "2");
            command.env("MASTER_ADDR", ADDRESSES[0]);
        });
        pass(running);
    }
}

/// One rank on the first machine and three on the second, as a launcher places them that does not say so. The machines are there as
/// long as they are held.
fn unevenly(add: impl Fn(&mut Command)) -> Option<(Namespaces, Vec<Running>)> {
    let machines = namespaces()?;
    let program = std::env::current_exe().expect("this test's own path");
    let command = |rank: usize| machines.command(rank.min(1), &program);
    let running = ranks_of(4, "suite on host", command, |command, rank| {
        let (local_rank, on_node) = if rank == 0 { (0, 1) } else { (rank - 1, 3) };
        command.env_remove("RANK").env_remove("WORLD_SIZE");
        command.env("OMPI_COMM_WORLD_RANK", rank.to_string()).env("OMPI_COMM_WORLD_SIZE", "4");
        command.env("OMPI_COMM_WORLD_LOCAL_RANK", local_rank.to_string());
        command.env("OMPI_COMM_WORLD_LOCAL_SIZE", on_node.to_string());
        command.env("PMIX_NAMESPACE", "17").env("MASTER_ADDR", ADDRESSES[0]);
        add(command);
    });
    Some((machines, running))
}

#[test]
fn the_suite_passes_where_machines_have_different_numbers_of_ranks() {
    let Some((_machines, running)) = unevenly(|_| ()) else { return };
    for (rank, running) in running.into_iter().enumerate() {
        let (status, output) = running.finish(LIMIT);
        assert!(status.success(), "{output}");
        let placed = format!("rank {rank} of 4 on node {} of 2 nodes", rank.min(1));
        assert!(output.contains(&placed), "{output}");
    }
}

#[test]
fn shared_memory_alone_between_machines_is_refused() {
    let shm = |command: &mut Command| {
        command.env("PHALANX_HOST_LINK", "shm");
    };
    let Some((_machines, running)) = unevenly(shm) else { return };
    for rank in running {
        let (status, output) = rank.finish(LIMIT);
        assert!(!status.success() && output.contains("shares none with this one"), "{output}");
    }
}

/// On the real libraries, where there is a GPU: alone, and several ranks that share it as emulated nodes do.
#[test]
fn the_suite_passes_on_a_gpu() {
    // SAFETY: the driver's initialiser does nothing that is seen here.
    if unsafe { libloading::Library::new("libcuda.so.1") }.is_err() {
        let required = std::env::var("PHALANX_REQUIRE").unwrap_or_default();
        assert!(!required.split(',').any(|what| what == "gpu"), "PHALANX_REQUIRE names gpu");
        eprintln!("SKIPPED: there is no NVIDIA driver on this machine");
        return;
    }
    for world in [1, 2, 3] {
        pass(ranks(world, "nccl suite", |command, rank| {
            command.env("NCCL_HOSTID", format!("rank{rank}")).env("NCCL_SOCKET_IFNAME", "lo");
            command
                .env("NCCL_P2P_DISABLE", "1")
                .env("NCCL_SHM_DISABLE", "1")
                .env("NCCL_IB_DISABLE", "1");
        }));
    }
}

#[test]
fn the_suite_passes_in_processes_that_share_memory() {
    on_host(3, "shm");
}

#[test]
fn the_suite_passes_in_processes_over_sockets() {
    on_host(3, "tcp");
}
