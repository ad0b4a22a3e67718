//! The order between a call on GPU memory and the caller's stream: an event in each direction.

use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::Duration;

use super::cuda::{CudaError, Device, GpuEvent};
use super::Stream;

/// How long a caller sleeps between two looks whether its call has been launched.
const LOOK: Duration = Duration::from_millis(1);

/// Where a call stands between streams.
#[derive(Debug)]
pub(crate) struct OnDevice {
    /// The caller's stream.
    stream: Stream,
    /// The point of that stream at which the call was made.
    pub(crate) ready: GpuEvent,
    /// The end of the call on a stream of the group's, once it is launched.
    done: Mutex<Option<Arc<GpuEvent>>>,
    launched: Condvar,
}

impl OnDevice {
    pub(crate) fn after(device: &Arc<Device>, stream: Stream) -> Result<Self, CudaError> {
        let ready = GpuEvent::record(device, stream)?;
        Ok(Self { stream, ready, done: Mutex::new(None), launched: Condvar::new() })
    }

    /// What comes after the call may go on after `done`.
    pub(crate) fn launch(&self, done: Arc<GpuEvent>) {
        *self.done.lock().unwrap_or_else(PoisonError::into_inner) = Some(done);
        self.launched.notify_all();
    }

    /// Waits a moment for the launch: orders `stream`, or the one that the call was made on, after it. Whether it is launched.
    pub(crate) fn try_order(&self, stream: Option<Stream>) -> Result<bool, CudaError> {
        let done = self.done.lock().unwrap_or_else(PoisonError::into_inner);
        let waited = self.launched.wait_timeout_while(done, LOOK, |done| done.is_none());
        match &*waited.unwrap_or_else(PoisonError::into_inner).0 {
            Some(end) => end.order(stream.unwrap_or(self.stream)).map(|()| true),
            None => Ok(false),
        }
    }
}
