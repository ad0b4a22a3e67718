//! Interleaved 1F1B: each rank has v chunks of the model, 1/v as large, so that the pipeline fills v times as fast.
//!
//! Micro-batches go in rounds of p: p through the first chunk, the same p through the second, …, and backward through the chunks from the last to the first. Before
//! its first backward pass rank r is 2(p − r − 1) + (v − 1)p forward passes ahead: the way through all other chunks, and there and back again to the last rank.
//!
//! Idle: (p − 1)(forward + backward) of a *chunk*, thus 1/v of 1F1B's. Activations kept on rank r: min(2(p − r − 1) + (v − 1)p + 1, m v) chunks'; on rank 0 that is 1 + (p − 1)/(p v) times
//! what 1F1B keeps. m must be a multiple of p.
//!
//! # Source
//!
//! Narayanan et al. 2021, "Efficient Large-Scale Language Model Training on GPU Clusters Using Megatron-LM", section 2.2.2 and figure 4; memory: Korthikanti et al. 2022, "Reducing
//! Activation Recomputation in Large Transformer Models", section 4.2.3.

use super::{one_f_one_b, Order, Part, Pass};

pub(super) fn order(p: usize, m: usize, v: usize, rank: usize) -> Order {
    let forward = |at| (Pass::Forward, nth(p, v, at));
    let backward = |at| {
        let part = nth(p, v, at);
        (Pass::Backward, Part { chunk: v - 1 - part.chunk, ..part })
    };
    one_f_one_b::alternating(m * v, ahead(p, m, v, rank), forward, backward)
}

/// How many forward passes a rank does before the one that its first backward pass follows.
pub(super) fn ahead(p: usize, m: usize, v: usize, rank: usize) -> usize {
    (2 * p.saturating_sub(rank + 1) + v.saturating_sub(1) * p).min(m * v)
}

/// The `at`-th pass, chunks counted from where it begins.
const fn nth(p: usize, v: usize, at: usize) -> Part {
    let (round, left) = (at / (p * v), at % (p * v));
    Part { micro_batch: round * p + left % p, chunk: left / p }
}
