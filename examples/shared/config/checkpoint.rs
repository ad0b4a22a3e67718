//! Section `checkpoint`: what is saved while training goes on, and whether a run goes on from it.

use std::path::PathBuf;

use phalanx_ddp_core::checkpoint::{CheckpointerOptions, Keep, OnError};
use serde::{Deserialize, Serialize};

/// Where a run begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Resume {
    /// At the newest complete checkpoint, or at the first step where there is none.
    Auto,
    /// At the newest complete checkpoint; without one the run ends.
    Required,
    /// At the first step.
    Never,
}

/// What a later run can go on from.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct Checkpoint {
    /// Where checkpoints are; null for none. All machines must see it.
    pub(crate) folder: Option<PathBuf>,
    /// After how many steps one is saved; 0: only when a signal asks for it, and at the end.
    pub(crate) every_steps: u64,
    /// After how many steps a snapshot is kept in the launcher's memory, for ranks that are started again; 0 for none.
    pub(crate) memory_every_steps: u64,
    /// How many of the newest stay.
    pub(crate) keep_last: usize,
    /// Those whose step is a multiple of this stay as well; null for none.
    pub(crate) keep_every: Option<u64>,
    /// Whether training ends when one cannot be written.
    pub(crate) must_succeed: bool,
    /// `auto`, `required` or `never`.
    pub(crate) resume: Resume,
}

impl Default for Checkpoint {
    fn default() -> Self {
        let Keep { last, every } = Keep::default();
        Checkpoint {
            folder: None,
            every_steps: 0,
            memory_every_steps: 0,
            keep_last: last,
            keep_every: every,
            must_succeed: false,
            resume: Resume::Auto,
        }
    }
}

impl Checkpoint {
    /// The same as the library takes it.
    pub(crate) fn options(&self) -> CheckpointerOptions {
        CheckpointerOptions {
            every_steps: self.every_steps,
            memory_every_steps: self.memory_every_steps,
            keep: Keep { last: self.keep_last, every: self.keep_every },
            on_error: if self.must_succeed { OnError::Fail } else { OnError::Warn },
            ..CheckpointerOptions::default()
        }
    }

    /// Whether a run may find something to go on from.
    pub(crate) fn is_on(&self) -> bool {
        self.folder.is_some() || self.memory_every_steps > 0
    }

    pub(super) fn problem(&self) -> Option<String> {
        if self.keep_last == 0 {
            return Some("checkpoint.keep_last is 0; it must be at least 1".into());
        }
        if self.keep_every == Some(0) {
            return Some("checkpoint.keep_every is 0; it must be at least 1, or null".into());
        }
        let is_used = self.every_steps > 0 || self.resume == Resume::Required;
        (is_used && self.folder.is_none()).then(|| {
            "checkpoint.folder is missing; give --checkpoint DIR, or leave out --save-every and --resume".into()
        })
    }
}
