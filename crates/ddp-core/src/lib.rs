//! Data-parallel training on libtorch: [`Ddp`] makes plain tch training data-parallel.
//!
//! Gradients are views of flat buckets in memory that the process group registered. Hooks on autograd start
//! a bucket's all-reduce as soon as it and all before it are full, while backward goes on; the end of the
//! same backward waits for what is left. [`optim::Optimizer`] updates the flat storage, with its state
//! sharded if wanted ([`Zero::One`]).
//!
//! The reading order is `store` (what lies where), `reduce` (how gradients travel), `shard` (who holds what),
//! [`Ddp`], [`optim`]; `shim/README.md` has the rules of the C++ boundary.

pub mod amp;
pub mod autograd;
pub mod checkpoint;
pub mod collective;
mod cut;
mod ddp;
mod device;
pub mod diloco;
mod error;
pub mod feed;
mod heap;
pub mod hooks;
mod join;
pub mod optim;
mod options;
mod part;
pub mod recompute;
mod reduce;
pub mod schedule;
mod shard;
mod shim;
mod store;
mod sync_batch_norm;
mod threads;
mod weigh;

pub use cut::Cut;
pub use ddp::{Building, Ddp};
pub use device::{load_cuda, Cuda};
pub use error::{Error, Result};
pub use join::Join;
pub use optim::{
    Adafactor, Adam, AdamW, Clip, Ema, Lamb, Lars, Lion, Muon, Optimizer, ParameterGroup,
    ParameterGroups, Sgd, Step,
};
pub use options::{Buffers, DdpOptions, NonFinite, SparseGradients, Sync, Zero};
pub use part::ModelPart;
pub use reduce::statistics::{Phase, RankTimes, Statistics, Straggler};
pub use store::plan;
pub use store::Memory;
pub use sync_batch_norm::{SyncBatchNorm, SyncBatchNormConfig, SyncGroup};
