//! Collectives in different orders on different ranks: never a hang, never a result that is not that of the order
//! which all ranks have in common. Every case is made anew from its number, so a failure names its case.
#![expect(clippy::unwrap_used, reason = "tests: a failure is a panic")]

use std::time::{Duration, Instant};

use phalanx_comm::environment::HostLink;
use phalanx_comm::testing::run_ranks_with;
use phalanx_comm::{Error, Group, GroupOptions, Max, Sum, Work};

const WORLD: usize = 3;
/// What a case may take: its ranks' mismatch is seen at once, so this is mostly for the threads to get a core.
const CASE_MAX: Duration = Duration::from_secs(10);

/// A generator of our own: the cases are the same everywhere. Source: `SplitMix64` (Steele, Lea, Flood).
struct Random(u64);

impl Random {
    fn next(&mut self, below: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        usize::try_from((mixed ^ (mixed >> 31)) % below as u64).unwrap()
    }
}

/// Kinds of collectives of which several have the same shape: only their names and kinds tell them apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Sum,
    Max,
    Broadcast,
    Gather,
    Barrier,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Call {
    kind: Kind,
    len: usize,
    /// Its name, and what makes its values differ from those of other calls.
    number: usize,
}

/// What a case is: each rank's order.
fn case(number: u64) -> Vec<Vec<Call>> {
    let mut random = Random(number);
    let count = 2 + random.next(6);
    let kinds = [Kind::Sum, Kind::Sum, Kind::Max, Kind::Broadcast, Kind::Gather, Kind::Barrier];
    // Few lengths, so that calls in the wrong order fit each other; the last is more than a slot holds.
    let lens = [8, 8, 64, 3000];
    let calls: Vec<Call> = (0..count)
        .map(|name| Call { kind: kinds[random.next(6)], len: lens[random.next(4)], number: name })
        .collect();
    let mut orders = vec![calls; WORLD];
    for order in &mut orders {
        // A third of the ranks keep the order; the others have two calls exchanged, or one left out.
        match random.next(6) {
            0 | 1 => {}
            2 => drop(order.remove(random.next(count))),
            _ => order.swap(random.next(count), random.next(count)),
        }
    }
    orders
}

fn value(rank: usize, call: Call, index: usize) -> i32 {
    i32::try_from(rank * 1000 + call.number * 17 + index % 7).unwrap()
}

fn expected(rank: usize, call: Call, index: usize) -> i32 {
    let all = |at| (0..WORLD).map(move |peer| value(peer, call, at));
    match call.kind {
        Kind::Sum => all(index).sum(),
        Kind::Max => all(index).max().unwrap(),
        Kind::Broadcast => value(0, call, index),
        Kind::Gather => value(index / call.len, call, index % call.len),
        Kind::Barrier => value(rank, call, index),
    }
}

/// Runs a rank's order; how many calls ended well, and what the first other one said.
fn run(group: &mut Group, order: &[Call]) -> (usize, Option<Error>) {
    let rank = group.rank();
    for (done, call) in order.iter().enumerate() {
        let mine: Vec<i32> = (0..call.len).map(|index| value(rank, *call, index)).collect();
        let mut buffer =
            if call.kind == Kind::Gather { vec![-1; call.len * WORLD] } else { mine.clone() };
        let before = buffer.clone();
        group.tagged(&format!("call {}", call.number));
        let work = match call.kind {
            Kind::Sum => group.all_reduce(&mut buffer[..], Sum),
            Kind::Max => group.all_reduce(&mut buffer[..], Max),
            Kind::Broadcast => group.broadcast(&mut buffer[..], 0),
            Kind::Gather => group.all_gather(&mine, &mut buffer[..]),
            Kind::Barrier => group.barrier(),
        };
        if let Err(error) = work.and_then(Work::wait) {
            assert_eq!(buffer, before, "{call:?}: memory changed though it failed");
            return (done, Some(error));
        }
        let right = (0..buffer.len()).map(|index| expected(rank, *call, index));
        assert!(buffer.iter().copied().eq(right), "{call:?}: a wrong result that nobody noticed");
    }
    (order.len(), None)
}

fn check(number: u64) {
    let orders = case(number);
    let link = if number.is_multiple_of(8) { HostLink::Tcp } else { HostLink::Auto };
    let start = Instant::now();
    let ranks = orders.clone();
    let options = GroupOptions::default().with_timeout(CASE_MAX);
    let ended = run_ranks_with(WORLD, link, options, move |mut group| {
        let order = &ranks[group.rank()];
        run(&mut group, order)
    });
    let elapsed = start.elapsed();
    assert!(elapsed < CASE_MAX, "case {number}: {elapsed:?}: {orders:?}");
    let same =
        |place: &usize| orders.iter().all(|order| order.get(*place) == orders[0].get(*place));
    let longest = orders.iter().map(Vec::len).max().unwrap();
    let common = (0..longest).take_while(same).count();
    for (rank, (done, error)) in ended.iter().enumerate() {
        // Whoever has nothing left to call when the others differ ends well.
        let all = orders[rank].len();
        assert!(*done <= common.min(all), "case {number}: rank {rank} went too far: {orders:?}");
        assert_eq!(error.is_none(), *done == all, "case {number}: rank {rank}: {error:?}");
        let known = matches!(error, None | Some(Error::OutOfStep { .. } | Error::PeerLeft { .. }));
        assert!(known, "case {number}: rank {rank}: {error:?}");
    }
    let differ = common < longest;
    let failed = ended.iter().any(|(_, error)| error.is_some());
    assert_eq!(failed, differ, "case {number}: {orders:?}");
}

fn check_all(cases: std::ops::Range<u64>) {
    let differ = |number: &u64| case(*number).windows(2).any(|pair| pair[0] != pair[1]);
    assert!(cases.clone().filter(differ).count() > 10, "most cases are to differ");
    cases.for_each(check);
}

#[test]
fn ranks_in_different_orders_never_hang_and_never_get_wrong_results() {
    check_all(0..300);
}

#[test]
#[ignore = "takes minutes: the same ten thousand times"]
fn ten_thousand_permutations() {
    let start = Instant::now();
    check_all(0..10_000);
    eprintln!("10000 permutations in {:.1?}", start.elapsed());
}
