//! Pipeline parallelism: ranks that have different layers, and pass micro-batches on.
//!
//! [`schedule`] says what each rank does, as data; [`Pipeline`] does it with a [`TensorGroup`](phalanx_ddp_core::collective::TensorGroup); [`partition`] says which layers
//! each stage has.

mod engine;
pub mod partition;
pub mod schedule;

pub use engine::{Computing, Pipeline, Shaped, Stage, StepOutput};
