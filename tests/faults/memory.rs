//! Ranks that die and go on from their launcher's memory: no checkpoint is written.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

use phalanx_comm::slots::Slots;
use phalanx_comm::testing::free_port;
use tempfile::TempDir;

use super::support::{kill_child_of, Owned};
use super::{finish, losses, start, steps_done, wait_until, weights};

/// The tiny model; a batch and a schedule that do not depend on the number of ranks.
const TINY: [&str; 15] = [
    "--config",
    "configs/bert_tiny.json",
    "--nproc-per-node",
    "2",
    "--threads",
    "1",
    "--steps",
    "20",
    "--zero",
    "1",
    "--global-batch",
    "12",
    "--micro-batch",
    "3",
    "--dropout=0",
];

/// Snapshots in memory alone.
const IN_MEMORY: [&str; 4] = ["--memory-every", "2", "--max-restarts", "3"];

/// A run on four ranks of two emulated nodes that nothing happens to.
fn whole() -> &'static Path {
    static WHOLE: OnceLock<TempDir> = OnceLock::new();
    let run = || {
        let folder = tempfile::tempdir().expect("a temporary folder");
        finish(folder.path(), &[&TINY[..], &["--nnodes", "2"]].concat());
        folder
    };
    WHOLE.get_or_init(run).path()
}

/// The same, with snapshots.
fn start_in_memory(folder: &Path) -> Owned {
    start(folder, &[&TINY[..], &IN_MEMORY, &["--nnodes", "2"]].concat())
}

/// The run ends with the bits of one that nothing happened to, and has gone on from memory as often as is said.
fn compare(run: Owned, folder: &Path, restarts: usize) {
    let output = run.finish(super::DEADLINE);
    let (out, said) =
        (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{said}");
    assert!(said.contains(&format!("restart {restarts}/3: rank ")), "{said}");
    let resumed = out.matches("from snapshot in memory").count();
    assert_eq!(resumed, restarts, "{out}\n{said}");
    assert!(weights(folder) == weights(whole()), "{out}\n{said}");
    assert_eq!(losses(folder), losses(whole()));
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
            ranks.len() == 4 && ranks.iter().any(|rank| !before.contains(rank))
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

/// Two launchers, as on two machines. One is lost with its ranks and its memory, and the other goes on alone.
#[test]
fn the_launcher_of_a_node_is_lost_and_the_other_has_all_that_it_needs() {
    let (folder, elsewhere) =
        (tempfile::tempdir().expect("one"), tempfile::tempdir().expect("two"));
    let port = free_port().to_string();
    let node = |own: &TempDir, number| {
        let place = ["--nnodes", "1:2", "--node-rank", number, "--master-addr", "127.0.0.1"];
        let args = [&TINY[..], &IN_MEMORY, &place, &["--master-port", &port]].concat();
        let mut command = super::trainer(own.path(), &args);
        Owned::start(command.env("PHALANX_JOB_TOKEN", "5a".repeat(32)))
    };
    let (first, second) = (node(&folder, "0"), node(&elsewhere, "1"));
    wait_until("steps of four ranks", || steps_of_four(folder.path()) >= 5);
    second.signal("-KILL");
    let output = first.finish(super::DEADLINE);
    drop(second);
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said}");
    assert!(said.contains("begins: nodes 0, 2 ranks"), "{said}");
    let out = String::from_utf8_lossy(&output.stdout);
    assert!(out.contains("from snapshot in memory"), "{out}");
    // The sum over a batch is cut at other places from then on.
    let (changed, whole) = (losses(folder.path()), losses(whole()));
    assert_eq!(changed.len(), whole.len(), "every step once");
    for ((step, one), (_, other)) in changed.iter().zip(&whole) {
        let [one, other] = [one, other].map(|text| text.parse::<f64>().expect("a number"));
        assert!((one - other).abs() <= 1e-6 * other.abs(), "step {step}: {one} and {other}");
    }
}

/// How many steps the metrics have that four ranks have made.
fn steps_of_four(folder: &Path) -> usize {
    let text = fs::read_to_string(folder.join("metrics.jsonl")).unwrap_or_default();
    let waits =
        text.lines().filter_map(|line| serde_json::from_str::<serde_json::Value>(line).ok());
    let of_four = |line: &serde_json::Value| {
        line["data_wait_ms_by_rank"].as_array().is_some_and(|by_rank| by_rank.len() == 4)
    };
    waits.filter(of_four).count()
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

pub(crate) fn signal(name: &str, process: u32) {
    let kill = Command::new("kill").args([name, &process.to_string()]).status();
    assert!(kill.expect("kill").success(), "{name} {process}");
}

/// The processes that run the trainer for this launcher; its guard, a shell, is none of them.
pub(crate) fn ranks_of(launcher: u32) -> Vec<u32> {
    let tasks = fs::read_dir(format!("/proc/{launcher}/task")).expect("the launcher lives");
    let of = |task: fs::DirEntry| fs::read_to_string(task.path().join("children"));
    let ids: String = tasks.flatten().filter_map(|task| of(task).ok()).collect();
    let ids = ids.split_whitespace().map(|id| id.parse().expect("a number"));
    let name = |id: &u32| fs::read_to_string(format!("/proc/{id}/comm")).unwrap_or_default();
    let is_trainer = |id: &u32| ["bert_large", "fault_lab"].contains(&name(id).trim());
    ids.filter(is_trainer).collect()
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
