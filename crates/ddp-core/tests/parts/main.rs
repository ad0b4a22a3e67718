//! A model whose parts are on several ranks, by hand: blocks of two matrices that are cut over `tp`, stages over `pp`, an embedding that is on
//! both stages, and a `Ddp` over `dp`.

#![allow(clippy::cast_possible_wrap, clippy::cast_precision_loss, reason = "small numbers")]
#![allow(
    clippy::unwrap_used,
    clippy::shadow_unrelated,
    clippy::single_range_in_vec_init,
    reason = "a failed unwrap is a failed test; cuts have ranges"
)]

mod checkpoints;
mod model;
mod norms;
mod refusals;
mod skipping;
mod weights;
