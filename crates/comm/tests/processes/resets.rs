//! Connections between machines that are reset while both processes live.

use std::collections::VecDeque;
use std::io::Write as _;
use std::net::TcpStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::faults::LIMIT;
use crate::machines::{machines, Machines};
use crate::silence::pause;
use phalanx_comm::{Group, GroupOptions, Sum, Work};

/// What rank 0 is told at the end.
pub(crate) const ENOUGH: &str = "enough\n";
/// How many elements the messages have: short ones, and some of many parts.
const LENGTHS: [usize; 5] = [1, 1000, 0, 1_000_000, 7];

/// What a rank does: it sends the other one messages and gets its own, and checks each of them, until rank 0 is told that it is enough.
/// They travel on the control connection.
pub(crate) fn rank() {
    let mut group = Group::from_environment(GroupOptions::default()).expect("the ranks meet");
    let (rank, peer) = (group.rank(), 1 - group.rank());
    let value = |of: usize, step: usize, at: usize| {
        i64::try_from(of * 7919 + step * 31 + at).expect("small")
    };
    let enough = Arc::new(AtomicBool::new(rank > 0));
    let told = Arc::clone(&enough);
    std::thread::spawn(move || {
        // The end of the test is the end of the pipe.
        drop(std::io::stdin().read_line(&mut String::new()));
        told.store(true, Ordering::Release);
    });
    let mut go_on = [1_u8];
    let mut step = 0;
    while go_on == [1] {
        let len = LENGTHS[step % LENGTHS.len()];
        let mine: Vec<i64> = (0..len).map(|at| value(rank, step, at)).collect();
        let mut theirs = vec![0_i64; len];
        let sent = group.send(&mine, peer).expect("a start");
        group.receive(&mut theirs, peer).and_then(Work::wait).expect("a message");
        sent.wait().expect("a message");
        let right = |(at, got): (usize, &i64)| *got == value(peer, step, at);
        assert!(theirs.iter().enumerate().all(right), "message {step}");
        go_on = [u8::from(!enough.load(Ordering::Acquire))];
        group.broadcast(&mut go_on[..], 0).and_then(Work::wait).expect("a word");
        step += 1;
        if step == 20 {
            println!("under way");
        }
    }
    println!("no error in {step} steps");
}

/// Waits until there are two connections again, one of them new; says how long that took.
pub(crate) fn back(machines: &Machines, gone: &(String, String)) -> Duration {
    let start = Instant::now();
    loop {
        let connections = machines.connections();
        if connections.len() >= 2 && !connections.contains(gone) {
            return start.elapsed();
        }
        assert!(start.elapsed() < LIMIT, "not back: {connections:?}");
        pause(Duration::from_millis(5));
    }
}

#[test]
fn a_reset_data_connection_is_an_error_and_no_death() {
    let Some(machines) = machines() else { return };
    let mut ranks = machines.start(&[0, 1], "killed in large all-reduces");
    ranks.wait_for_line(0, "under way");
    let connections = machines.connections();
    machines.reset(connections.last().expect("a data connection"));
    for (rank, ended) in ranks.finish(LIMIT).iter().enumerate() {
        let other = format!("connection to rank {} (host", 1 - rank);
        let told = format!("the group failed on rank {}: connection to rank {rank}", 1 - rank);
        let line = ended.output.lines().find(|line| line.contains("error: "));
        let line = line.unwrap_or_default();
        assert!(line.contains(&other) || line.contains(&told), "{}", ended.output);
        assert!(line.contains("lost, peer alive"), "{line}");
    }
}

#[test]
fn a_reset_control_connection_comes_back_and_no_message_is_lost() {
    let Some(machines) = machines() else { return };
    let mut ranks = machines.start(&[0, 1], "messages");
    ranks.wait_for_line(0, "under way");
    // Collectives are few and small here: the control connection is the busy one.
    for _ in 0..4 {
        let connections = machines.connections();
        assert_eq!(connections.len(), 2, "a control and a data connection: {connections:?}");
        let control = &connections[1];
        machines.reset(control);
        println!("back after {:.1?}", back(&machines, control));
        pause(Duration::from_millis(200));
    }
    ranks.say(0, ENOUGH);
    for ended in ranks.finish(LIMIT) {
        assert!(ended.output.contains("no error in"), "{}", ended.output);
    }
}

