//! The parts of the BERT trainer, each of which can be read alone.

pub(crate) mod batching;
pub(crate) mod config;
pub(crate) mod data;
pub(crate) mod disturbed;
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
pub(crate) mod resume;
pub(crate) mod train;
pub(crate) mod weights;

/// Shows what the libraries have to say (who is waited for, strangers at the port, lost connections).
pub(crate) fn log_to_stderr() {
    let log = tracing_subscriber::fmt().with_writer(std::io::stderr).with_ansi(false);
    log.with_max_level(tracing::Level::INFO).compact().init();
}
