//! Which sample comes when, and which rank computes it.
//!
//! Here belong pure functions of how much data there is, seed and position: no file, no thread, no
//! clock. What they say is the same on every rank, and frozen by versions, because saved states and
//! fingerprints refer to it.

pub(crate) mod blocks;
mod hash;
pub(crate) mod mixing;
mod options;
pub mod permutation;
mod quality;
pub(crate) mod sampler;
pub(crate) mod slice;
mod weight_tree;

pub use mixing::MixtureComponent;
pub use options::{Order, Tail};
pub use quality::Quality;
pub use sampler::{Position, Sample};
pub use slice::MicroBatch;
