//! How long a caller goes on waiting for a call that the runner looks after.
//!
//! The runner's looks make a call end: in time, or with an error. A runner that is stuck inside the library
//! or the driver looks at nothing, and whoever waits for it has to notice by himself. A call whose turn comes
//! late is no reason to give up, so it is the runner's looks that are watched, not the call.

use std::time::{Duration, Instant};

use super::host::call::Call;
use super::host::core::Core;
use super::runner::Runner;
use super::Backend;
use crate::error::{Error, Result};

/// How much longer than the call's time limit the runner may go without a look.
const SLACK: Duration = Duration::from_secs(2);
/// How long the runner has to end a call of a group that has failed.
const ENDS: Duration = Duration::from_millis(300);

/// A caller's wait for one call.
pub(crate) struct Patience<'a> {
    core: &'a Core,
    runner: &'a Runner,
    backend: Backend,
    call: &'a Call,
    /// The runner's looks, and since when there were no more of them.
    looks: (u64, Instant),
    failed: Option<Instant>,
}

impl<'a> Patience<'a> {
    pub(super) fn new(
        core: &'a Core,
        runner: &'a Runner,
        backend: Backend,
        call: &'a Call,
    ) -> Self {
        let looks = (runner.looks(), Instant::now());
        Self { core, runner, backend, call, looks, failed: None }
    }

    /// An error, which has ended the group, when the call will not end by itself.
    pub(crate) fn check(&mut self) -> Result<()> {
        let looks = self.runner.looks();
        if looks != self.looks.0 {
            self.looks = (looks, Instant::now());
        }
        if let Some(error) = self.core.peers.failure() {
            let since = *self.failed.get_or_insert_with(Instant::now);
            return if since.elapsed() < ENDS { Ok(()) } else { Err(error) };
        }
        if self.looks.1.elapsed() < self.call.timeout.saturating_add(SLACK) {
            return Ok(());
        }
        Err(self.core.peers.fail(Error::Stalled {
            rank: self.core.rank,
            backend: self.backend.name(),
            call: Box::new(self.call.record.clone()),
            timeout: self.call.timeout,
            said: None,
        }))
    }
}
