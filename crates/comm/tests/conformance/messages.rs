//! Messages between two ranks: more than there is room for, in every direction and order, and what is no match.

use std::time::Duration;

use phalanx_comm::environment::HostLink;
use phalanx_comm::testing::{run_ranks, run_ranks_with};
use phalanx_comm::{Arriving, Error, Group, GroupOptions, Work};

const LINKS: [HostLink; 2] = [HostLink::Auto, HostLink::Tcp];
/// More of them than a channel has heads, and more bytes than it has memory.
const MANY: usize = 500;

/// Lengths round what a piece holds, short and none at all.
fn length(number: usize) -> usize {
    [0, 1, 7, 1_000, 131_071, 131_072, 131_073, 300_000][number % 8]
}

fn message(from: usize, number: usize, bytes: usize) -> Vec<u8> {
    let start = from * 31 + number * 7;
    (start..start + bytes).map(|value| (value % 251) as u8).collect()
}

/// The sender is done sending long before the receiver begins; what has no room waits.
pub(crate) fn more_than_there_is_room_for(mut group: Group) {
    let (rank, mut sent) = (group.rank(), Vec::new());
    if group.world_size() == 1 {
        return;
    }
    if rank == 0 {
        for number in 0..MANY {
            sent.push(group.send(&message(0, number, length(number)), 1).unwrap());
        }
    }
    group.barrier().and_then(Work::wait).unwrap();
    if rank == 1 {
        for number in 0..MANY {
            let mut into = vec![9; length(number)];
            group.receive_bytes(into.len(), 0).and_then(|one| one.wait_into(&mut into)).unwrap();
            assert_eq!(into, message(0, number, into.len()), "{number}");
        }
    }
    sent.into_iter().for_each(|one| one.wait().unwrap());
    group.barrier().and_then(Work::wait).unwrap();
}

#[test]
fn a_sender_goes_on_when_there_is_no_more_room() {
    for link in LINKS {
        run_ranks_with(3, link, GroupOptions::default(), more_than_there_is_room_for);
    }
}

/// Every rank sends to every other one, waits for its sends first, and for what it receives in the opposite order, half of it as slices.
pub(crate) fn everybody_to_everybody(mut group: Group) {
    let (rank, ranks) = (group.rank(), group.world_size());
    let others: Vec<usize> = (0..ranks).filter(|peer| *peer != rank).collect();
    let bytes = |from: usize, number: usize| length(number + 3 * from) + 900_000 * (number % 2);
    let count = 12;
    let mut slices: Vec<Vec<u8>> = others.iter().map(|peer| vec![0; bytes(*peer, count)]).collect();
    let (mut sent, mut arriving) = (Vec::new(), Vec::new());
    for number in 0..count {
        for peer in &others {
            let len = bytes(*peer, number);
            arriving.push((*peer, number, group.receive_bytes(len, *peer).unwrap()));
            let mine = message(rank, number, bytes(rank, number));
            sent.push(group.send(&mine, *peer).unwrap());
        }
    }
    let mut last = Vec::new();
    for (peer, slice) in others.iter().zip(&mut slices) {
        last.push(group.receive(&mut slice[..], *peer).unwrap());
        sent.push(group.send(&message(rank, count, bytes(rank, count)), *peer).unwrap());
    }
    sent.into_iter().for_each(|one| one.wait().unwrap());
    last.into_iter().rev().for_each(|one| one.wait().unwrap());
    for (peer, number, one) in arriving.into_iter().rev() {
        assert_eq!(one.wait().unwrap(), message(peer, number, bytes(peer, number)));
    }
    for (peer, slice) in others.iter().zip(slices) {
        assert_eq!(slice, message(*peer, count, slice.len()));
    }
    group.barrier().and_then(Work::wait).unwrap();
}

#[test]
fn messages_cross_in_every_direction() {
    for link in LINKS {
        for ranks in [2, 3, 4] {
            run_ranks_with(ranks, link, GroupOptions::default(), everybody_to_everybody);
        }
    }
}

/// A message that was asked for comes, whatever the receiver does, and the sender's wait ends: it must have got it before the receiver looks for it.
pub(crate) fn taken_in_elsewhere(mut group: Group) {
    let rank = group.rank();
    if group.world_size() == 1 {
        return;
    }
    for bytes in [0, 5, 600_000, 40 << 20] {
        for is_early in [false, true] {
            if rank == 0 {
                if is_early {
                    group.barrier().and_then(Work::wait).unwrap();
                }
                group.send(&message(0, bytes, bytes), 1).and_then(Work::wait).unwrap();
                if !is_early {
                    group.barrier().and_then(Work::wait).unwrap();
                }
            } else if rank == 1 {
                let mut into = vec![1; bytes];
                let arriving = group.receive_bytes(bytes, 0).unwrap();
                group.barrier().and_then(Work::wait).unwrap();
                arriving.wait_into(&mut into).unwrap();
                assert_eq!(into, message(0, bytes, bytes));
            } else {
                group.barrier().and_then(Work::wait).unwrap();
            }
        }
    }
}

#[test]
fn a_sender_waits_for_no_computation_of_its_receiver() {
    for link in LINKS {
        run_ranks_with(3, link, GroupOptions::default(), taken_in_elsewhere);
    }
}

