//! The parts of the BERT trainer, each of which can be read alone.

pub(crate) mod batching;
pub(crate) mod config;
pub(crate) mod data;
pub(crate) mod failure;
pub(crate) mod flags;
pub(crate) mod journal;
pub(crate) mod memory;
pub(crate) mod metrics;
pub(crate) mod model;
pub(crate) mod output;
pub(crate) mod plot;
pub(crate) mod progress;
pub(crate) mod report;
pub(crate) mod train;
pub(crate) mod weights;
