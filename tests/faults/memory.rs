//! Ranks that die and go on from their launcher's memory: no checkpoint is written.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use phalanx_comm::slots::Slots;

use super::support::{free_port, kill_child_of, Owned};
use super::{finish, losses, start, steps_done, wait_until, weights};

/// The tiny model on four ranks of two emulated nodes.
const TWO_NODES: [&str; 10] = [
    "--config",
    "configs/bert_tiny.json",
    "--nnodes",
    "2",
    "--nproc-per-node",
    "2",
    "--threads",
    "1",
    "--steps",
    "20",
];

/// The same, with snapshots in memory alone.
fn start_in_memory(folder: &Path) -> Owned {
    let more = ["--zero", "1", "--memory-every", "2", "--max-restarts", "3"];
    start(folder, &[&TWO_NODES[..], &more].concat())
}

/// The run ends with the bits of one that nothing happened to, and has gone on from memory as often as is said.
fn compare(run: Owned, folder: &Path, restarts: usize) {
    let whole = tempfile::tempdir().expect("a temporary folder");
    finish(whole.path(), &[&TWO_NODES[..], &["--zero", "1"]].concat());
    let output = run.finish(super::DEADLINE);
    let (out, said) =
        (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{said}");
    assert!(said.contains(&format!("restart {restarts}/3: rank ")), "{said}");
    let resumed = out.matches("from snapshot in memory").count();
    assert_eq!(resumed, restarts, "{out}\n{said}");
    assert!(weights(folder) == weights(whole.path()), "{out}\n{said}");
    assert_eq!(losses(folder), losses(whole.path()));
    let left = fs::read_dir(folder).expect("the run's folder").flatten();
    let mut left: Vec<_> = left.map(|entry| entry.file_name()).collect();
    left.sort();
    assert_eq!(left, ["metrics.jsonl", "out"], "no checkpoint was made");
}

#[test]
fn a_rank_that_is_killed_goes_on_from_memory_without_a_bit_of_difference() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let run = start_in_memory(folder.path());
    for wanted in [3, 7] {
        wait_until("a step", || steps_done(folder.path()) >= wanted);
        let before = ranks_of(run.0.id());
        kill_child_of(run.0.id());
        wait_until("a restart", || {
            let ranks = ranks_of(run.0.id());
            ranks.len() == 4 && ranks.iter().all(|rank| !before.contains(rank))
        });
    }
    compare(run, folder.path(), 2);
}

/// All ranks die, and what those of one node had in memory is gone with them: the other node has it as well. While the
/// launcher stands still it cannot start ranks again, so nobody looks before all of it is gone.
#[test]
fn a_node_that_is_lost_with_its_memory_is_no_loss() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let run = start_in_memory(folder.path());
    let launcher = run.0.id();
    wait_until("a step", || steps_done(folder.path()) >= 5);
    signal("-STOP", launcher);
    let ranks = ranks_of(launcher);
    assert_eq!(ranks.len(), 4);
    ranks.iter().for_each(|&rank| signal("-KILL", rank));
    wait_until("the end of all ranks", || ranks.iter().all(|&rank| is_dead(rank)));
    for place in [2, 3] {
        let slots = Slots::open(&memory_of(launcher), place).expect("the launcher's memory");
        assert!(slots.kept().expect("readable").len() >= 2, "its own share and one of node 0");
        slots.lose().expect("writable");
    }
    signal("-CONT", launcher);
    compare(run, folder.path(), 1);
}

/// Under another launcher nobody owns such memory, and the option says so.
#[test]
fn without_a_launcher_of_ours_memory_is_refused() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let alone = ["--config", "configs/bert_tiny.json", "--steps", "2", "--memory-every", "1"];
    let mut command = super::trainer(folder.path(), &alone);
    let port = free_port().to_string();
    let by_hand =
        [("RANK", "0"), ("WORLD_SIZE", "1"), ("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", &port)];
    let output = Owned::start(command.envs(by_hand)).finish(super::DEADLINE);
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success(), "{said}");
    assert!(said.contains("rank 0 has no memory for snapshots: only phalanx's launcher"), "{said}");
}

fn signal(name: &str, process: u32) {
    let kill = Command::new("kill").args([name, &process.to_string()]).status();
    assert!(kill.expect("kill").success(), "{name} {process}");
}

/// The processes that run the trainer for this launcher; its guard, a shell, is none of them.
fn ranks_of(launcher: u32) -> Vec<u32> {
    let tasks = fs::read_dir(format!("/proc/{launcher}/task")).expect("the launcher lives");
    let of = |task: fs::DirEntry| fs::read_to_string(task.path().join("children"));
    let ids: String = tasks.flatten().filter_map(|task| of(task).ok()).collect();
    let ids = ids.split_whitespace().map(|id| id.parse().expect("a number"));
    let name = |id: &u32| fs::read_to_string(format!("/proc/{id}/comm")).unwrap_or_default();
    ids.filter(|id| name(id).trim() == "bert_large").collect()
}

/// Whether nothing is left of a process but its exit code.
fn is_dead(process: u32) -> bool {
    let stat = fs::read_to_string(format!("/proc/{process}/stat")).unwrap_or_default();
    stat.rsplit_once(") ").is_some_and(|(_, rest)| rest.starts_with('Z'))
}

/// How a launcher's memory for snapshots is opened.
fn memory_of(launcher: u32) -> PathBuf {
    let descriptors = fs::read_dir(format!("/proc/{launcher}/fd")).expect("the launcher lives");
    let is_it = |path: &PathBuf| {
        let target = fs::read_link(path).unwrap_or_default();
        target.to_string_lossy().starts_with("/memfd:phalanx-snapshots")
    };
    descriptors.flatten().map(|entry| entry.path()).find(is_it).expect("memory for snapshots")
}