#[test]
fn threads_wait_for_messages_of_one_rank() {
    for link in LINKS {
        run_ranks_with(2, link, GroupOptions::default(), |mut group| {
            let (rank, count) = (group.rank(), 24);
            let arriving: Vec<_> = (0..count)
                .map(|number| (number, group.receive_bytes(length(number), 1 - rank).unwrap()))
                .collect();
            std::thread::scope(|scope| {
                for (number, one) in arriving.into_iter().rev() {
                    scope.spawn(move || {
                        let mut into = vec![0; length(number)];
                        match number % 3 {
                            0 => into = one.wait().unwrap(),
                            _ => one.wait_into(&mut into).unwrap(),
                        }
                        assert_eq!(into, message(1 - rank, number, length(number)));
                    });
                }
                for number in 0..count {
                    let mine = message(rank, number, length(number));
                    group.send(&mine, 1 - rank).and_then(Work::wait).unwrap();
                }
            });
        });
    }
}

/// Works that nobody waits for are messages all the same, and take nobody else's place.
pub(crate) fn let_go(mut group: Group) {
    let rank = group.rank();
    match rank {
        0 if group.world_size() > 1 => {
            for number in 0..6 {
                drop(group.send(&message(0, number, length(number)), 1).unwrap());
            }
            group.send(&[7_u8; 3], 1).and_then(Work::wait).unwrap();
        }
        1 => {
            for number in 0..6 {
                drop(group.receive_bytes(length(number), 0).unwrap());
            }
            assert_eq!(group.receive_bytes(3, 0).and_then(Arriving::wait).unwrap(), [7; 3]);
        }
        _ => {}
    }
    group.barrier().and_then(Work::wait).unwrap();
}

#[test]
fn messages_that_nobody_waits_for_keep_their_place() {
    for link in LINKS {
        run_ranks_with(2, link, GroupOptions::default(), let_go);
    }
}

#[test]
fn a_message_that_is_there_is_done() {
    run_ranks(2, |mut group| {
        let rank = group.rank();
        if rank == 0 {
            let sent = group.send(&message(0, 0, 300_000), 1).unwrap();
            group.barrier().and_then(Work::wait).unwrap();
            while !sent.is_done() {
                std::thread::yield_now();
            }
            sent.wait().unwrap();
        } else {
            let arriving = group.receive_bytes(300_000, 0).unwrap();
            group.barrier().and_then(Work::wait).unwrap();
            while !arriving.is_done() {
                std::thread::yield_now();
            }
            assert_eq!(arriving.wait().unwrap(), message(0, 0, 300_000));
        }
    });
}

#[test]
fn memory_of_another_length_than_was_asked_for_is_refused() {
    run_ranks(2, |mut group| {
        if group.rank() == 0 {
            group.send(&[1_u8; 4], 1).and_then(Work::wait).unwrap();
            group.send(&[2_u8; 4], 1).and_then(Work::wait).unwrap();
            return;
        }
        let error = group.receive_bytes(4, 0).and_then(|one| one.wait_into(&mut [0; 5]));
        let error = error.unwrap_err();
        assert!(matches!(error, Error::LengthMismatch { expected: 4, actual: 5, .. }), "{error}");
        assert_eq!(group.receive_bytes(4, 0).and_then(Arriving::wait).unwrap(), [2; 4]);
    });
}

/// What the two sides call differently, and what of it the error of each rank names.
fn differs(
    send: impl Fn(&mut Group) -> Result<(), Error> + Send + Sync + 'static,
    named: [&'static str; 2],
) {
    let errors = run_ranks(3, move |mut group| {
        let ended = match group.rank() {
            0 => send(&mut group),
            1 => {
                let mut values = [0.0_f32; 40];
                let received = group.tagged("weights").receive(&mut values[..], 0);
                let received = received.and_then(Work::wait);
                assert_eq!(values, [0.0; 40]);
                received
            }
            _ => Ok(()),
        };
        ended.and_then(|()| group.barrier().and_then(Work::wait)).unwrap_err()
    });
    for error in errors {
        let text = error.to_string();
        assert!(matches!(error, Error::OutOfStep { .. }), "{text}");
        assert!(named.iter().all(|named| text.contains(named)), "{text}");
        assert!(text.contains("rank 0") && text.contains("rank 1"), "{text}");
    }
}

#[test]
fn what_is_no_match_is_named_with_both_sides() {
    let weights = |group: &mut Group| {
        let sent = group.tagged("biases").send(&[1.0_f32; 40], 1);
        sent.and_then(Work::wait)
    };
    differs(weights, ["weights", "biases"]);
    differs(|group| group.tagged("weights").send(&[1_u8; 160], 1)?.wait(), ["f32", "u8"]);
    differs(
        |group| group.tagged("weights").send(&vec![1.0_f32; 400_000], 1)?.wait(),
        ["400000", "40 "],
    );
}

/// Whoever waits for a side that is never called says whose it is.
#[test]
fn a_message_without_its_other_side_is_late() {
    for link in LINKS {
        for is_sent in [true, false] {
            let errors = run_ranks_with(2, link, GroupOptions::default(), move |mut group| {
                let limit = Duration::from_millis(700);
                if group.rank() == 1 {
                    // Told by the other one.
                    return group.barrier().and_then(Work::wait).unwrap_err();
                }
                let values = vec![1_u8; 50 << 20];
                match is_sent {
                    true => group.within(limit).send(&values, 1).and_then(Work::wait).unwrap_err(),
                    false => {
                        let arriving = group.within(limit).receive_bytes(5, 1).unwrap();
                        arriving.wait().unwrap_err()
                    }
                }
            });
            for error in errors {
                let Error::Timeout { rank: 0, absent, .. } = &error else { panic!("{error}") };
                assert_eq!(absent.iter().map(|one| one.rank).collect::<Vec<_>>(), [1], "{error}");
            }
        }
    }
}
