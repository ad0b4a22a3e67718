#![cfg_attr(feature = "torch", doc = include_str!("../README.md"))]
#![cfg_attr(
    not(feature = "torch"),
    doc = "Data-parallel training for Rust on libtorch, here without the feature `torch`."
)]

pub use phalanx_comm as comm;
pub use phalanx_data as data;
pub use phalanx_launch as launch;

pub use phalanx_comm::{Group, GroupOptions};

#[cfg(feature = "torch")]
pub use phalanx_ddp_core as ddp;
#[cfg(feature = "torch")]
pub use phalanx_ddp_core::{
    AdamW, Ddp, DdpOptions, Lamb, Optimizer, OptimizerConfig, StepTimes, Sync, Zero,
};
/// The tch that phalanx is built with.
#[cfg(feature = "torch")]
pub use tch;
