//! GPipe: all micro-batches forward, then all backward.
//!
//! Idle: (p − 1)(forward + backward). Activations kept: m.
//!
//! The paper's figure 2 goes backward through the micro-batches from the last to the first. Here it is from the first to the last, which takes
//! as long, so that gradients add up as in one process.
//!
//! # Source
//!
//! Huang et al. 2019, "GPipe: Efficient Training of Giant Neural Networks using Pipeline Parallelism", figure 2 (c) and section 2.3.

use super::{Order, Part, Pass};

pub(super) fn order(m: usize) -> Order {
    let all = |pass| (0..m).map(move |micro_batch| (pass, Part { micro_batch, chunk: 0 }));
    all(Pass::Forward).chain(all(Pass::Backward)).collect()
}
