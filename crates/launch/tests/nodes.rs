//! Several launchers that make one job, as on several machines; here they meet on loopback.

mod support;

use std::time::{Duration, Instant};

use phalanx_comm::testing::free_port;
use rustix::process::Signal;
use support::{command, sorted, Finished, Job, LIMIT};

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
        format!("--nproc-per-node 2 --act group --rank 3 --fault kill --log-dir {}", path.display())
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

/// A node of two that is to do `act`.
fn node(rank: usize, port: u16, options: &str) -> Job {
    let mut node = command(&format!(
        "--nnodes 2 --node-rank {rank} --master-addr 127.0.0.1 --master-port {port} {options}"
    ));
    node.env("PHALANX_JOB_TOKEN", "5a".repeat(32));
    Job::of(node)
}

#[test]
fn a_signal_while_waiting_for_the_other_nodes_ends_the_launcher_at_once() {
    let lonely = node(0, free_port(), "--act wait");
    let notice = lonely.errors.recv_timeout(LIMIT).unwrap();
    assert!(notice.contains("node 0 of 2: meeting the others at 127.0.0.1:"), "{notice}");
    let start = Instant::now();
    lonely.signal(Signal::TERM);
    let Finished { code, output, .. } = lonely.finish();
    assert_eq!((code, output.len()), (None, 0), "ended by the signal itself");
    assert!(start.elapsed() < Duration::from_secs(2), "{:?}", start.elapsed());
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
    three.env("PHALANX_JOB_TOKEN", "5a".repeat(32));
    let _three = Job::of(three);
    let mismatched = first.finish();
    assert_eq!(mismatched.code, Some(64));
    let text = mismatched.errors.concat();
    assert!(
        text.contains("node 1 was launched with --nnodes 3, this node with --nnodes 2"),
        "{text}"
    );
}
