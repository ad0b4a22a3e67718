//! Wrong calls: every rank gets an error that shows both sides, and no memory changes.

use std::time::{Duration, Instant};

use phalanx_comm::environment::HostLink;
use phalanx_comm::testing::{run_ranks, run_ranks_with};
use phalanx_comm::{Avg, Error, Group, GroupOptions, LastCall, Max, Op, Sum, Work};

const LINKS: [HostLink; 2] = [HostLink::Auto, HostLink::Tcp];

/// What rank 1 (`true`) calls differs from what the others call.
type Call = fn(&mut Group, &mut [f32], bool) -> Error;

/// Rank 1 calls something else; everybody must see the two calls, before any time is over, with their memory as it was.
fn differs(mut group: Group, call: Call, len: usize) {
    let mut values = vec![1.0; len];
    let odd = group.rank() == 1;
    let error = call(&mut group, &mut values, odd);
    assert!(values.iter().all(|value| *value == 1.0), "memory changed");
    let again = group.barrier().map(drop).unwrap_err();
    assert_eq!(again.to_string(), error.to_string(), "later calls give the first error");
    let Error::OutOfStep { seq, rank, ours, peer, theirs } = &error else { panic!("{error}") };
    assert_eq!((*seq, *seq), (ours.seq, theirs.seq));
    assert!((*rank == 1) != (*peer == 1), "{error}");
    assert_ne!(ours, theirs, "{error}");
}

/// Every such call, on groups like this one.
pub(crate) fn all_differ(mut group: Group) {
    if group.world_size() == 1 {
        return;
    }
    for call in CALLS {
        for len in [8, 100_000] {
            differs(group.duplicate().unwrap(), call, len);
        }
    }
}

fn differs_on_threads(call: Call) {
    for link in LINKS {
        for len in [8, 100_000] {
            run_ranks_with(3, link, GroupOptions::default(), move |group| {
                differs(group, call, len);
            });
        }
    }
}

const CALLS: [Call; 7] = [
    with_another_length,
    with_another_reduction,
    with_another_collective,
    with_another_root,
    with_another_type,
    with_another_tag,
    with_another_end_of_a_long_tag,
];

fn with_another_length(group: &mut Group, values: &mut [f32], odd: bool) -> Error {
    let len = values.len() - usize::from(odd);
    group.all_reduce(&mut values[..len], Sum).and_then(Work::wait).unwrap_err()
}

fn with_another_reduction(group: &mut Group, values: &mut [f32], odd: bool) -> Error {
    if odd {
        group.all_reduce(&mut values[..], Max).and_then(Work::wait).unwrap_err()
    } else {
        group.all_reduce(&mut values[..], Sum).and_then(Work::wait).unwrap_err()
    }
}

fn with_another_collective(group: &mut Group, values: &mut [f32], odd: bool) -> Error {
    if odd {
        group.broadcast(&mut values[..], 0).and_then(Work::wait).unwrap_err()
    } else {
        group.all_reduce(&mut values[..], Sum).and_then(Work::wait).unwrap_err()
    }
}

fn with_another_root(group: &mut Group, values: &mut [f32], odd: bool) -> Error {
    let root = usize::from(odd);
    group.broadcast(&mut values[..], root).and_then(Work::wait).unwrap_err()
}

fn with_another_type(group: &mut Group, values: &mut [f32], odd: bool) -> Error {
    if odd {
        let words: &mut [i32] = bytemuck::cast_slice_mut(&mut values[..]);
        group.all_reduce(words, Sum).and_then(Work::wait).unwrap_err()
    } else {
        group.all_reduce(&mut values[..], Sum).and_then(Work::wait).unwrap_err()
    }
}

/// Every rank is told what rank 1 called, what one of the others called, and by whom.
fn with_tags(group: &mut Group, values: &mut [f32], tag: &str, said: [&str; 2]) -> Error {
    let work = group.tagged(tag).all_reduce(&mut values[..], Sum);
    let error = work.and_then(Work::wait).unwrap_err();
    let Error::OutOfStep { rank, ours, peer, theirs, .. } = &error else { panic!("{error}") };
    for (rank, call) in [(rank, ours), (peer, theirs)] {
        assert_eq!(call.tag, said[usize::from(*rank == 1)], "{error}");
        assert!(error.to_string().contains(&format!("rank {rank} called {call}")), "{error}");
    }
    error
}

