//! ZB-H1: 1F1B whose backward pass is two, so that gradients of weights, for which nobody waits, fill what would be idle.
//!
//! Gradients of inputs come as early as they can. Rank r puts off those of weights by r micro-batches: a rank further back has its first gradient sooner, and has so many left for the end, when
//! ranks before it still wait for gradients.
//!
//! Idle, for m ≥ p and weights that take no longer than the other two: (p − 1)(forward + input − weight). Activations kept on every rank: min(p, m), which is 1F1B's on rank 0; it keeps fewer on
//! the others.
//!
//! # Source
//!
//! Qi et al. 2023, "Zero Bubble Pipeline Parallelism", section 2.1 on handcrafted schedules, and its table of their bubbles and memory.

use super::{Order, Part, Pass};

pub(super) fn order(p: usize, m: usize, rank: usize) -> Order {
    let of = |pass, micro_batch| (pass, Part { micro_batch, chunk: 0 });
    let ahead = (p - rank).min(m);
    let mut order: Order = (0..ahead).map(|at| of(Pass::Forward, at)).collect();
    for at in 0..m {
        order.push(of(Pass::BackwardInput, at));
        order.extend((at >= rank).then(|| of(Pass::BackwardWeight, at - rank)));
        order.extend((ahead + at < m).then(|| of(Pass::Forward, ahead + at)));
    }
    order.extend((m.saturating_sub(rank)..m).map(|at| of(Pass::BackwardWeight, at)));
    order
}
