//! Wrong calls: every rank gets an error that shows both sides, and no memory changes.
#![expect(
    clippy::float_cmp,
    clippy::shadow_unrelated,
    clippy::unwrap_used,
    reason = "tests: exact values, and a failure is a panic"
)]

use std::time::{Duration, Instant};

use phalanx_comm::environment::HostLink;
use phalanx_comm::testing::{run_ranks, run_ranks_with};
use phalanx_comm::{Avg, Error, Group, GroupOptions, Max, Op, Sum, Work};

const LINKS: [HostLink; 2] = [HostLink::Auto, HostLink::Tcp];

/// Rank 1 calls something else; everybody must see the two calls, soon, with their memory as it was.
fn differs(
    call: impl Fn(&mut Group, &mut Vec<f32>, bool) -> Error + Send + Sync + Clone + 'static,
) {
    for link in LINKS {
        for len in [8, 100_000] {
            let call = call.clone();
            let errors = run_ranks_with(3, link, GroupOptions::default(), move |mut group| {
                let mut values = vec![1.0; len];
                let start = Instant::now();
                let odd = group.rank() == 1;
                let error = call(&mut group, &mut values, odd);
                assert!(start.elapsed() < Duration::from_millis(1500), "{:?}", start.elapsed());
                assert!(values.iter().all(|value| *value == 1.0), "memory changed");
                let again = group.barrier().map(drop).unwrap_err();
                assert_eq!(
                    again.to_string(),
                    error.to_string(),
                    "later calls give the first error"
                );
                error
            });
            for error in errors {
                let Error::OutOfStep { seq: 0, rank, ours, peer, theirs } = &error else {
                    panic!("{error}")
                };
                assert!((*rank == 1) != (*peer == 1), "{error}");
                assert_ne!(ours, theirs, "{error}");
            }
        }
    }
}

#[test]
fn another_length() {
    differs(|group, values, odd| {
        let len = values.len() - usize::from(odd);
        group.all_reduce(&mut values[..len], Sum).and_then(Work::wait).unwrap_err()
    });
}

#[test]
fn another_reduction() {
    differs(|group, values, odd| {
        if odd {
            group.all_reduce(&mut values[..], Max).and_then(Work::wait).unwrap_err()
        } else {
            group.all_reduce(&mut values[..], Sum).and_then(Work::wait).unwrap_err()
        }
    });
}

#[test]
fn another_collective() {
    differs(|group, values, odd| {
        if odd {
            group.broadcast(&mut values[..], 0).and_then(Work::wait).unwrap_err()
        } else {
            group.all_reduce(&mut values[..], Sum).and_then(Work::wait).unwrap_err()
        }
    });
}

#[test]
fn another_root() {
    differs(|group, values, odd| {
        let root = usize::from(odd);
        group.broadcast(&mut values[..], root).and_then(Work::wait).unwrap_err()
    });
}

#[test]
fn another_type() {
    differs(|group, values, odd| {
        if odd {
            let words: &mut [i32] = bytemuck::cast_slice_mut(&mut values[..]);
            group.all_reduce(words, Sum).and_then(Work::wait).unwrap_err()
        } else {
            group.all_reduce(&mut values[..], Sum).and_then(Work::wait).unwrap_err()
        }
    });
}

#[test]
fn the_same_call_in_another_order_is_told_apart_by_its_tag() {
    differs(|group, values, odd| {
        let tag = if odd { "bucket 1" } else { "bucket 0" };
        let work = group.tagged(tag).all_reduce(&mut values[..], Sum);
        let error = work.and_then(Work::wait).unwrap_err();
        assert!(error.to_string().contains("bucket 0"), "{error}");
        assert!(error.to_string().contains("bucket 1"), "{error}");
        error
    });
}

#[test]
fn a_skipped_collective_shows_at_the_next_one() {
    run_ranks(3, |mut group| {
        let mut values = [1.0_f32];
        if group.rank() != 1 {
            drop(group.tagged("skipped").barrier());
        }
        let error = group.all_reduce(&mut values[..], Avg).and_then(Work::wait).unwrap_err();
        let Error::OutOfStep { .. } = &error else { panic!("{error}") };
        assert!(error.to_string().contains("skipped"), "{error}");
    });
}

#[test]
fn a_rank_that_never_calls_is_named_by_the_time_out() {
    for link in LINKS {
        let errors = run_ranks_with(3, link, GroupOptions::default(), |mut group| {
            group.tagged("before").barrier().unwrap().wait().unwrap();
            let start = Instant::now();
            if group.rank() == 2 {
                // Told by the others, not by a time-out of its own.
                while group.failure().is_none() && start.elapsed() < Duration::from_secs(5) {
                    std::thread::yield_now();
                }
                assert!(start.elapsed() < Duration::from_secs(2));
                return group.barrier().map(drop).unwrap_err();
            }
            let limit = Duration::from_millis(300);
            let error = group.within(limit).barrier().and_then(Work::wait).unwrap_err();
            let elapsed = start.elapsed();
            assert!(elapsed >= limit && elapsed < limit * 4, "{elapsed:?}");
            error
        });
        for error in errors {
            let Error::Timeout { call, absent, .. } = &error else { panic!("{error}") };
            assert_eq!((call.op, call.seq), (Op::Barrier, 1));
            assert_eq!(absent.iter().map(|a| a.rank).collect::<Vec<_>>(), [2], "{error}");
            if link == HostLink::Auto {
                assert_eq!(absent[0].last.as_ref().map(|last| &last.tag[..]), Some("before"));
            }
        }
    }
}

