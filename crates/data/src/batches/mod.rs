//! What a step computes with: batches of named, typed columns, and memory that is used again.
//!
//! Here belongs what holds rows, whatever fills them ([`crate::samples`]) and whenever that happens
//! ([`crate::loader`]).

pub(crate) mod batch;
pub(crate) mod column;
mod dtype;
mod memory;
mod micro_batches;
pub(crate) mod recycling;
mod rows;
mod scratch;

pub use batch::{Batch, IGNORED};
pub use column::Column;
pub use dtype::{DType, Element};
pub use memory::{Allocator, ColumnBuffer, HostAllocator};
pub use micro_batches::{IntoBatches, MicroBatches};
pub use rows::Rows;
pub use scratch::Scratch;
