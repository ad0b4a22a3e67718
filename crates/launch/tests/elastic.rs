//! Launchers of several nodes that restart their ranks together, go on without a node, and take it in again; here they
//! meet on loopback.

mod support;

use std::sync::mpsc::Receiver;
use std::time::{Duration, Instant};

use phalanx_comm::testing::free_port;
use rustix::process::Signal;
use support::{command, Job, LIMIT};

const TOKEN: &str = "5a";

fn node(rank: usize, nnodes: &str, port: u16, options: &str) -> Job {
    let mut node = command(&format!(
        "--nnodes {nnodes} --node-rank {rank} --master-addr 127.0.0.1 --master-port {port} {options}"
    ));
    node.env("PHALANX_JOB_TOKEN", TOKEN.repeat(32));
    Job::of(node)
}

/// Waits until the launcher, or one of its ranks, says this on standard error.
#[track_caller]
fn await_notice(job: &Job, part: &str) -> String {
    await_line(&job.errors, &job.output, part)
}

/// Waits until a rank of the job has said this.
#[track_caller]
fn await_output(job: &Job, part: &str) {
    await_line(&job.output, &job.errors, part);
}

#[track_caller]
fn await_line(lines: &Receiver<String>, others: &Receiver<String>, part: &str) -> String {
    let (mut said, end) = (Vec::new(), Instant::now() + LIMIT);
    while let Ok(line) = lines.recv_timeout(end.saturating_duration_since(Instant::now())) {
        if line.contains(part) {
            return line;
        }
        said.push(line);
    }
    panic!("nobody says {part:?}: {said:#?}, {:#?}", others.try_iter().collect::<Vec<_>>());
}

#[test]
fn a_failure_on_one_node_starts_the_ranks_of_all_nodes_again() {
    let port = free_port();
    let options = "--nproc-per-node 2 --act train --rank 3 --fault kill --max-restarts 2";
    let nodes = [0, 1].map(|rank| node(rank, "2", port, options));
    for finished in nodes.map(Job::finish) {
        assert_eq!(finished.code, Some(0), "{:#?}", finished.errors);
        let begins = "generation 1 begins: nodes 0,1, 4 ranks; before: rank 3 on host ";
        let said = finished.errors.iter().find(|line| line.contains(begins));
        let said = said.unwrap_or_else(|| panic!("{:#?}", finished.errors));
        assert!(said.contains("died: signal 9 (SIGKILL) after ") && said.ends_with("; step 3"));
        let done = |line: &&String| line.ends_with("done in attempt 1");
        assert_eq!(finished.output.iter().filter(done).count(), 2, "{:#?}", finished.output);
    }
}

#[test]
fn the_budget_is_that_of_the_whole_job() {
    let port = free_port();
    let options = "--act train --rank 1 --code 74 --failing 9 --further 4 --max-restarts 1";
    let [first, second] = [0, 1].map(|rank| node(rank, "2", port, options)).map(Job::finish);
    assert_eq!((first.code, second.code), (Some(74), Some(74)), "{:#?}", first.errors);
    for finished in [&first, &second] {
        let gave_up = "giving up: 1 restarts are used up";
        assert!(
            finished.errors.iter().any(|line| line.contains(gave_up)),
            "{:#?}",
            finished.errors
        );
    }
    assert!(second.report().contains("rank 1 on host"), "{}", second.report());
    assert_eq!(first.report(), format!("{} | reported by node 1", second.report()));
}

#[test]
fn the_job_goes_on_without_a_lost_node_and_takes_it_in_again() {
    let port = free_port();
    let start = |rank| node(rank, "2:3", port, "--act endless");
    let [first, second, third] = [0, 1, 2].map(start);
    await_output(&third, "attempt 0 of 3 rank 2");
    third.kill();
    await_notice(&first, "generation 1 begins: nodes 0,1, 2 ranks");
    await_output(&second, "attempt 1 of 2 rank 1");
    // From here on they look whether they should stop; before that a signal would end them.
    await_output(&first, "training in attempt 1");
    await_output(&second, "training in attempt 1");
    let again = start(2);
    // The ranks of the others stop at a boundary between steps.
    await_output(&first, "stopped in attempt 1");
    await_output(&again, "attempt 2 of 3 rank 2");
    await_output(&second, "attempt 2 of 3 rank 1");
    first.signal(Signal::INT);
    assert_eq!(first.finish().code, Some(130));
    for finished in [second, again].map(Job::finish) {
        assert_eq!(finished.code, Some(130), "{:#?}", finished.errors);
        assert!(finished.report().contains("ended by SIGINT to the launcher of node 0"));
    }
}

#[test]
fn a_node_that_is_taken_away_leaves_and_the_others_go_on() {
    let port = free_port();
    let [first, second] = [0, 1].map(|rank| node(rank, "1:2", port, "--act endless"));
    await_output(&second, "attempt 0 of 2 rank 1");
    second.signal(Signal::TERM);
    assert_eq!(second.finish().code, Some(143));
    await_output(&first, "attempt 1 of 1 rank 0");
    first.signal(Signal::INT);
    assert_eq!(first.finish().code, Some(130));
}

#[test]
fn a_node_whose_node_0_is_killed_ends() {
    let port = free_port();
    let [first, second] = [0, 1].map(|rank| node(rank, "1:2", port, "--act endless"));
    let pids = second.numbers("pid", 1);
    first.numbers("pid", 1);
    first.kill();
    let finished = second.finish();
    assert_eq!(finished.code, Some(69), "{:#?}", finished.errors);
    assert!(finished.report().contains("the launcher of node 0 is gone"), "{}", finished.report());
    support::assert_gone(&pids, Duration::ZERO);
}

#[test]
fn nodes_must_be_launched_alike() {
    let port = free_port();
    let first = node(0, "1:2", port, "--act endless");
    await_notice(&first, "node 0 of 2");
    let refused = node(1, "2:2", port, "--act endless").finish();
    assert_eq!(refused.code, Some(64), "{:#?}", refused.errors);
    let said = "node 0 was launched with --nnodes 1:2, this node with --nnodes 2:2";
    assert!(refused.errors.iter().any(|line| line.contains(said)), "{:#?}", refused.errors);
}
