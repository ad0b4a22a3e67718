//! The backends: what carries collectives out. Siblings behind one trait, none of which knows another.
//!
//! What all of them need is beside this folder: calls in their order ([`order`](crate::order)), the control plane
//! ([`control`](crate::control)), lanes ([`lane`](crate::lane)), memory and GPUs.

mod host;
#[cfg(feature = "mpi")]
mod mpi;
#[cfg(not(feature = "mpi"))]
#[path = "mpi_off.rs"]
mod mpi;
mod nccl;

use std::sync::Arc;
use std::time::Instant;

#[cfg(feature = "mpi")]
pub(crate) use self::mpi::meet_over_mpi;
use crate::error::{Error, Result};
use crate::gpu::Gpu;
use crate::lane::Lane;
use crate::order::core::Core;
use crate::order::executor::Carry;

/// Who moves a group's data, as the group sees it. One that is connected is a collective's lane and memory; connecting is
/// [`open`].
pub(crate) trait Transport: Send + Sync + std::fmt::Debug {
    /// The lane of calls on memory of a GPU, or of the host. `None`: they are moved in their order, by [`HOST`].
    fn lane(&self, on_device: bool) -> Option<&Arc<Lane>>;
    /// This rank's GPU, whose memory it takes.
    fn gpu(&self) -> Option<&Arc<Gpu>> {
        None
    }
    /// Whether ranks of a machine see each other's regions of host memory.
    fn shares_regions(&self) -> bool {
        true
    }
    /// Whether the GPU's calls, messages among them, are in one order, and can be held to start as one.
    fn is_in_stream_order(&self) -> bool {
        false
    }
    /// The group's owner lets it go: it is closed once what is under way has ended.
    fn close(&self, core: &Core);
    /// Divides what connects the ranks, on which nothing is under way: `part` is this rank's part of the group, with its
    /// color's number. Collective for the undivided group. Only where [`Transport::is_in_stream_order`]; the parts of others are
    /// connected anew.
    fn divide(
        &self,
        _undivided: &Core,
        _part: Option<(&Arc<Core>, usize)>,
        _deadline: Instant,
    ) -> Result<Option<Connected>> {
        Ok(None)
    }
}

/// A transport that is ready.
pub(crate) type Connected = Arc<dyn Transport>;

/// Every rank gives its bytes and gets everybody's, by rank.
type Gather<'a> = dyn FnMut(&[u8]) -> Result<Vec<Vec<u8>>> + 'a;

/// What a group wants of its backend.
#[derive(Debug)]
pub(crate) struct Wanted {
    pub(crate) backend: Backend,
    /// GPU memory is to travel.
    pub(crate) gpu_memory: bool,
    /// Why this rank's GPU cannot be used, where the caller knows.
    pub(crate) gpu_trouble: Option<String>,
}

/// What carries large calls on memory of the host out, for [`setup`](crate::order::setup).
pub(crate) const HOST: Carry = host::carry;

/// The host backend, which is there when the ranks have met.
pub(crate) fn host() -> Connected {
    Arc::new(host::HostTransport)
}

/// Connects the ranks over a backend: which one [`Backend::Auto`] became, and why. Collective; `gather` goes over the
/// control plane.
pub(crate) fn open(
    core: &Arc<Core>,
    wanted: Wanted,
    gather: &mut Gather<'_>,
    deadline: Instant,
) -> Result<(Backend, Connected, Option<String>)> {
    let Wanted { backend, gpu_memory, mut gpu_trouble } = wanted;
    match backend {
        Backend::Host => Ok((backend, host(), None)),
        Backend::Mpi => Ok((backend, mpi::open(core, gpu_memory, gather, deadline)?, None)),
        Backend::Nccl => Ok((backend, nccl::open(core, gpu_trouble, gather, deadline)?, None)),
        Backend::Auto => match nccl::obstacle(core, gpu_trouble.take(), gather)? {
            Some(obstacle) => Ok((Backend::Host, host(), Some(obstacle))),
            None => {
                let why = "every rank has a GPU".to_owned();
                let nccl = nccl::open(core, None, gather, deadline)?;
                Ok((Backend::Nccl, nccl, Some(why)))
            }
        },
    }
}

/// This rank's GPU, for a backend that may say what is missing.
fn device_of(core: &Core, backend: &'static str) -> Result<Arc<crate::gpu::cuda::Device>> {
    let host_of = |of: usize| &core.peers.identities[of].host;
    let place = (0..core.rank).filter(|peer| host_of(*peer) == host_of(core.rank)).count();
    crate::gpu::device_at(core.rank, place, backend)
}

/// Why a backend that was asked for is not there.
fn unavailable(backend: &'static str, what: impl Into<String>) -> Error {
    Error::NoBackend { backend, what: what.into() }
}

/// What an error says is missing.
fn trouble(error: &Error) -> String {
    match error {
        Error::NoBackend { what, .. } => what.clone(),
        other => other.to_string(),
    }
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
