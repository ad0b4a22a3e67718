//! The collectives that move without adding, as one table: which segment of whose buffer goes where.
//! Pure.
//!
//! A buffer is in the in-place form of `call/mod.rs`: `world_size` segments where the
//! operation distinguishes them, one otherwise.

use crate::fingerprint::Op;

/// A segment that moves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Move {
    /// Which segment of the sender's buffer.
    pub(crate) source: usize,
    /// Which segment of the receiver's buffer.
    pub(crate) target: usize,
    /// Which segment of the sender's staging area holds it.
    pub(crate) staged: usize,
}

/// What `from` gives to `to` (two different ranks).
pub(crate) fn between(op: Op, root: usize, from: usize, to: usize) -> Option<Move> {
    let a_move = |source, target, staged| Some(Move { source, target, staged });
    match op {
        Op::AllGather => a_move(from, from, 0),
        Op::Broadcast if from == root => a_move(0, 0, 0),
        Op::Gather if to == root => a_move(0, from, 0),
        Op::Scatter if from == root => a_move(to, 0, to),
        Op::AllToAll => a_move(to, from, to),
        _ => None,
    }
}

/// How many segments a sender stages at a time.
pub(crate) fn staged_segments(op: Op, world_size: usize) -> usize {
    match op {
        Op::Scatter | Op::AllToAll => world_size,
        _ => 1,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Runs the table on vectors of one number per segment.
    fn run(op: Op, root: usize, buffers: &mut [Vec<u32>]) {
        let before = buffers.to_vec();
        for (from, source) in before.iter().enumerate() {
            for (to, target) in buffers.iter_mut().enumerate() {
                if from == to {
                    continue;
                }
                if let Some(moved) = between(op, root, from, to) {
                    target[moved.target] = source[moved.source];
                    assert!(moved.staged < staged_segments(op, before.len()));
                }
            }
        }
    }

    #[test]
    fn all_gather_and_all_to_all_fill_every_segment() {
        let mut buffers = vec![vec![10, 0, 0], vec![0, 11, 0], vec![0, 0, 12]];
        run(Op::AllGather, 0, &mut buffers);
        assert!(buffers.iter().all(|buffer| *buffer == [10, 11, 12]));
        let mut exchanged = vec![vec![0, 1, 2], vec![10, 11, 12], vec![20, 21, 22]];
        run(Op::AllToAll, 0, &mut exchanged);
        assert_eq!(exchanged, [[0, 10, 20], [1, 11, 21], [2, 12, 22]]);
    }

    #[test]
    fn rooted_ones_move_only_from_or_to_the_root() {
        let mut equal = vec![vec![1], vec![2], vec![3]];
        run(Op::Broadcast, 1, &mut equal);
        assert_eq!(equal, [[2], [2], [2]]);
        let mut gathered = vec![vec![7], vec![0, 8, 0], vec![9]];
        run(Op::Gather, 1, &mut gathered);
        assert_eq!(gathered[1], [7, 8, 9]);
        let mut scattered = vec![vec![0], vec![7, 8, 9], vec![0]];
        run(Op::Scatter, 1, &mut scattered);
        assert_eq!((scattered[0][0], scattered[2][0]), (7, 9));
    }
}
