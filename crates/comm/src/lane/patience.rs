//! How long a caller goes on waiting for a call that another thread polls.
//!
//! Each poll of a lane (a *look*) ends the calls whose time is over, so a call ends in time as long
//! as somebody polls. A thread that is stuck inside the library or the driver during its poll keeps
//! all others from polling; the waiting caller has to notice that by itself. A call that is late
//! because others are before it is no reason to give up, so it is the polls that are watched, not
//! the call.

use std::time::{Duration, Instant};

use super::Lane;
use crate::call::Call;
use crate::error::{Error, Result};
use crate::gpu::on_device::OnDevice;
use crate::gpu::{cuda_error, Stream};

/// How much longer than the call's time limit a lane may go without a look.
const SLACK: Duration = Duration::from_secs(2);
/// How long the runner has to end a call of a group that has failed.
const ENDS: Duration = Duration::from_millis(300);

impl Lane {
    /// Orders `stream`, or the one that the call was made on, after the call. Waits on the host only until
    /// it is launched, or has failed.
    pub(crate) fn order(
        &self,
        call: &Call,
        on_device: &OnDevice,
        stream: Option<Stream>,
    ) -> Result<()> {
        let mut patience = self.patience(call);
        loop {
            let was_done = call.is_done();
            let ordered = on_device.try_order(stream);
            if ordered.map_err(|error| cuda_error(self.core.rank, error))? || was_done {
                return Ok(()); // what is done and was not launched has failed before
            }
            patience.check()?;
        }
    }
}

/// A caller's wait for one call.
pub(crate) struct Patience<'a> {
    lane: &'a Lane,
    call: &'a Call,
    /// The lane's looks, and since when there were no more of them.
    looks: (u64, Instant),
    failed: Option<Instant>,
}

impl<'a> Patience<'a> {
    pub(super) fn new(lane: &'a Lane, call: &'a Call) -> Self {
        let looks = (lane.looks(), Instant::now());
        Self { lane, call, looks, failed: None }
    }

    /// An error, which has ended the group, when the call will not end by itself.
    pub(crate) fn check(&mut self) -> Result<()> {
        let looks = self.lane.looks();
        if looks != self.looks.0 {
            self.looks = (looks, Instant::now());
        }
        if let Some(error) = self.lane.core.peers.failure() {
            let since = *self.failed.get_or_insert_with(Instant::now);
            return if since.elapsed() < ENDS { Ok(()) } else { Err(error) };
        }
        if self.looks.1.elapsed() < self.call.timeout.saturating_add(SLACK) {
            return Ok(());
        }
        Err(self.lane.core.peers.fail(Error::Stalled {
            rank: self.lane.core.rank,
            backend: self.lane.backend,
            call: Box::new(self.call.record.clone()),
            timeout: self.call.timeout,
            said: None,
        }))
    }
}
