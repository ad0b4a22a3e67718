//! Pipeline parallelism: ranks that have different layers, and pass micro-batches on.

pub mod schedule;
