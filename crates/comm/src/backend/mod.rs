//! The backends: what carries collectives out.

mod checks;
pub(crate) mod gpu;
pub(crate) mod host;
pub(crate) mod lane;
#[cfg(feature = "mpi")]
pub(crate) mod mpi;
#[cfg(not(feature = "mpi"))]
#[path = "mpi_off.rs"]
pub(crate) mod mpi;
pub(crate) mod nccl;
mod patience;
pub(crate) mod runner;
mod unit;

use crate::error::{Error, Result};

/// What `run` gives, or its panic as this rank's error: nobody waits for a thread that is gone.
fn guarded<T>(
    rank: usize,
    what: &dyn std::fmt::Display,
    run: impl FnOnce() -> Result<T>,
) -> Result<T> {
    std::panic::catch_unwind(std::panic::AssertUnwindSafe(run)).unwrap_or_else(|panic| {
        let text = panic.downcast_ref::<String>().map(String::as_str);
        let text = text.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("?");
        let message = format!("{what} panicked, which is a bug of phalanx: {text}");
        Err(Error::PeerFailed { rank, message })
    })
}

/// Who moves a group's data.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum Backend {
    /// [`Backend::Nccl`] when every rank has a GPU, else [`Backend::Host`]: the group says which it
    /// became, and why.
    Auto,
    /// Shared memory inside a machine, TCP between machines.
    #[default]
    Host,
    /// The site's MPI library (feature `mpi`).
    Mpi,
    /// NCCL, for memory of NVIDIA GPUs; memory of the host goes over [`Backend::Host`].
    Nccl,
}

impl Backend {
    /// The name, as options and logs have it.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::Host => "host",
            Self::Mpi => "mpi",
            Self::Nccl => "nccl",
        }
    }
}

impl std::fmt::Display for Backend {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}
