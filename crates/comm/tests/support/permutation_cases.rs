//! Collectives in different orders on different ranks: the cases, each made from its number, and what is right.
#![allow(dead_code, reason = "each test uses its part")]

use phalanx_comm::{Error, Group, Max, Sum, Work};

/// How many ranks a case has.
pub(crate) const WORLD: usize = 3;
/// How many elements the longest call has.
pub(crate) const LEN_MAX: usize = 3000;

/// A generator of our own: the cases are the same everywhere. Source: `SplitMix64` (Steele, Lea, Flood).
struct Random(u64);

impl Random {
    fn next(&mut self, below: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        usize::try_from((mixed ^ (mixed >> 31)) % below as u64).expect("small numbers")
    }
}

/// Kinds of collectives of which several have the same shape: only their names and kinds tell them apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    Sum,
    Max,
    Broadcast,
    Gather,
    Barrier,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Call {
    pub(crate) kind: Kind,
    pub(crate) len: usize,
    /// Its name, and what makes its values differ from those of other calls.
    pub(crate) number: usize,
}

/// What a case is: each rank's order.
pub(crate) fn case(number: u64) -> Vec<Vec<Call>> {
    let mut random = Random(number);
    let count = 2 + random.next(6);
    let kinds = [Kind::Sum, Kind::Sum, Kind::Max, Kind::Broadcast, Kind::Gather, Kind::Barrier];
    // Few lengths, so that calls in the wrong order fit each other; the last is more than a slot holds.
    let lens = [8, 8, 64, LEN_MAX];
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

pub(crate) fn value(rank: usize, call: Call, index: usize) -> i32 {
    i32::try_from(rank * 1000 + call.number * 17 + index % 7).expect("small numbers")
}

pub(crate) fn expected(rank: usize, call: Call, index: usize) -> i32 {
    let all = |at| (0..WORLD).map(move |peer| value(peer, call, at));
    match call.kind {
        Kind::Sum => all(index).sum(),
        Kind::Max => all(index).max().expect("small numbers"),
        Kind::Broadcast => value(0, call, index),
        Kind::Gather => value(index / call.len, call, index % call.len),
        Kind::Barrier => value(rank, call, index),
    }
}

/// How many calls all ranks have in common before the first that differs.
pub(crate) fn common(orders: &[Vec<Call>]) -> usize {
    let same =
        |place: &usize| orders.iter().all(|order| order.get(*place) == orders[0].get(*place));
    (0..longest(orders)).take_while(same).count()
}

/// How many calls the longest order has.
pub(crate) fn longest(orders: &[Vec<Call>]) -> usize {
    orders.iter().map(Vec::len).max().unwrap_or(0)
}

/// Runs a rank's order; how many calls ended well, and what the first other one said.
pub(crate) fn run(group: &mut Group, order: &[Call]) -> (usize, Option<Error>) {
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
