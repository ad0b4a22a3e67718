//! Pipelines on ranks that are threads: bits of one process, agreement, tied weights, what fails, and how layers are cut into stages.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a failed unwrap is a failed test")]
#![allow(clippy::cast_possible_wrap, clippy::cast_precision_loss, reason = "small numbers")]

mod agreement;
mod failures;
mod model;
mod parity;
mod partition;
mod tied;
