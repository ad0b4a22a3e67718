//! Layers of tensor and sequence parallelism against plain tch on one rank.
//!
//! Everything is in f64, so that the order of sums can be told from a mistake: see [`support::close`].

#![allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]
#![allow(clippy::shadow_unrelated, reason = "x, y and their gradients go from layer to layer")]
#![allow(clippy::cast_precision_loss, reason = "ranks and columns are few")]

mod autocast;
mod chunks;
mod dropout;
mod layers;
mod model;
mod parity;
mod plain;
mod recomputed;
mod support;