fn with_another_tag(group: &mut Group, values: &mut [f32], odd: bool) -> Error {
    let tags = ["step 57, bucket 0", "step 58, bucket 0"];
    with_tags(group, values, tags[usize::from(odd)], tags)
}

fn with_another_end_of_a_long_tag(group: &mut Group, values: &mut [f32], odd: bool) -> Error {
    let tag = |bucket: u32| {
        format!("step 57 of the second epoch, gradients of the encoder, bucket {bucket}")
    };
    let said = [0, 1].map(|bucket| format!("step 57 of the second … the encoder, bucket {bucket}"));
    let said = said.each_ref().map(String::as_str);
    with_tags(group, values, &tag(u32::from(odd)), said)
}

#[test]
fn another_length() {
    differs_on_threads(with_another_length);
}

#[test]
fn another_reduction() {
    differs_on_threads(with_another_reduction);
}

#[test]
fn another_collective() {
    differs_on_threads(with_another_collective);
}

#[test]
fn another_root() {
    differs_on_threads(with_another_root);
}

#[test]
fn another_type() {
    differs_on_threads(with_another_type);
}

#[test]
fn the_same_call_in_another_order_is_told_apart_by_its_tag() {
    differs_on_threads(with_another_tag);
    differs_on_threads(with_another_end_of_a_long_tag);
}

/// Long names are cut on their way, which is no difference.
pub(crate) fn message_of_a_long_name(mut group: Group) {
    let name = "a name of more bytes than travel with a call, given to a message";
    let mut values = [0.0_f32; 4];
    match group.rank() {
        0 if group.world_size() > 1 => {
            group.tagged(name).send(&[1.0_f32; 4], 1).and_then(Work::wait).unwrap();
        }
        1 => {
            group.tagged(name).receive(&mut values[..], 0).and_then(Work::wait).unwrap();
            assert_eq!(values, [1.0; 4]);
        }
        _ => {}
    }
    group.barrier().and_then(Work::wait).unwrap();
}

#[test]
fn a_message_may_have_a_long_name() {
    for link in LINKS {
        run_ranks_with(3, link, GroupOptions::default(), message_of_a_long_name);
    }
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

/// The last rank never calls.
fn never_calls(mut group: Group) -> Error {
    let last = group.world_size() - 1;
    // The rank whose time is over first tells the others, and none starts before all have come here.
    let earliest = Instant::now();
    group.tagged("before").barrier().unwrap().wait().unwrap();
    if group.rank() == last {
        // Told by the others, not by a time-out of its own.
        while group.failure().is_none() {
            assert!(earliest.elapsed() < Duration::from_secs(60), "nobody has told");
            std::thread::yield_now();
        }
        return group.barrier().map(drop).unwrap_err();
    }
    let limit = Duration::from_secs(1);
    let mut values = [0.0_f32; 100];
    let error = group.within(limit).all_reduce(&mut values[..], Sum).and_then(Work::wait);
    assert!(earliest.elapsed() >= limit, "{:?}", earliest.elapsed());
    error.unwrap_err()
}

pub(crate) fn absent_is_named(group: Group) {
    let last = group.world_size() - 1;
    if last == 0 {
        return;
    }
    let error = never_calls(group);
    let Error::Timeout { call, absent, .. } = &error else { panic!("{error}") };
    assert_eq!(call.op, Op::AllReduce);
    assert_eq!(absent.iter().map(|a| a.rank).collect::<Vec<_>>(), [last], "{error}");
    assert!(matches!(absent[0].last, LastCall::Call(_)), "{error}");
}

#[test]
fn a_rank_that_never_calls_is_named_by_the_time_out() {
    for link in LINKS {
        let errors = run_ranks_with(3, link, GroupOptions::default(), never_calls);
        for error in errors {
            let Error::Timeout { call, absent, .. } = &error else { panic!("{error}") };
            assert_eq!((call.op, call.seq), (Op::AllReduce, 1));
            assert_eq!(absent.iter().map(|a| a.rank).collect::<Vec<_>>(), [2], "{error}");
            // Over sockets by its heartbeats.
            let LastCall::Call(last) = &absent[0].last else { panic!("{error}") };
            assert_eq!(last.tag, "before", "{error}");
        }
    }
}

pub(crate) fn abort_is_heard(mut group: Group) {
    let rank = group.rank();
    if group.world_size() == 1 {
        return;
    }
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
}

#[test]
fn an_abort_reaches_everybody() {
    for link in LINKS {
        run_ranks_with(3, link, GroupOptions::default(), abort_is_heard);
    }
}

/// The last rank leaves; the others see it in a collective with data, and in a message.
pub(crate) fn leaver_is_named(mut group: Group) {
    let last = group.world_size() - 1;
    if last == 0 {
        return;
    }
    group.barrier().unwrap().wait().unwrap();
    let mut receiving = group.duplicate().unwrap();
    if group.rank() == last {
        return;
    }
    let mut values = [0.0_f32; 100];
    let error = group.all_reduce(&mut values[..], Sum).and_then(Work::wait).unwrap_err();
    let Error::PeerLeft { peer, .. } = &error else { panic!("{error}") };
    assert_eq!(*peer, last);
    let error = receiving.receive(&mut values[..], last).and_then(Work::wait).unwrap_err();
    let Error::PeerLeft { peer, .. } = &error else { panic!("{error}") };
    assert_eq!(*peer, last);
}

#[test]
fn a_rank_that_leaves_early_is_named() {
    for link in LINKS {
        run_ranks_with(3, link, GroupOptions::default(), leaver_is_named);
    }
}

/// A receiver that expects something else than its peer sends.
pub(crate) fn message_of_another_length(mut group: Group) {
    let rank = group.rank();
    if group.world_size() == 1 {
        return;
    }
    let error = match rank {
        0 => {
            let sent = group.send(&[1.0_f32; 5], 1).and_then(Work::wait);
            sent.and_then(|()| group.barrier()).and_then(Work::wait).unwrap_err()
        }
        1 => {
            let mut values = [0.0_f32; 4];
            let error = group.receive(&mut values[..], 0).and_then(Work::wait).unwrap_err();
            assert_eq!(values, [0.0; 4]);
            error
        }
        _ => group.barrier().and_then(Work::wait).unwrap_err(),
    };
    let Error::OutOfStep { ours, theirs, .. } = &error else { panic!("{error}") };
    assert_eq!(ours.len + theirs.len, 9, "{error}");
}

#[test]
fn a_message_of_another_length_is_refused() {
    run_ranks(3, message_of_another_length);
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

pub(crate) fn forgotten_work(mut group: Group) {
    let ranks = group.world_size() as f32;
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
            assert_eq!(more, [ranks; 3]);
        }
        assert!(values.iter().all(|value| *value == 5.0));
    }
}

