//! What can go wrong in a group, and what to do about it.
//!
//! Three families. *Argument*: found before anything was sent; the group is still good. *Group*: a
//! peer is gone, late or out of step; the group is dead and every later call returns the first such
//! error. *Set-up*: the group could not be built. A bug of ours is an assertion, not a variant.

use std::sync::Arc;
use std::time::Duration;

use crate::environment::EnvironmentError;
use crate::fingerprint::CallRecord;
use crate::rendezvous::RendezvousError;

/// The result of this crate's calls.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// A rank that did not come, and what was last seen of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Absent {
    /// Who.
    pub rank: usize,
    /// Its machine.
    pub host: String,
    /// Its process there.
    pub pid: u32,
    /// The last collective that it has started.
    pub last: LastCall,
}

/// What is known of a rank's last collective.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum LastCall {
    /// It has not said anything yet.
    Unknown,
    /// It had started none, when it was heard last.
    Nothing,
    /// This one, when it was heard last.
    Call(CallRecord),
}

impl From<Option<CallRecord>> for LastCall {
    fn from(record: Option<CallRecord>) -> Self {
        record.map_or(Self::Nothing, Self::Call)
    }
}

impl std::fmt::Display for Absent {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "rank {} (host {}, pid {}), ", self.rank, self.host, self.pid)?;
        match &self.last {
            LastCall::Call(last) => write!(f, "whose last call was {last}"),
            LastCall::Nothing => write!(f, "which has called nothing yet"),
            LastCall::Unknown => write!(f, "whose last call is not known here"),
        }
    }
}

/// Things, one after the other, in a message.
pub(crate) fn list<T: ToString>(items: &[T]) -> String {
    items.iter().map(ToString::to_string).collect::<Vec<_>>().join("; ")
}

