//! Messages between GPUs whose two sides do not fit, or of which one does not come, on the stand-in.

use std::time::{Duration, Instant};

use phalanx_comm::{Error, Group, Result, Sum, Work};

use crate::without_gpu::{complain, complaints, until_told, world};

/// What a rank of two does: rank 0 sends, rank 1 receives.
pub(crate) fn rank(role: &str, mut group: Group) {
    let region = group.allocate::<f32>(1000).expect("memory");
    let bytes = group.allocate::<u8>(4000).expect("memory");
    region.write(0, &[1.0; 1000]);
    let sends = group.rank() == 0;
    let start = Instant::now();
    // Two that fit first: the numbers count.
    for _ in 0..2 {
        let work = match sends {
            true => group.send(region.full(), 1),
            false => group.receive(region.full(), 0),
        };
        work.and_then(Work::synchronize).expect("a message");
    }
    let done: Result<()> = match (role, sends) {
        ("length", true) => group.send(region.range(0..999), 1).and_then(Work::synchronize),
        ("type", true) => group.send(bytes.full(), 1).and_then(Work::synchronize),
        ("name", true) => {
            group.tagged("weights").send(region.full(), 1).and_then(Work::synchronize)
        }
        ("order", true) => {
            let sum = group.all_reduce(bytes.full(), Sum);
            let sent = group.send(region.full(), 1);
            sum.and_then(Work::synchronize).and(sent.and_then(Work::synchronize))
        }
        ("order", false) => {
            let received = group.receive(region.full(), 0);
            let sum = group.all_reduce(bytes.full(), Sum);
            received.and_then(Work::synchronize).and(sum.and_then(Work::synchronize))
        }
        ("together", _) => {
            // Both sides both ways; those from rank 0 differ in length.
            let part = if sends { 0..500 } else { 0..501 };
            let (there, back) = (region.range(part), bytes.full());
            let works = group.coalesced(|group| {
                Ok(if sends {
                    [group.send(there, 1)?, group.receive(back, 1)?]
                } else {
                    [group.send(back, 0)?, group.receive(there, 0)?]
                })
            });
            works.and_then(|works| works.into_iter().try_for_each(Work::synchronize))
        }
        ("leaves" | "panics", true) => {
            assert!(role != "panics", "by intent");
            drop(group);
            println!("left");
            return;
        }
        ("deaf", false) => {
            drop(group);
            println!("left");
            return;
        }
        ("late", true) => {
            // Alive, but it never sends.
            return until_told(&group);
        }
        ("late", false) => {
            let limit = Duration::from_secs(1);
            group.within(limit).receive(region.full(), 0).and_then(Work::synchronize)
        }
        (_, true) => group.send(region.full(), 1).and_then(Work::synchronize),
        (_, false) => group.receive(region.full(), 0).and_then(Work::synchronize),
    };
    let error = done.expect_err("the two sides differ");
    if matches!(error, Error::OutOfStep { .. }) && !sends && role != "together" {
        assert!(region.read(0..1000).iter().all(|value| value.to_bits() == 1.0_f32.to_bits()));
    }
    complain(start, &error);
}

#[test]
fn sides_that_differ_are_both_named_at_once() {
    for (role, ours, theirs) in [
        ("length", "send #0 (999 × f32, peer 1)", "receive #0 (1000 × f32, peer 0)"),
        ("type", "send #0 (4000 × u8, peer 1)", "receive #0 (1000 × f32, peer 0)"),
        ("name", "send #0 \"weights\"", "receive #0 (1000 × f32, peer 0)"),
        ("order", "send #1 (1000 × f32, peer 1)", "receive #0 (1000 × f32, peer 0)"),
        ("together", "send #0 (500 × f32, peer 1)", "receive #0 (501 × f32, peer 0)"),
    ] {
        let all = world(2, &format!("nccl message {role}"));
        let lines = complaints(&all);
        assert_eq!(lines.len(), 2, "{role}: {all:?}");
        for line in &lines {
            assert!(line.contains(ours) && line.contains(theirs), "{role}: {line}");
        }
    }
}

#[test]
fn a_side_that_cannot_come_is_named_at_once() {
    for (role, left) in [("leaves", 0), ("deaf", 1), ("panics", 0)] {
        let all = world(2, &format!("nccl message {role}"));
        let lines = complaints(&all);
        assert_eq!(lines.len(), 1, "{role}: {all:?}");
        let is_named = lines[0].contains(&format!("rank {left} (host "));
        assert!(is_named && lines[0].contains("left the group"), "{lines:?}");
        assert_eq!(lines[0].contains("panicked"), role == "panics", "{lines:?}");
    }
}

#[test]
fn a_side_that_does_not_come_is_named_in_time() {
    let all = world(2, "nccl message late");
    let lines = complaints(&all);
    assert_eq!(lines.len(), 1, "{all:?}");
    assert!(lines[0].contains("1s passed") && lines[0].contains("rank 0 (host "), "{lines:?}");
}
