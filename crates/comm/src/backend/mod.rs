//! What carries collectives out.

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