/// A failed call of a [`Group`](crate::Group).
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// Argument: a buffer has a length that the operation cannot use. The group is still good.
    #[error("{op}: {what} has {actual} elements, expected {expected}")]
    LengthMismatch {
        /// The collective.
        op: &'static str,
        /// Which buffer.
        what: &'static str,
        /// What it should have been.
        expected: usize,
        /// What it was.
        actual: usize,
    },
    /// Argument: a buffer that is cut into one segment per rank cannot be. The group is still good.
    #[error("{op}: the buffer has {actual} elements, which {world_size} ranks cannot share evenly: pad it to a multiple of {world_size}")]
    NotDivisible {
        /// The collective.
        op: &'static str,
        /// What was given.
        actual: usize,
        /// How many segments it must have.
        world_size: usize,
    },
    /// Argument: a rank outside the group. The group is still good.
    #[error("{op}: rank {rank} is not in this group of {world_size} ranks (0 to {})", world_size - 1)]
    NoSuchRank {
        /// The collective.
        op: &'static str,
        /// What was given.
        rank: usize,
        /// How many there are.
        world_size: usize,
    },
    /// Argument: the buffer that only the root has is given elsewhere, or is missing at the root.
    #[error("{op}: rank {rank} {} but the root is rank {root}: pass Some(…) on the root and None elsewhere", if *given { "gave the root's buffer" } else { "gave no buffer" })]
    RootBuffer {
        /// The collective.
        op: &'static str,
        /// This rank.
        rank: usize,
        /// The root.
        root: usize,
        /// Whether a buffer was given.
        given: bool,
    },
    /// Argument: a message of a rank to itself.
    #[error("{op}: rank {rank} cannot talk to itself: copy the data instead")]
    SelfMessage {
        /// The call.
        op: &'static str,
        /// This rank.
        rank: usize,
    },
    /// Argument: a region that belongs to another group.
    #[error(
        "{op}: the region was allocated by another group: allocate it with the group that uses it"
    )]
    ForeignRegion {
        /// The collective.
        op: &'static str,
    },
    /// Argument: memory of a GPU in a group or an operation that has no use for it. The group is still
    /// good.
    #[error("{op}: {what}")]
    DeviceMemory {
        /// The collective.
        op: &'static str,
        /// What to do instead.
        what: &'static str,
    },
    /// Group: two ranks called different collectives, or with different arguments. Nothing of the
    /// caller's memory has changed.
    #[error("collective #{seq} differs between ranks: rank {rank} called {ours}, rank {peer} called {theirs}: every rank must start the same collectives in the same order")]
    OutOfStep {
        /// Which collective of the group, counted from 0.
        seq: u64,
        /// One rank (this one, unless a peer found the difference before this one called).
        rank: usize,
        /// What it called.
        ours: Box<CallRecord>,
        /// The rank that differs.
        peer: usize,
        /// What that one called.
        theirs: Box<CallRecord>,
    },
    /// Group: a peer's process is gone.
    #[error("rank {peer} (host {host}, pid {pid}) died{} during {during}: look at that rank's own output for the cause", cause.as_ref().map_or(String::new(), |cause| format!(" ({cause})")))]
    PeerGone {
        /// Who.
        peer: usize,
        /// Its machine.
        host: String,
        /// Its process there.
        pid: u32,
        /// How it ended, where that could be seen.
        cause: Option<String>,
        /// What this rank was waiting for.
        during: String,
    },
    /// Group: a peer has said nothing for so long that it counts as dead.
    #[error("rank {peer} (host {host}, pid {pid}) not responding for {:.1} s: {state}; this rank was in {during}", silent.as_secs_f64())]
    NotResponding {
        /// Who.
        peer: usize,
        /// Its machine.
        host: String,
        /// Its process there.
        pid: u32,
        /// How long nothing came from it.
        silent: Duration,
        /// What the kernel knows of its process (on this machine) or of the connection to it.
        state: String,
        /// What the rank that found it was waiting for.
        during: String,
    },
    /// Group: a peer closed the group in good order while others still count on it.
    #[error("rank {peer} (host {host}, pid {pid}) left the group after {completed} collectives{}, while rank {rank} is at {during}: every rank must run the same number of collectives", if *panicking { " (it panicked)" } else { "" })]
    PeerLeft {
        /// Who.
        peer: usize,
        /// Its machine.
        host: String,
        /// Its process there.
        pid: u32,
        /// How many collectives it finished.
        completed: u64,
        /// Whether a panic made it leave.
        panicking: bool,
        /// This rank.
        rank: usize,
        /// What this rank was waiting for.
        during: String,
    },
    /// Group: a connection failed although the peer's process seems to live.
    #[error("connection to rank {peer} (host {host}, pid {pid}) lost, peer alive: {call}: {source}; check the network between the machines")]
    ConnectionLost {
        /// Who.
        peer: usize,
        /// Its machine.
        host: String,
        /// Its process there.
        pid: u32,
        /// What was tried.
        call: &'static str,
        /// What the system said.
        source: Arc<std::io::Error>,
    },
    /// Group: what a rank received from another machine is not what was sent. No rank has gone on with it, but a buffer of
    /// the failed call may hold it.
    #[error("data from rank {peer} (host {host}, pid {pid}) to rank {rank} (host {receiver}) was damaged on its way in {during}: its checksum is {actual:08x}, expected {expected:08x}; the network between the two machines, or the memory of one of them, changes data: start again from the last checkpoint, and if it happens to the same machine again take that out and test it (ECC errors: dmesg; network card: ethtool -S)")]
    DataDamaged {
        /// The sender.
        peer: usize,
        /// Its machine.
        host: String,
        /// Its process there.
        pid: u32,
        /// The receiver, who found it.
        rank: usize,
        /// The receiver's machine.
        receiver: String,
        /// What the receiver was in.
        during: String,
        /// The checksum that came with the data.
        expected: u32,
        /// That of the data that came.
        actual: u32,
    },
    /// Group: not all ranks came in time.
    #[error("{call}: {timeout:?} passed on rank {rank}, waiting for {}: raise the timeout if they were only slow", list(absent))]
    Timeout {
        /// Who waited.
        rank: usize,
        /// What it had called.
        call: Box<CallRecord>,
        /// How long it waited.
        timeout: Duration,
        /// Whom it waited for.
        absent: Vec<Absent>,
    },
    /// Group: all ranks came, but the library that moves the data did not end in time.
    #[error("{call}: {timeout:?} passed on rank {rank} although every rank has called it: {backend} does not make progress{}; look at its own messages{}, or raise the timeout if the data is only large", said.as_ref().map_or(String::new(), |said| format!(", and says {said:?}")), if *backend == "nccl" { " (NCCL_DEBUG=INFO)" } else { "" })]
    Stalled {
        /// Who waited.
        rank: usize,
        /// Who moves the data.
        backend: &'static str,
        /// What it had called.
        call: Box<CallRecord>,
        /// How long it waited.
        timeout: Duration,
        /// The newest message of the library's, where it gives one.
        said: Option<String>,
    },
    /// Group: the library that moves the data reported an error.
    #[error("{backend}: {call} failed on rank {rank}: {what}")]
    Backend {
        /// This rank.
        rank: usize,
        /// Which library.
        backend: &'static str,
        /// Its call.
        call: String,
        /// What it said and what to do.
        what: String,
    },
    /// Set-up: a backend that was asked for is not there.
    #[error("the {backend} backend is not available: {what}")]
    NoBackend {
        /// Which one.
        backend: &'static str,
        /// What is missing and how to get it.
        what: String,
    },
    /// Group: a rank called [`Group::abort`](crate::Group::abort).
    #[error("rank {rank} aborted the group: {reason}")]
    Aborted {
        /// Who.
        rank: usize,
        /// Why, in its words.
        reason: String,
    },
    /// Group: a peer's group failed for a reason that only it could see.
    #[error("the group failed on rank {rank}: {message}")]
    PeerFailed {
        /// Who.
        rank: usize,
        /// Its error.
        message: String,
    },
    /// Set-up: the environment does not say who we are.
    #[error(transparent)]
    Environment(Arc<EnvironmentError>),
    /// Set-up: the ranks could not meet.
    #[error(transparent)]
    Rendezvous(Arc<RendezvousError>),
    /// Set-up: a rank could not be connected to.
    #[error("rank {rank} cannot connect to rank {peer} ({address}): {what}")]
    Connect {
        /// This rank.
        rank: usize,
        /// The other.
        peer: usize,
        /// Where it should be.
        address: String,
        /// What happened and what to do.
        what: String,
    },
    /// The operating system refused something.
    #[error("{call} failed on rank {rank}: {source}")]
    System {
        /// This rank.
        rank: usize,
        /// What was asked for.
        call: &'static str,
        /// What the system said.
        source: Arc<std::io::Error>,
    },
    /// Set-up: the ranks' facts about the world contradict each other.
    #[error("rank {rank}: {what}")]
    World {
        /// This rank.
        rank: usize,
        /// What contradicts what.
        what: String,
    },
}

impl From<EnvironmentError> for Error {
    fn from(error: EnvironmentError) -> Self {
        Self::Environment(Arc::new(error))
    }
}

impl From<RendezvousError> for Error {
    fn from(error: RendezvousError) -> Self {
        Self::Rendezvous(Arc::new(error))
    }
}

impl Error {
    /// The rank that is to blame, where it is one.
    pub(crate) fn blamed(&self) -> Option<usize> {
        match self {
            Self::PeerGone { peer, .. }
            | Self::PeerLeft { peer, .. }
            | Self::NotResponding { peer, .. }
            | Self::ConnectionLost { peer, .. } => Some(*peer),
            Self::Timeout { absent, .. } => absent.first().map(|absent| absent.rank),
            Self::Aborted { rank, .. } | Self::PeerFailed { rank, .. } => Some(*rank),
            _ => None,
        }
    }

    /// Wraps what the operating system said to `call`.
    pub(crate) fn system(
        rank: usize,
        call: &'static str,
        source: impl Into<std::io::Error>,
    ) -> Self {
        Self::System { rank, call, source: Arc::new(source.into()) }
    }
}

/// What `run` gives, or its panic as this rank's error: nobody waits for a thread that is gone.
pub(crate) fn guarded<T>(
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
