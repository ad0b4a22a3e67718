//! Several launchers that make one job, as on several machines; here they meet on loopback.
#![expect(clippy::print_stderr, reason = "a test that cannot run says so")]

#[path = "../../comm/tests/support/namespaces.rs"]
mod namespaces;
mod support;

use std::process::Command;

use namespaces::{ip, namespaces, ADDRESSES};
use phalanx_comm::testing::free_port;
use rustix::process::{kill_process, Pid, Signal};
use support::{assert_gone, command, sorted, Finished, Job, LIMIT};

#[test]
fn two_launchers_make_one_job() {
    let port = free_port();
    // The second node comes first, and waits; the nodes are uneven.
    let second = node(1, port, "--nproc-per-node 1 --act join");
    let first = node(0, port, "--nproc-per-node 2 --act join").finish();
    let second = second.finish();
    assert_eq!((first.code, second.code), (Some(0), Some(0)), "{:?}", second.errors);
    assert_eq!(sorted(first.output), ["[rank 0] joined 0,1,2", "[rank 1] joined 0,1,2"]);
    assert_eq!(second.output, ["[rank 2] joined 0,1,2"]);
}

#[test]
fn node_0_stays_for_nodes_that_take_longer() {
    let port = free_port();
    let (first, second) = (node(0, port, "--act talk"), node(1, port, "--act polite"));
    second.numbers("pid", 1);
    loop {
        let line = first.errors.recv_timeout(LIMIT).unwrap();
        if line.contains("waiting for those of the other nodes") {
            break;
        }
    }
    // Its rank ends well, so node 0 does, too: it hears of that by node 1's launcher.
    second.signal(Signal::USR1);
    assert_eq!(second.finish().code, Some(0));
    assert_eq!(first.finish().code, Some(0));
}

#[test]
fn a_failure_on_one_node_ends_the_other_with_the_same_report() {
    let port = free_port();
    let options = "--act exit --rank 1 --code 74";
    let (first, second) = (node(0, port, options), node(1, port, options));
    let (first, second) = (first.finish(), second.finish());
    assert_eq!((first.code, second.code), (Some(74), Some(74)));
    assert!(second.report().contains("rank 1 on host"), "{}", second.report());
    let expected = format!("{} | reported by node 1", second.report());
    assert_eq!(first.report(), expected);
}

#[test]
fn node_0_shows_the_ranks_of_all_nodes_side_by_side() {
    let dir = tempfile::tempdir().expect("a folder");
    let port = free_port();
    let options = |node: usize| {
        let path = dir.path().join(node.to_string());
        format!(
            "--nproc-per-node 2 --act group --rank 3 --fault kill --inside --log-dir {}",
            path.display()
        )
    };
    let (first, second) = (node(0, port, &options(0)), node(1, port, &options(1)));
    let (first, second) = (first.finish(), second.finish());
    assert_eq!((first.code, second.code), (Some(70), Some(70)), "{:?}", first.errors);
    let said = first.errors.iter().find(|line| line.contains("ranks of all nodes: "));
    let said = said.unwrap_or_else(|| panic!("{:?}", first.errors));
    let (_, path) = said.split_once("| operations: ").expect("a file");
    let lineup = std::fs::read_to_string(path.trim()).expect("the file is there");
    for rank in 0..4 {
        assert!(lineup.contains(&format!("rank {rank} of 4 (pid ")), "{lineup}");
    }
    assert!(lineup.contains("rank 3") && lineup.contains("all_reduce #40"), "{lineup}");
}

#[test]
fn who_is_accused_by_another_node_is_the_cause_and_not_the_witness() {
    let port = free_port();
    let options = "--act group --rank 1 --fault idle";
    let (first, second) = (node(0, port, options), node(1, port, options));
    let (first, second) = (first.finish(), second.finish());
    let report = first.report();
    assert!(
        report.starts_with("error[PHX0703]: rank 1 on another node failed the others after "),
        "{report}"
    );
    assert!(report.contains("| first seen by rank 0: all_reduce #40"), "{report}");
    assert!(report.contains("5s passed on rank 0, waiting for rank 1"), "{report}");
    assert_eq!(second.report(), format!("{report} | reported by node 0"));
    assert_eq!((first.code, second.code), (Some(70), Some(70)));
}

#[test]
fn the_node_of_the_accused_rank_tells_its_end_if_it_can() {
    let port = free_port();
    let options = "--nproc-per-node 2 --act group --rank 3 --fault idle";
    let (first, second) = (node(0, port, options), node(1, port, options));
    let (first, second) = (first.finish(), second.finish());
    let report = second.report();
    assert!(report.starts_with("error[PHX0703]: rank 3 on host "), "{report}");
    assert!(report.contains("| first seen by rank 2"), "{report}");
    assert_eq!(first.report(), format!("{report} | reported by node 1"));
    assert_eq!((first.code, second.code), (Some(70), Some(70)));
}