#[test]
fn an_abort_reaches_everybody() {
    for link in LINKS {
        run_ranks_with(3, link, GroupOptions::default(), |mut group| {
            let rank = group.rank();
            let error = if rank == 1 {
                group.abort("the loss is not a number");
                group.barrier().map(drop).unwrap_err()
            } else {
                let mut values = vec![1.0_f32; 100_000];
                let started = group.all_reduce(&mut values[..], Sum);
                started.and_then(Work::wait).unwrap_err()
            };
            let Error::Aborted { rank: 1, reason } = &error else { panic!("{error}") };
            assert_eq!(reason, "the loss is not a number");
        });
    }
}

#[test]
fn a_rank_that_leaves_early_is_named() {
    for link in LINKS {
        run_ranks_with(3, link, GroupOptions::default(), |mut group| {
            group.barrier().unwrap().wait().unwrap();
            if group.rank() == 2 {
                return;
            }
            let start = Instant::now();
            let error = group.barrier().and_then(Work::wait).unwrap_err();
            assert!(start.elapsed() < Duration::from_millis(500), "{:?}", start.elapsed());
            let Error::PeerLeft { peer: 2, completed: 1, .. } = &error else { panic!("{error}") };
        });
    }
}

#[test]
fn arguments_are_checked_before_anything_is_sent() {
    run_ranks(3, |mut group| {
        let mut values = [0.0_f32; 4];
        let error = group.broadcast(&mut values[..], 3).unwrap_err();
        assert!(matches!(error, Error::NoSuchRank { rank: 3, world_size: 3, .. }), "{error}");
        let error = group.all_gather_in_place(&mut values[..]).unwrap_err();
        assert!(matches!(error, Error::NotDivisible { actual: 4, .. }), "{error}");
        let error = group.all_gather(&[1.0_f32], &mut values[..]).unwrap_err();
        assert!(matches!(error, Error::LengthMismatch { expected: 3, actual: 4, .. }), "{error}");
        let error = group.scatter(Some(&[1.0_f32; 3][..]), &mut values[..1], 0);
        assert_eq!(error.is_err(), group.rank() != 0);
        if let Ok(work) = error {
            drop(work);
        }
        let rank = group.rank();
        let error = group.send(&[1_u8], rank).unwrap_err();
        assert!(matches!(error, Error::SelfMessage { .. }), "{error}");
    });
}

#[test]
fn one_rank_works_alone_and_nobody_waits_for_it() {
    run_ranks(3, |mut group| {
        let rank = group.rank();
        let (sender, receiver) = std::sync::mpsc::channel();
        let error = group.on_rank(3, || ()).unwrap_err();
        assert!(matches!(error, Error::NoSuchRank { op: "on_rank", .. }), "{error}");
        let result = group.on_rank(1, || sender.send(7).map(|()| 8)).unwrap();
        assert_eq!(result.is_some(), rank == 1);
        assert_eq!(receiver.try_recv().ok(), (rank == 1).then_some(7));
        group.barrier().unwrap().wait().unwrap();
    });
}

#[test]
fn a_region_of_another_group_is_refused() {
    let mut group = Group::single(GroupOptions::default()).unwrap();
    let mut other = Group::single(GroupOptions::default()).unwrap();
    let region = other.allocate::<f32>(10).unwrap();
    let error = group.all_reduce(region.full(), Sum).unwrap_err();
    assert!(matches!(error, Error::ForeignRegion { .. }), "{error}");
    other.all_reduce(region.full(), Sum).unwrap().wait().unwrap();
}

#[test]
fn a_forgotten_work_leaves_the_slice_alone_and_the_group_alive() {
    run_ranks(3, |mut group| {
        for len in [4, 100_000] {
            let mut values = vec![1.0_f32; len];
            let work = group.all_reduce(&mut values[..], Sum).unwrap();
            #[expect(clippy::mem_forget, reason = "what this test is about")]
            std::mem::forget(work);
            values.fill(5.0);
            // More than there are slots: the forgotten one's is needed.
            for _ in 0..40 {
                let mut more = [1.0_f32; 3];
                group.all_reduce(&mut more[..], Sum).unwrap().wait().unwrap();
                assert_eq!(more, [3.0; 3]);
            }
            assert!(values.iter().all(|value| *value == 5.0));
        }
    });
}