#[test]
fn a_forgotten_work_leaves_the_slice_alone_and_the_group_alive() {
    run_ranks(3, forgotten_work);
}

/// Lengths and times that cannot be counted are no panic, and no memory that is shorter than it says.
#[test]
fn what_cannot_be_counted_is_refused_or_bounded() {
    let longest = Duration::MAX;
    let options =
        GroupOptions { timeout: longest, connect_timeout: longest, ..GroupOptions::default() };
    let options =
        GroupOptions { heartbeat: Duration::from_millis(500), dead_after: longest, ..options };
    run_ranks_with(2, HostLink::Tcp, options, move |mut group| {
        let error = group.allocate::<f64>((1 << 61) + 1).unwrap_err();
        assert!(matches!(error, Error::LengthMismatch { .. }), "{error}");
        let error = group.allocate_on_host::<f32>(1 << 61).unwrap_err();
        assert!(matches!(error, Error::LengthMismatch { .. }), "{error}");
        let region = group.allocate::<f32>(100_000).unwrap();
        region.write(0, &vec![1.0; 100_000]);
        group.within(longest).all_reduce(region.full(), Sum).and_then(Work::wait).unwrap();
        assert_eq!(region.read(0..2), [2.0, 2.0]);
        group.barrier().and_then(Work::wait).unwrap();
    });
}

/// What belongs to another group is not touched before it is refused.
#[test]
fn a_region_of_another_group_stays_as_it_is() {
    run_ranks(2, |mut group| {
        let mut other = group.duplicate().unwrap();
        let theirs = other.allocate::<f32>(8).unwrap();
        theirs.write(0, &[3.0; 8]);
        let error = group.all_gather(&[1.0_f32; 4], theirs.full()).map(drop).unwrap_err();
        assert!(matches!(error, Error::ForeignRegion { .. }), "{error}");
        assert_eq!(theirs.read(0..8), [3.0; 8]);
        group.barrier().and_then(Work::wait).unwrap();
    });
}
