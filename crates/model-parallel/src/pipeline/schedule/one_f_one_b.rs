//! 1F1B: a rank goes backward as soon as it can, and lets a new micro-batch in for each that has left.
//!
//! Idle: (p − 1)(forward + backward), as GPipe. Activations kept on rank r: min(p − r, m).
//!
//! # Source
//!
//! PipeDream-Flush: Narayanan et al. 2021, "Memory-Efficient Pipeline-Parallel DNN Training", section 3.2; Narayanan et al. 2021, "Efficient Large-Scale Language Model Training on GPU Clusters
//! Using Megatron-LM", section 2.2.1.

use super::{Order, Part, Pass};

pub(super) fn order(p: usize, m: usize, rank: usize) -> Order {
    let ahead = (p - rank - 1).min(m);
    let forward = |micro_batch| (Pass::Forward, Part { micro_batch, chunk: 0 });
    let backward = |micro_batch| (Pass::Backward, Part { micro_batch, chunk: 0 });
    alternating(m, ahead, forward, backward)
}

/// `ahead` of `count` forwards, then backwards and forwards in turn, forward first, and the backwards that are left.
pub(super) fn alternating(
    count: usize,
    ahead: usize,
    forward: impl Fn(usize) -> (Pass, Part),
    backward: impl Fn(usize) -> (Pass, Part),
) -> Order {
    let mut order: Order = (0..ahead).map(&forward).collect();
    for at in 0..count {
        order.extend((ahead + at < count).then(|| forward(ahead + at)));
        order.push(backward(at));
    }
    order
}
