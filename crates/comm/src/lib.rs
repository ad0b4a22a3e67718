//! Process groups and collectives: ranks that march in step.
//!
//! A [`Group`] connects the ranks that a launcher started. Its collectives are typed, non-blocking
//! and reduce in rank order (but for NCCL), so every rank, every run and every placement gives the same bits.
//!
//! ```
//! use phalanx_comm::{Group, GroupOptions, Sum};
//!
//! # fn main() -> Result<(), phalanx_comm::Error> {
//! # let mut group = Group::single(GroupOptions::default())?; // doctests have no launcher
//! # #[cfg(any())]
//! let mut group = Group::from_environment(GroupOptions::default())?;
//! let mut values = vec![group.rank() as f32; 4];
//! group.all_reduce(&mut values[..], Sum)?.wait()?;
//! assert_eq!(values, [0.0; 4]); // with 4 ranks: 0 + 1 + 2 + 3 = [6.0; 4]
//! # Ok(())
//! # }
//! ```
//!
//! When not to use this crate: inside one process threads and channels are simpler; for messages
//! whose pattern is not known beforehand MPI has more to offer.

mod algorithm;
mod backend;
mod call;
mod checksum;
mod control;
mod deadline;
mod dtype;
mod error;
mod fingerprint;
mod gpu;
mod group;
mod kernel;
mod lane;
mod mark;
mod memory;
mod order;
pub mod recorder;
mod reduce_op;
mod region;
pub mod slots;
#[cfg(any(test, feature = "testing"))]
pub mod testing;
mod upload;
mod work;

pub use backend::Backend;
pub use dtype::{DType, Element, Float};
pub use error::{Absent, Error, LastCall, Result};
pub use fingerprint::{CallRecord, Op};
pub use gpu::Stream;
pub use group::{Group, GroupOptions};
pub use mark::Mark;
pub use phalanx_rendezvous as rendezvous;
pub use phalanx_rendezvous::environment;
pub use phalanx_rendezvous::environment::World;
pub use reduce_op::{Avg, Bf16Sum, Max, Min, Product, ReduceOp, ScaledSum, Sum};
pub use region::{Buffer, DeviceSlice, Input, Region, RegionRange};
pub use upload::{PinnedMemory, Upload, Uploader};
pub use work::{Arriving, Work};

/// The guide's examples, compiled with those of this documentation.
#[cfg(doctest)]
#[doc = include_str!("../../../docs/collectives.md")]
struct Guide;
