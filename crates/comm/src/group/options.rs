//! How a group behaves.

use std::time::Duration;

use crate::backend::Backend;
use crate::deadline::LONGEST;
use crate::environment::HostLink;

/// How a group behaves. A time of more than a year is taken for a year.
#[derive(Debug, Clone)]
pub struct GroupOptions {
    /// How long a collective may wait before it fails; 30 min by default, which is `PyTorch`'s for its host backend. It is
    /// for ranks that live and do not call: one that is dead, stopped or cut off is found within
    /// [`GroupOptions::dead_after`] and ends the wait at once. So it must be longer than anything that one rank does
    /// while the others wait: evaluation, a checkpoint, the first look at the data. See also
    /// [`Group::within`](crate::Group::within).
    pub timeout: Duration,
    /// How long the ranks may take to meet; 60 s by default.
    pub connect_timeout: Duration,
    /// How ranks of one machine talk, instead of what the [`World`](crate::World) says (`PHALANX_HOST_LINK`).
    pub host_link: Option<HostLink>,
    /// Who moves the data; the host backend by default.
    pub backend: Backend,
    /// Why this rank's GPU must not be used, if so: one rank's reason makes [`Backend::Auto`] choose the host for
    /// all, and is every rank's error with [`Backend::Nccl`].
    pub gpu_trouble: Option<String>,
    /// With [`Backend::Mpi`]: collectives take memory of this rank's GPU too, and
    /// [`Group::allocate`](crate::Group::allocate) gives it. It travels through page-locked memory of the host; where
    /// this rank's MPI library is CUDA-aware, MPI reads and writes regions itself in what only moves data (sums are
    /// made on the host, and what is received is compared there first). Ranks of one machine take its GPUs in turn. NCCL has its GPU without this.
    pub gpu_memory: bool,
    /// How often ranks tell each other that they live; 500 ms by default.
    pub heartbeat: Duration,
    /// How long a rank may say nothing before it counts as dead; 5 s by default. Ranks that compute
    /// are not silent: a thread of their own sends the heartbeats. Raise it to debug a rank.
    pub dead_after: Duration,
    /// After how long a wait the log (`tracing`) says for whom this rank waits, what that one called last and that it
    /// lives; 30 s by default, then after twice as long, and so on.
    pub remind_after: Duration,
}

impl Default for GroupOptions {
    fn default() -> Self {
        Self {
            timeout: Duration::from_secs(30 * 60),
            connect_timeout: Duration::from_secs(60),
            host_link: None,
            backend: Backend::default(),
            gpu_trouble: None,
            gpu_memory: false,
            heartbeat: Duration::from_millis(500),
            dead_after: Duration::from_secs(5),
            remind_after: Duration::from_secs(30),
        }
    }
}

impl GroupOptions {
    /// With times that the clock can count to.
    pub(super) fn bounded(self) -> Self {
        Self {
            timeout: self.timeout.min(LONGEST),
            connect_timeout: self.connect_timeout.min(LONGEST),
            heartbeat: self.heartbeat.min(LONGEST),
            dead_after: self.dead_after.min(LONGEST),
            remind_after: self.remind_after.min(LONGEST),
            ..self
        }
    }
}
