//! Data-parallel training for Rust on libtorch: ranks that march in step.
//!
//! This package is the front: [`comm`] has the process groups and collectives, [`data`] the loaders,
//! [`launch`] starts ranks, and with the feature `torch` (on by default) [`ddp`] trains tch models and [`model_parallel`] those that are
//! larger than a device.
//!
//! A program trains data-parallel when it joins its group and wraps its model:
//!
//! ```no_run
//! use phalanx::{Ddp, DdpOptions, Group};
//! use phalanx::tch::{nn, Device};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let mut group = Group::from_environment(Default::default())?;
//! let vs = nn::VarStore::new(Device::Cpu);
//! // … build the model on `vs` …
//! let _ddp = Ddp::new(&vs, &mut group, DdpOptions::default())?;
//! // … train it with plain tch: `optimizer.backward_step(&loss)` averages over the ranks.
//! # Ok(())
//! # }
//! ```

pub use phalanx_comm as comm;
pub use phalanx_data as data;
pub use phalanx_launch as launch;

pub use phalanx_comm::{Group, GroupOptions};

#[cfg(feature = "torch")]
pub use phalanx_ddp_core as ddp;
#[cfg(feature = "torch")]
pub use phalanx_ddp_core::{checkpoint, optim};
#[cfg(feature = "torch")]
pub use phalanx_ddp_core::{
    Ddp, DdpOptions, Optimizer, ParameterGroup, ParameterGroups, Sync, Zero,
};
#[cfg(feature = "torch")]
pub use phalanx_model_parallel as model_parallel;
#[cfg(feature = "torch")]
pub use tch;

/// The guides' examples, compiled with those of this documentation.
#[cfg(all(doctest, feature = "torch"))]
mod guides {
    #[doc = include_str!("../docs/training.md")]
    struct Training;
    #[doc = include_str!("../docs/gpu.md")]
    struct Gpu;
}
