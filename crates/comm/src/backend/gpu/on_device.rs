//! The order between a call on GPU memory and the caller's stream: an event in each direction.

use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::Duration;

use super::cuda::{CudaError, Device, Event};
use super::cuda_error;
use crate::backend::host::call::Call;
use crate::backend::lane::Lane;
use crate::error::Result;
use crate::region::Stream;

/// How long a caller sleeps between two looks whether its call has been launched.
const LOOK: Duration = Duration::from_millis(1);

/// Where a call stands between streams.
#[derive(Debug)]
pub(crate) struct OnDevice {
    /// The caller's stream.
    stream: Stream,
    /// The point of that stream at which the call was made.
    pub(crate) ready: Event,
    /// The end of the call on a stream of the group's, once it is launched.
    done: Mutex<Option<Arc<Event>>>,
    launched: Condvar,
}

impl OnDevice {
    pub(crate) fn after(device: &Arc<Device>, stream: Stream) -> Result<Self, CudaError> {
        let ready = Event::record(device, stream)?;
        Ok(Self { stream, ready, done: Mutex::new(None), launched: Condvar::new() })
    }

    /// What comes after the call may go on after `done`.
    pub(crate) fn launch(&self, done: Arc<Event>) {
        *self.done.lock().unwrap_or_else(PoisonError::into_inner) = Some(done);
        self.launched.notify_all();
    }

    /// Orders `stream`, or the one that the call was made on, after the call. Waits on the host only until
    /// it is launched, or has failed.
    pub(crate) fn order(&self, call: &Call, lane: &Lane, stream: Option<Stream>) -> Result<()> {
        let mut patience = lane.patience(call);
        let mut done = self.done.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            if let Some(done) = &*done {
                let ordered = done.order(stream.unwrap_or(self.stream));
                return ordered.map_err(|error| cuda_error(lane.core.rank, error));
            }
            if call.is_done() {
                return Ok(()); // failed before it was launched
            }
            let waited = self.launched.wait_timeout(done, LOOK);
            done = waited.unwrap_or_else(PoisonError::into_inner).0;
            if done.is_none() {
                patience.check()?;
            }
        }
    }
}
