//! Ranks that are silent and yet not gone: stopped, or cut off.

use std::time::{Duration, Instant};

use rustix::process::Signal;

use crate::faults::{blamed, LIMIT};
use crate::machines::machines;
use crate::support::Ranks;
use phalanx_comm::{Group, GroupOptions, Sum, Work};

/// Silence that counts as death where a test stops a rank and lets it go on: however late a busy machine does so.
const PATIENCE: Duration = Duration::from_secs(50);

/// Heartbeats as they are by default, and more patience.
fn patient() -> GroupOptions {
    GroupOptions {
        heartbeat: Duration::from_millis(500),
        dead_after: PATIENCE,
        ..GroupOptions::default()
    }
}

/// How long a rank takes that shall see no error: longer than the silence that one test makes.
pub(crate) fn steps_for() -> Duration {
    let asked = std::env::var("PHALANX_STEPS_FOR").ok().and_then(|seconds| seconds.parse().ok());
    Duration::from_secs(asked.unwrap_or(6))
}

/// What a rank does that shall see no error: steps for a while.
pub(crate) fn rank(is_patient: bool) {
    let options = if is_patient { patient() } else { GroupOptions::default() };
    let mut group = Group::from_environment(options).expect("the ranks meet");
    let start = Instant::now();
    let mut go_on = [1_u8];
    let mut steps = 0;
    while go_on == [1] {
        let mut values = vec![1.0_f32; 30_000];
        group.all_reduce(&mut values[..], Sum).and_then(Work::wait).expect("a sum");
        go_on = [u8::from(start.elapsed() < steps_for())];
        group.broadcast(&mut go_on[..], 0).and_then(Work::wait).expect("a word");
        steps += 1;
        if steps == 20 {
            println!("under way");
        }
    }
    println!("no error in {steps} steps");
}

/// Rank 0 sends a message when it is told to, and leaves; rank 1 receives it.
pub(crate) fn leaving_rank() {
    let mut group = Group::from_environment(patient()).expect("the ranks meet");
    let mut values = vec![1_u8; 5 << 20];
    if group.rank() == 0 {
        std::io::stdin().read_line(&mut String::new()).expect("a word");
        group.send(&values, 1).and_then(Work::wait).expect("sent");
        drop(group);
        println!("left");
    } else {
        values.fill(0);
        let received = group.receive(&mut values[..], 0).expect("started");
        println!("waits");
        received.wait().expect("received");
        assert!(values.iter().all(|value| *value == 1));
        println!("received");
    }
}

#[test]
fn a_rank_that_sleeps_while_another_one_leaves_misses_nothing() {
    let mut ranks = Ranks::start("leaves", 2, "tcp");
    ranks.wait_for_line(1, "waits");
    ranks.signal(1, Signal::STOP);
    ranks.say(0, "go\n");
    pause(Duration::from_millis(3500));
    ranks.signal(1, Signal::CONT);
    let ended = ranks.finish(LIMIT);
    assert!(ended[0].output.contains("left"), "{}", ended[0].output);
    assert!(ended[1].output.contains("received"), "{}", ended[1].output);
}

/// Waits without anything that could come.
pub(crate) fn pause(time: Duration) {
    let (_sender, receiver) = std::sync::mpsc::channel::<()>();
    assert!(receiver.recv_timeout(time).is_err());
}

fn stopped(link: &str, what: &str) {
    let mut ranks = Ranks::start("killed in large all-reduces", 3, link);
    ranks.wait_for_line(0, "under way");
    let pid = ranks.pid(1);
    ranks.signal(1, Signal::STOP);
    let ended = ranks.finish_without(Some(1), LIMIT);
    blamed(&ended, pid, "not responding for 5");
    assert!(ended[0].output.contains(what), "{}", ended[0].output);
}

#[test]
fn a_stopped_rank_is_named_with_its_state() {
    stopped("auto", "process state T (stopped");
}

#[test]
fn a_stopped_rank_behind_a_socket_is_told_apart_from_a_dead_network() {
    stopped("tcp", "acknowledges what is sent: that process is stopped");
}

/// It misses seven heartbeats.
#[test]
fn a_rank_that_goes_on_before_it_counts_as_dead_is_not_missed() {
    for link in ["auto", "tcp"] {
        let mut ranks = Ranks::start("counts patiently", 3, link);
        ranks.wait_for_line(0, "under way");
        ranks.signal(1, Signal::STOP);
        pause(Duration::from_millis(3900));
        ranks.signal(1, Signal::CONT);
        for ended in ranks.finish(LIMIT) {
            assert!(ended.output.contains("no error in"), "{}", ended.output);
        }
    }
}

/// Both sides of a cut see the other one's ranks gone, and end.
fn cut(cut: impl Fn(&crate::machines::Machines)) {
    let Some(machines) = machines() else { return };
    let mut ranks = machines.start(&[0, 0, 1, 1], "killed in large all-reduces");
    ranks.wait_for_line(0, "under way");
    cut(&machines);
    let ended = ranks.finish(LIMIT);
    for (rank, ended) in ended.iter().enumerate() {
        let others = if rank < 2 {
            ["rank 2 (host", "rank 3 (host"]
        } else {
            ["rank 0 (host", "rank 1 (host"]
        };
        let line = ended.output.lines().find(|line| line.contains("error: ")).unwrap_or_default();
        assert!(others.iter().any(|other| line.contains(other)), "rank {rank}: {}", ended.output);
        assert!(line.contains("not responding for 5"), "rank {rank}: {line}");
        assert!(line.contains("no contact with 10.99.0."), "rank {rank}: {line}");
    }
}

#[test]
fn a_partition_ends_both_sides() {
    cut(crate::machines::Machines::partition);
}

#[test]
fn a_link_that_goes_down_ends_both_sides() {
    cut(crate::machines::Machines::link_down);
}
