//! Which queries of a rank meet which keys of another: pure.

use std::ops::Range;

/// Which tokens of a sequence each of n ranks has.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Order {
    /// Of 2n equal chunks rank r has the r-th and the r-th from the end, so that a causal mask leaves all ranks as much to compute.
    #[default]
    Balanced,
    /// Of n equal chunks rank r has the r-th. With a causal mask and a ring the last rank computes for all of them.
    Consecutive,
}

/// A part of a rank's attention, in chunks of its own tokens and of another rank's.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Piece {
    pub(super) queries: Range<i64>,
    pub(super) keys: Range<i64>,
    /// Whether each query meets the keys up to its own place alone; else it meets all.
    pub(super) is_causal: bool,
}

impl Order {
    /// How many chunks a rank has.
    pub(super) fn chunks_each(self) -> i64 {
        match self {
            Self::Balanced => 2,
            Self::Consecutive => 1,
        }
    }

    /// A rank's chunks, in the order in which it has them, which is that of the sequence.
    pub(super) fn chunks(self, rank: i64, ranks: i64) -> Vec<i64> {
        match self {
            Self::Balanced => vec![rank, 2 * ranks - 1 - rank],
            Self::Consecutive => vec![rank],
        }
    }

    /// What `rank` computes with the keys of `owner`.
    pub(super) fn pieces(
        self,
        (rank, owner): (i64, i64),
        ranks: i64,
        is_causal: bool,
    ) -> Vec<Piece> {
        let each = self.chunks_each();
        if rank == owner || !is_causal {
            return vec![Piece { queries: 0..each, keys: 0..each, is_causal }];
        }
        let theirs = self.chunks(owner, ranks);
        let mut pieces: Vec<Piece> = Vec::new();
        for (at, chunk) in (0..).zip(self.chunks(rank, ranks)) {
            // Chunks are in the order of the sequence: what is before this one comes first.
            let before = theirs.iter().filter(|&&other| other < chunk).count();
            let keys = 0..i64::try_from(before).unwrap_or(0);
            match pieces.last_mut() {
                Some(last) if last.keys == keys => last.queries.end = at + 1,
                _ => pieces.push(Piece { queries: at..at + 1, keys, is_causal: false }),
            }
        }
        pieces.retain(|piece| !piece.keys.is_empty());
        pieces
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every pair of tokens that the mask lets meet is in one piece, no other is, and balanced ranks have as many.
    #[test]
    fn pieces_are_the_mask() {
        for order in [Order::Balanced, Order::Consecutive] {
            for ranks in 1..=6 {
                for is_causal in [false, true] {
                    let mut work = Vec::new();
                    for rank in 0..ranks {
                        let mine = order.chunks(rank, ranks);
                        let mut count = 0;
                        for owner in 0..ranks {
                            let pieces = order.pieces((rank, owner), ranks, is_causal);
                            let met = |query: i64, key: i64| -> usize {
                                let meets = |piece: &&Piece| {
                                    piece.queries.contains(&query)
                                        && piece.keys.contains(&key)
                                        && (!piece.is_causal || key <= query)
                                };
                                pieces.iter().filter(meets).count()
                            };
                            let theirs = order.chunks(owner, ranks);
                            for (query, chunk) in (0..).zip(&mine) {
                                for (key, other) in (0..).zip(&theirs) {
                                    let expected = usize::from(!is_causal || other <= chunk);
                                    assert_eq!(met(query, key), expected);
                                    // A chunk with itself is half a square.
                                    count += expected * if other == chunk { 1 } else { 2 };
                                }
                            }
                        }
                        work.push(count);
                    }
                    let is_even = work.iter().all(|count| *count == work[0]);
                    assert_eq!(is_even, !is_causal || order == Order::Balanced || ranks == 1);
                }
            }
        }
    }

    #[test]
    fn ranks_have_all_chunks_once() {
        for order in [Order::Balanced, Order::Consecutive] {
            for ranks in 1..=6 {
                let mut all: Vec<i64> =
                    (0..ranks).flat_map(|rank| order.chunks(rank, ranks)).collect();
                all.sort_unstable();
                assert_eq!(all, (0..ranks * order.chunks_each()).collect::<Vec<_>>());
            }
        }
    }
}
