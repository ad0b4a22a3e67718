//! Threads for one piece of work.

use std::num::NonZeroUsize;

use crate::error::{Error, Result};

/// Runs `work` in a rayon pool of its own, with all processors if `threads` is not given.
pub(crate) fn in_pool<T: Send>(
    threads: Option<NonZeroUsize>,
    work: impl FnOnce() -> T + Send,
) -> Result<T> {
    // 0 is rayon's word for all processors.
    let count = threads.map_or(0, NonZeroUsize::get);
    let pool = rayon::ThreadPoolBuilder::new().num_threads(count).build().map_err(|error| {
        Error::option("threads", count, format!("the threads cannot be started: {error}"))
    })?;
    Ok(pool.install(work))
}
