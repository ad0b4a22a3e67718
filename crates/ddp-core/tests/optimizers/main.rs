//! The optimizers: their bits in every stage of sharding, their formulas, clipping, averages of weights.

#![allow(clippy::cast_possible_wrap, clippy::cast_precision_loss, reason = "small numbers")]
#![allow(clippy::cast_possible_truncation, reason = "what is compared is f32")]
#![allow(clippy::cast_sign_loss, reason = "counts of steps")]
#![allow(
    clippy::unwrap_used,
    clippy::shadow_unrelated,
    reason = "a failed unwrap is a failed test"
)]

mod averages;
mod clipping;
mod formulas;
mod matrices;
mod stages;
#[path = "../support/mod.rs"]
mod support;