#[test]
fn heartbeats_go_on_after_a_reset() {
    let Some(machines) = machines() else { return };
    // Longer than a silence that counts as death.
    let mut ranks = machines.start(&[0, 1], "counts");
    ranks.wait_for_line(0, "under way");
    let control = machines.connections()[0].clone();
    machines.reset(&control);
    println!("back after {:.1?}", back(&machines, &control));
    for ended in ranks.finish(LIMIT) {
        assert!(ended.output.contains("no error in"), "{}", ended.output);
    }
}

/// What a stranger does until it is killed: it crowds a door, talks nonsense, and most of the time says nothing.
pub(crate) fn stranger() {
    let door = std::env::var("PHALANX_TEST_ARGUMENTS").expect("only the test starts this one");
    let words: [&[u8]; 5] = [
        b"",
        b"GET / HTTP/1.1\r\n\r\n",
        &[0xA5; 4096],
        b"PHXc and a proof of sixty bytes that is none, whoever may say it..",
        &[0xFF; 8],
    ];
    let mut crowd = VecDeque::new();
    let start = Instant::now();
    for turn in 0.. {
        if start.elapsed() > Duration::from_secs(30) {
            return;
        }
        if let Ok(mut stream) = TcpStream::connect(&door) {
            // It may be shown out before it has said all.
            drop(stream.write_all(words[turn % words.len()]));
            crowd.push_back(stream);
        }
        if crowd.len() > 100 {
            drop(crowd.pop_front());
        }
        if turn == 200 {
            println!("crowded");
        }
        pause(Duration::from_millis(3));
    }
}

#[test]
fn strangers_at_the_door_keep_no_rank_from_coming_back_and_do_not_disturb_the_job() {
    let Some(machines) = machines() else { return };
    let mut ranks = machines.start(&[0, 1], "messages");
    ranks.wait_for_line(0, "under way");
    let doors = machines.doors();
    assert_eq!(doors.len(), 1, "rank 0 waits for rank 1 to come back: {doors:?}");
    let before = machines.connections();
    let mut stranger = machines.stranger("knocks", &doors[0]);
    stranger.wait_for_line(0, "crowded");
    let control = before.last().expect("a control connection");
    machines.reset(control);
    pause(Duration::from_secs(2));
    ranks.say(0, ENOUGH);
    for ended in ranks.finish(LIMIT) {
        assert!(ended.output.contains("no error in"), "{}", ended.output);
    }
    stranger.kill(0);
}

/// A rank that dies while its control connection is lost, and one that dies after it came back.
#[test]
fn a_death_is_seen_through_a_reset() {
    for waits in [false, true] {
        let Some(machines) = machines() else { return };
        let mut ranks = machines.start(&[0, 1], "killed in large all-reduces");
        ranks.wait_for_line(0, "under way");
        let control = machines.connections()[0].clone();
        machines.reset(&control);
        if waits {
            back(&machines, &control);
        }
        ranks.kill(1);
        let ended = ranks.finish(LIMIT);
        let line = ended[0].output.lines().find(|line| line.contains("error: "));
        assert!(line.unwrap_or_default().contains("rank 1 (host "), "{}", ended[0].output);
        assert!(line.unwrap_or_default().contains("died"), "{}", ended[0].output);
    }
}

/// What a rank does: rank 1 ends the group in the moment in which the test resets the connection.
pub(crate) fn aborting_rank() {
    let mut group = Group::from_environment(GroupOptions::default()).expect("the ranks meet");
    // Enough to make the data connection the busy one.
    let mut values = vec![1.0_f32; 100_000];
    group.all_reduce(&mut values[..], Sum).and_then(Work::wait).expect("a sum");
    println!("under way");
    if group.rank() == 1 {
        let mut line = String::new();
        std::io::stdin().read_line(&mut line).expect("the test says when");
        group.abort("because");
    } else {
        let error = group.all_reduce(&mut values[..], Sum).and_then(Work::wait);
        println!("error: {}", error.expect_err("the group is aborted"));
    }
}

#[test]
fn an_abort_is_heard_through_a_reset() {
    let Some(machines) = machines() else { return };
    let mut ranks = machines.start(&[0, 1], "aborts");
    ranks.wait_for_line(0, "under way");
    ranks.wait_for_line(1, "under way");
    machines.reset(&machines.connections()[0]);
    ranks.say(1, "now\n");
    let ended = ranks.finish(LIMIT);
    assert!(ended[0].output.contains("error: rank 1 aborted the group: because"), "{ended:?}");
}
