//! Time stamps on a stream of a GPU: how long the GPU takes between two of them.

use std::time::{Duration, Instant};

use crate::error::{Error, Result};
use crate::gpu::cuda::GpuEvent;
use crate::gpu::cuda_error;

/// A point of the caller's stream ([`Group::set_stream`](crate::Group::set_stream)), of which the GPU
/// notes when it passes it: what lies between two of them is time of the GPU, not of the program that
/// asks for work.
#[derive(Debug)]
pub struct Mark {
    pub(crate) event: GpuEvent,
    pub(crate) rank: usize,
}

/// Between two questions whether the GPU has come there.
const PAUSE: Duration = Duration::from_micros(20);

impl Mark {
    /// The GPU's time from this mark to `end`, made after it. Waits, at most `limit`, until the GPU has
    /// passed both.
    ///
    /// # Errors
    ///
    /// The GPU has not come there in time, or reports an error.
    pub fn time_until(&self, end: &Self, limit: Duration) -> Result<Duration> {
        let failed = |error| cuda_error(self.rank, error);
        let deadline = Instant::now() + limit.min(crate::deadline::LONGEST);
        while !(self.event.is_passed().map_err(failed)? && end.event.is_passed().map_err(failed)?) {
            if Instant::now() >= deadline {
                let what =
                    format!("the GPU has not come to the end of a measured part in {limit:?}");
                let call = "cuEventQuery".to_owned();
                return Err(Error::Backend { rank: self.rank, backend: "nccl", call, what });
            }
            std::thread::park_timeout(PAUSE);
        }
        self.event.time_until(&end.event).map_err(failed)
    }
}
