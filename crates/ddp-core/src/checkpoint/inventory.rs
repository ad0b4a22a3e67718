//! What ranks find in their memory after a restart, and which snapshot of it is whole. Pure.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// A share that a rank has, its bytes compared with their checksums.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Entry {
    pub(super) step: u64,
    pub(super) nonce: u64,
    /// Whose share it is, in the world that it was made in.
    pub(super) of_rank: usize,
    /// Of that world.
    pub(super) world_size: usize,
    /// Where it is in the memory of the rank that has it.
    pub(super) slot: usize,
    pub(super) bytes: u64,
}

/// A snapshot of which every share is with some rank.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Whole {
    pub(super) step: u64,
    pub(super) nonce: u64,
    /// By rank of the world that it was made in: everyone who has the share now, and what it is there.
    pub(super) shares: Vec<Vec<(usize, Entry)>>,
}

/// The way of a share to where it is missing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Route {
    /// Who has it, and what it is there.
    pub(super) sender: usize,
    pub(super) entry: Entry,
    /// The first rank of each memory in which no rank has it.
    pub(super) receivers: Vec<usize>,
}

/// How a share gets from its `holders`, of which there are some, to all memories, when rank `r` sees `memories[r]`.
pub(super) fn route(holders: &[(usize, Entry)], memories: &[u64]) -> Route {
    let (sender, entry) = holders[0];
    let has = |memory: u64| holders.iter().any(|(holder, _)| memories[*holder] == memory);
    let is_first = |rank: usize| !memories[..rank].contains(&memories[rank]);
    let lacks = |&rank: &usize| is_first(rank) && !has(memories[rank]);
    Route { sender, entry, receivers: (0..memories.len()).filter(lacks).collect() }
}

/// The newest snapshot that is whole, when rank `r` has `told[r]`. All ranks come to the same.
pub(super) fn newest_whole(told: &[Vec<Entry>]) -> Option<Whole> {
    by_snapshot(told).into_iter().rev().find_map(|((step, nonce, world_size), found)| {
        let is_whole = world_size > 0 && found.keys().copied().eq(0..world_size);
        is_whole.then(|| Whole { step, nonce, shares: found.into_values().collect() })
    })
}

/// A line about each snapshot of which shares are missing; none where there is nothing.
pub(super) fn incomplete(told: &[Vec<Entry>]) -> Vec<String> {
    let of_snapshot = |((step, _, world_size), found): ((u64, u64, usize), Shares)| {
        let (there, ranks) = (found.len(), if world_size == 1 { "rank" } else { "ranks" });
        (there < world_size)
            .then(|| format!("step {step}: {there} of {world_size} {ranks}' shares are there"))
    };
    by_snapshot(told).into_iter().filter_map(of_snapshot).collect()
}

/// Who has each rank's share.
type Shares = BTreeMap<usize, Vec<(usize, Entry)>>;

/// The shares of each snapshot: step, nonce, world size.
fn by_snapshot(told: &[Vec<Entry>]) -> BTreeMap<(u64, u64, usize), Shares> {
    let mut snapshots = BTreeMap::<_, Shares>::new();
    for (holder, entries) in told.iter().enumerate() {
        for entry in entries {
            let snapshot = snapshots.entry((entry.step, entry.nonce, entry.world_size));
            snapshot.or_default().entry(entry.of_rank).or_default().push((holder, *entry));
        }
    }
    snapshots
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry((step, nonce): (u64, u64), of_rank: usize, slot: usize) -> Entry {
        Entry { step, nonce, of_rank, world_size: 3, slot, bytes: 8 }
    }

    /// The first holder of each share.
    fn holders(told: &[Vec<Entry>]) -> Option<(u64, Vec<usize>)> {
        let whole = newest_whole(told)?;
        Some((whole.step, whole.shares.iter().map(|holders| holders[0].0).collect()))
    }

    #[test]
    fn a_share_goes_once_to_every_memory_that_lacks_it() {
        let held = |by: &[usize]| by.iter().map(|&rank| (rank, entry((6, 1), 0, 5))).collect();
        let receivers = |by: &[usize], memories: &[u64]| {
            let holders: Vec<_> = held(by);
            let route = route(&holders, memories);
            assert_eq!((route.sender, route.entry.slot), (by[0], 5));
            route.receivers
        };
        assert!(receivers(&[1], &[7, 7, 7]).is_empty());
        assert_eq!(receivers(&[1], &[7, 7, 8, 8]), [2]);
        assert!(receivers(&[1, 3], &[7, 7, 8, 8]).is_empty());
        assert_eq!(receivers(&[5], &[7, 8, 7, 8, 9, 9]), [0, 1]);
    }

    #[test]
    fn the_newest_snapshot_that_is_whole_is_taken_from_whoever_has_it() {
        let (old, new) = ((4, 9), (6, 2));
        let of = |rank| vec![entry(old, rank, 0), entry(new, rank, 1)];
        assert_eq!(holders(&[of(0), of(1), of(2)]), Some((6, vec![0, 1, 2])));
        // Rank 1 died while it wrote: the former counts, and the newer is named.
        let torn = [of(0), vec![entry(old, 1, 0)], of(2)];
        assert_eq!(holders(&torn), Some((4, vec![0, 1, 2])));
        assert_eq!(incomplete(&torn), ["step 6: 2 of 3 ranks' shares are there"]);
        // Rank 1 is lost with its memory, and two ranks are left, the second of which has its share.
        let lost = [of(0), [of(2), vec![entry(new, 1, 3)]].concat()];
        assert_eq!(holders(&lost), Some((6, vec![0, 1, 1])));
        assert_eq!(holders(&[Vec::new(), Vec::new()]), None);
        assert!(incomplete(&[Vec::new()]).is_empty());
    }

    #[test]
    fn shares_of_two_attempts_at_one_step_are_no_snapshot() {
        let told = [vec![entry((6, 1), 0, 0), entry((6, 1), 1, 2)], vec![entry((6, 2), 2, 0)]];
        assert_eq!(newest_whole(&told), None);
        assert_eq!(incomplete(&told).len(), 2);
    }
}
