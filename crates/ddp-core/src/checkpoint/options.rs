//! What a [`Checkpointer`](super::Checkpointer) is told, and what it answers.

use std::path::PathBuf;
use std::time::Duration;

use phalanx_checkpoint::{Keep, OnBusy, OnError, SaverOptions};
use serde::de::DeserializeOwned;
use serde_json::Value;

use crate::{Error, Result};

/// When checkpoints are saved and which of them stay. [`Default`] saves only when a signal asks for it and at the end.
#[derive(Clone, Debug)]
pub struct CheckpointerOptions {
    /// Save after every so many steps; 0 for never.
    pub every_steps: u64,
    /// Keep a snapshot in the memory of phalanx's launcher after every so many steps, on a second node too if there are several; 0 for never.
    /// See [`Checkpointer`](super::Checkpointer#snapshots-in-memory).
    pub memory_every_steps: u64,
    /// Which checkpoints stay in the folder.
    pub keep: Keep,
    /// What happens when one cannot be written, to the disk or to memory: training goes on with a warning, or ends.
    pub on_error: OnError,
    /// What happens when one is due while another is still being written.
    pub on_busy: OnBusy,
    /// How long [`Checkpointer::finish`](super::Checkpointer::finish) waits for the disk.
    pub finish_timeout: Duration,
    /// Whether SIGTERM, SIGINT and SIGUSR1 save and end the training ([`Next::Stop`]). A second SIGINT ends the process at once.
    pub heed_signals: bool,
}

impl Default for CheckpointerOptions {
    fn default() -> Self {
        let SaverOptions { keep, on_error, on_busy, finish_timeout, .. } = SaverOptions::default();
        Self {
            every_steps: 0,
            memory_every_steps: 0,
            keep,
            on_error,
            on_busy,
            finish_timeout,
            heed_signals: true,
        }
    }
}

/// Whether to go on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub enum Next {
    /// With the next step.
    Continue,
    /// End: this signal came to some rank, and the step is saved; without a folder it is in memory, which goes with the launcher.
    Stop {
        /// Its number.
        signal: i32,
    },
}

/// Where a training came back from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Origin {
    /// A checkpoint in the folder.
    Disk,
    /// The launcher's memory.
    Memory,
}

/// What a training went on from.
#[derive(Clone, Debug)]
pub struct Resumed {
    /// Steps that were made.
    pub step: u64,
    /// The ranks that had saved it.
    pub world_size: usize,
    /// Disk or memory.
    pub origin: Origin,
    /// The checkpoint's folder; of a snapshot in memory what messages call it.
    pub path: PathBuf,
    /// The program's own values: see [`Resumed::values`].
    pub program: Value,
}

impl Resumed {
    /// The program's own values, as it had given them to [`Checkpointer::step`](super::Checkpointer::step).
    ///
    /// # Errors
    /// [`Error::CheckpointMisfit`] where they are not a `T`.
    pub fn values<T: DeserializeOwned>(&self) -> Result<T> {
        serde_json::from_value(self.program.clone()).map_err(|error| Error::CheckpointMisfit {
            path: self.path.clone(),
            report: format!("  the program's values: {error}\n"),
        })
    }
}
