//! How checkpoints are saved, and what a save can come to.

use std::path::PathBuf;
use std::time::Duration;

use crate::folder::Keep;

/// What becomes of a training whose checkpoint could not be written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum OnError {
    /// Rank 0 logs a warning, and training goes on.
    #[default]
    Warn,
    /// All ranks get [`Error::SaveFailed`](crate::Error::SaveFailed).
    Fail,
}

/// What a save does that comes while another is still being written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum OnBusy {
    /// Waits for it.
    #[default]
    Wait,
    /// Is left out.
    Skip,
}

/// How checkpoints are saved. The same on all ranks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SaverOptions {
    /// Which checkpoints stay in the folder.
    pub keep: Keep,
    /// What happens when one cannot be written.
    pub on_error: OnError,
    /// What happens when one is not finished before the next.
    pub on_busy: OnBusy,
    /// How long [`Saver::finish`](crate::Saver::finish) waits. Generous: a full disk answers at once, a slow one takes its time.
    pub finish_timeout: Duration,
}

impl Default for SaverOptions {
    fn default() -> Self {
        SaverOptions {
            keep: Keep::default(),
            on_error: OnError::default(),
            on_busy: OnBusy::default(),
            finish_timeout: Duration::from_secs(1800),
        }
    }
}

/// What came of the last save, as all ranks know it.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Progress {
    /// Nothing is being written.
    Idle,
    /// It is being written.
    Pending {
        /// Its step.
        step: u64,
    },
    /// It is complete and durable. Told once.
    Saved {
        /// Its step.
        step: u64,
        /// Its folder.
        path: PathBuf,
    },
    /// It could not be written, and training goes on ([`OnError::Warn`]). Told once.
    Failed {
        /// Its step.
        step: u64,
        /// The first rank that failed.
        rank: usize,
        /// Why.
        reason: String,
    },
}

/// Whether a save began.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Started {
    /// Its bytes were copied; the memory that was saved may change.
    Yes,
    /// Another one is still being written ([`OnBusy::Skip`]).
    Skipped,
}