#[test]
fn nodes_share_a_folder_for_logs_with_each_other_and_with_no_other_job() {
    let dir = tempfile::tempdir().expect("a folder");
    let port = free_port();
    // Also where the launchers do not see each other's files.
    for folders in [["shared", "shared"], ["shared", "shared"], ["mine", "shared"]] {
        let nodes = [0, 1].map(|rank| {
            let path = dir.path().join(folders[rank]);
            node(rank, port, &format!("--act exit --rank 1 --code 74 --log-dir {}", path.display()))
        });
        assert_eq!(nodes.map(|node| node.finish().code), [Some(74), Some(74)]);
    }
    let files = |folder: &str| {
        let list = |path| std::fs::read_dir(path).expect("it is there").map(|it| it.expect("read"));
        let mut files = Vec::new();
        for run in list(dir.path().join(folder)) {
            files.extend(list(run.path()).map(|file| file.file_name()));
        }
        sorted(files.into_iter().map(|name| name.to_string_lossy().into_owned()).collect())
    };
    assert_eq!(files("mine"), ["rank0.log"]);
    let twice = ["errors.jsonl", "errors.jsonl", "rank0.log", "rank0.log"];
    let logs_of_1 = ["rank1-2.log", "rank1.log", "rank1.log"];
    assert_eq!(files("shared"), [&twice[..], &logs_of_1[..]].concat());
}

#[test]
fn ctrl_c_on_one_node_ends_the_other() {
    let port = free_port();
    let (first, second) = (node(0, port, "--act polite"), node(1, port, "--act polite"));
    first.numbers("pid", 1);
    second.numbers("pid", 1);
    first.signal(Signal::INT);
    assert_eq!(first.finish().code, Some(130));
    let second = second.finish();
    assert_eq!(second.code, Some(130));
    assert!(second.report().contains("ended by SIGINT to the launcher of node 0"));
}

#[test]
fn a_node_whose_node_0_is_killed_ends_its_ranks() {
    let port = free_port();
    let (first, second) = (node(0, port, "--act wait"), node(1, port, EIGHT));
    first.numbers("pid", 1);
    let pids = second.numbers("pid", 8);
    first.kill();
    assert_gone(&pids, LIMIT);
    let second = second.finish();
    assert_eq!(second.code, Some(69));
    let report = second.report();
    assert!(report.contains("PHX0703]: the launcher of node 0 is gone"), "{report}");
}

#[test]
fn a_node_that_is_cut_off_from_node_0_ends_its_ranks() {
    let Some(machines) = namespaces() else { return };
    let on = |machine: usize, options: &str| {
        let of = node_command(machine, ADDRESSES[0], 29_518, options);
        let mut command: Command = machines.command(machine, of.get_program());
        command.args(of.get_args()).env("PHALANX_JOB_TOKEN", TOKEN.repeat(32));
        Job::of(command)
    };
    let (first, second) = (on(0, "--act wait"), on(1, EIGHT));
    first.numbers("pid", 1);
    let pids = second.numbers("pid", 8);
    ip(&format!("-n {} link set veth0 down", machines.names[0])).expect("the link is ours");
    kill_process(Pid::from_raw(pids[3]).expect("a rank"), Signal::KILL).expect("it lives");
    assert_gone(&pids, LIMIT);
    let second = second.finish();
    assert_eq!(second.code, Some(70));
    assert!(second.report().contains("died: signal 9 (SIGKILL)"), "{}", second.report());
    first.kill();
}

const EIGHT: &str = "--nproc-per-node 8 --act wait";
const TOKEN: &str = "5a";

/// A node of two that is to do `act`.
fn node(rank: usize, port: u16, options: &str) -> Job {
    Job::of(node_command(rank, "127.0.0.1", port, options))
}

fn node_command(rank: usize, master: &str, port: u16, options: &str) -> Command {
    let mut node = command(&format!(
        "--nnodes 2 --node-rank {rank} --master-addr {master} --master-port {port} {options}"
    ));
    node.env("PHALANX_JOB_TOKEN", TOKEN.repeat(32));
    node
}

#[test]
fn a_signal_while_waiting_for_the_other_nodes_ends_the_launcher() {
    let lonely = node(0, free_port(), "--act wait");
    let notice = lonely.errors.recv_timeout(LIMIT).unwrap();
    assert!(notice.contains("node 0 of 2: meeting the others at 127.0.0.1:"), "{notice}");
    lonely.signal(Signal::TERM);
    let Finished { code, output, .. } = lonely.finish();
    assert_eq!((code, output.len()), (None, 0), "ended by the signal itself");
}

#[test]
fn different_tokens_or_counts_of_nodes_are_told_apart() {
    let port = free_port();
    let first = node(0, port, "--act wait");
    let mut other_token = command(&format!(
        "--nnodes 2 --node-rank 1 --master-addr 127.0.0.1 --master-port {port} --act wait"
    ));
    other_token.env("PHALANX_JOB_TOKEN", "66".repeat(32));
    let refused = Job::of(other_token).finish();
    assert_eq!(refused.code, Some(69));
    assert!(refused.errors.concat().contains("another job token"), "{:?}", refused.errors);
    let mut three = command(&format!(
        "--nnodes 3 --node-rank 1 --master-addr 127.0.0.1 --master-port {port} --act wait"
    ));
    three.env("PHALANX_JOB_TOKEN", TOKEN.repeat(32));
    let _three = Job::of(three);
    let mismatched = first.finish();
    assert_eq!(mismatched.code, Some(64));
    let text = mismatched.errors.concat();
    assert!(
        text.contains("node 1 was launched with --nnodes 3, this node with --nnodes 2"),
        "{text}"
    );
}
