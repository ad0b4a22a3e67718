//! Data-parallel training on libtorch: [`Ddp`] makes plain tch training data-parallel.
//!
//! Gradients are views of flat buckets in memory that the process group registered. Hooks on autograd start
//! a bucket's all-reduce as soon as it and all before it are full, while backward goes on; the end of the
//! same backward waits for what is left. [`optim::Optimizer`] updates the flat storage, with its state
//! sharded if wanted ([`Zero::One`]).
//!
//! The reading order is [`plan`], [`ready`], `flat`, `reducer`, [`Ddp`], [`optim`]; `shim/README.md` has the
//! rules of the C++ boundary.

pub mod amp;
mod broadcast;
pub mod checkpoint;
mod ddp;
mod device;
mod error;
pub mod feed;
mod ffi;
mod flat;
pub mod optim;
mod parameter;
pub mod plan;
pub mod ready;
mod reducer;
pub mod schedule;
mod shim;
// `Ddp::new` calls `threads::share(group)` once.
#[cfg_attr(not(test), expect(dead_code, reason = "Ddp::new has yet to call it"))]
mod threads;
mod verify;

pub use ddp::{Ddp, DdpOptions, Sync, Zero};
pub use device::{load_cuda, Cuda};
pub use error::{Error, Result};
pub use optim::{AdamW, Lamb, Optimizer, OptimizerConfig};
pub use reducer::StepTimes;
