//! The parts of the BERT trainer, each of which can be read alone.

pub(crate) mod batching;
pub(crate) mod config;
pub(crate) mod memory;
pub(crate) mod metrics;
pub(crate) mod model;
pub(crate) mod plot;
pub(crate) mod progress;
pub(crate) mod report;
