//! What can go wrong while ranks meet: one variant per cause, each saying what to do about it.

use std::io;
use std::time::Duration;

/// A store operation failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StoreError {
    /// `get` waited until its deadline and nobody set the key.
    #[error(
        "store key {key:?} was not set within {waited:?}: the rank that sets it is late or gone"
    )]
    Timeout {
        /// The key that was waited for.
        key: String,
        /// How long this call waited.
        waited: Duration,
    },
    /// The wait was cancelled by [`Store::cancel`](super::Store::cancel).
    #[error("waiting for store key {key:?} was cancelled")]
    Cancelled {
        /// The key that was waited for.
        key: String,
    },
    /// Longer than a key may be.
    #[error("store key of {bytes} bytes is too long: at most {max} are allowed")]
    KeyTooLong {
        /// Length of the key that was passed.
        bytes: usize,
        /// The limit.
        max: usize,
    },
    /// Longer than a value may be.
    #[error("value of {bytes} bytes for store key {key:?} is too long: at most {max} are allowed")]
    ValueTooLong {
        /// The key that was to be written.
        key: String,
        /// Length of the value that was passed.
        bytes: usize,
        /// The limit.
        max: usize,
    },
    /// The store holds as many bytes as it may.
    #[error("the store is full ({max} bytes): delete keys that are not needed, or send large data through a collective")]
    Full {
        /// The limit.
        max: usize,
    },
    /// `add` on a key whose value is not a counter.
    #[error("store key {key:?} does not hold a counter: it was written by set, not by add")]
    NotACounter {
        /// The key.
        key: String,
    },
    /// The server went away in the middle of the job.
    #[error("connection to the store at {address} was lost: {source}; the launcher or rank 0 that hosts it has ended")]
    Disconnected {
        /// Where the store was.
        address: String,
        /// What the socket said.
        source: io::Error,
    },
    /// The server answered with something that is not an answer.
    #[error("the store at {address} sent {what}: the two sides run different versions of phalanx, or something alters the traffic")]
    Protocol {
        /// Where the store is.
        address: String,
        /// What arrived.
        what: String,
    },
    /// A new connection to the store, needed for this call, could not be made.
    #[error(transparent)]
    Rendezvous(#[from] Box<RendezvousError>),
}

/// The ranks could not meet.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RendezvousError {
    /// The ranks of this [`World`](crate::environment::World) meet over MPI, not in a store at an address.
    #[error("this job's launcher says neither where rank 0 is nor what the job is called, so its ranks meet over MPI: use Group::from_environment or Group::from_mpi, or set MASTER_ADDR and PHALANX_RUN_ID")]
    OverMpi,
    /// The port that the store should listen on belongs to somebody else.
    #[error("port {port} on {host} is in use{}: end that program, or choose another port (--master-port, MASTER_PORT); --master-port 0 takes a free one", owner_text(.owner.as_ref()))]
    PortInUse {
        /// The address that was to be bound.
        host: String,
        /// The port that was to be bound.
        port: u16,
        /// Process id and program name of the listener, where `/proc` shows them.
        owner: Option<(u32, String)>,
    },
    /// The store could not listen for another reason.
    #[error("the store cannot listen on {address}: {source}; the address must be one of this machine (MASTER_ADDR, --master-addr)")]
    Bind {
        /// The address that was to be bound.
        address: String,
        /// What the system said.
        source: io::Error,
    },
    /// The master's name means loopback on the master itself: other machines would be sent elsewhere.
    #[error("the master's name {host:?} is {address} on this machine, where other machines cannot reach it (an entry of /etc/hosts): set MASTER_ADDR or --master-addr (torchrun: --local-addr) to this machine's IP address on the network")]
    LoopbackMaster {
        /// The name.
        host: String,
        /// What it resolves to here.
        address: String,
    },
    /// The master's name has no address.
    #[error("the master's name {host:?} could not be resolved within {waited:?} ({source}): check MASTER_ADDR or --master-addr, or give an IP address")]
    NameNotResolved {
        /// The name.
        host: String,
        /// How long this rank tried.
        waited: Duration,
        /// What the resolver said last.
        source: io::Error,
    },
    /// The master's machine answers, but refuses connections to the port.
    #[error("nobody listens at {address} after {waited:?}: is rank 0 (or the launcher of node 0) running, and is the port right (MASTER_PORT, --master-port){hint}")]
    NobodyListens {
        /// Where the store should be.
        address: String,
        /// How long this rank tried.
        waited: Duration,
        /// What this launcher's arrangement adds, or nothing.
        hint: String,
    },
    /// The master's machine does not answer at all.
    #[error("{address} cannot be reached after {waited:?} ({source}): is the machine up, is the address right (MASTER_ADDR, --master-addr), does a firewall drop the port")]
    Unreachable {
        /// Where the store should be.
        address: String,
        /// How long this rank tried.
        waited: Duration,
        /// What the system said last.
        source: io::Error,
    },
    /// Something listens there, but it is no phalanx store.
    #[error("what listens at {address} is not a phalanx store ({what}): another program uses the port, choose another (--master-port, MASTER_PORT)")]
    NotAStore {
        /// Where the store should be.
        address: String,
        /// What it sent instead of the greeting.
        what: String,
    },
    /// Something listens there, but it does not speak as the store of torchrun's agent does.
    #[error("what listens at {address} is not a TCPStore of PyTorch 2.2 or newer ({what}); older ones speak another protocol. Where it is the store of a torchrun: set PHALANX_STORE_PORT to a free port of rank 0's machine, and rank 0 hosts the store there without it")]
    NotATcpStore {
        /// Where torchrun's store should be.
        address: String,
        /// What it did instead.
        what: String,
    },
    /// A phalanx store of another run listens there.
    #[error("the store at {address} belongs to another run (its mark is {theirs}, that of our run {ours:?} is {ours_mark}): an old job is still running there, end it or choose another --master-port")]
    WrongRun {
        /// Where the store is.
        address: String,
        /// The mark (hash) of the server's run id.
        theirs: String,
        /// Our run id.
        ours: String,
        /// The mark (hash) of our run id.
        ours_mark: String,
    },
    /// The run is right, but the server or this rank is left over from another attempt.
    #[error("refused: run {run_id:?} at {address} is at generation {theirs}, this rank is of generation {ours}: one of the two is left over from before a restart, end it")]
    WrongGeneration {
        /// Where the store is.
        address: String,
        /// The run id.
        run_id: String,
        /// The server's restart count.
        theirs: u32,
        /// Our restart count.
        ours: u32,
    },
    /// One of the two sides has another job token.
    #[error("the store at {address} has another job token than this rank: set the same PHALANX_JOB_TOKEN on every node, or end the older job that still runs there")]
    WrongToken {
        /// Where the store is.
        address: String,
    },
    /// The server speaks another version of the protocol.
    #[error("the store at {address} speaks protocol version {theirs}, this rank speaks {ours}: run the same build of the program on every node")]
    WrongVersion {
        /// Where the store is.
        address: String,
        /// The server's version.
        theirs: u16,
        /// Our version.
        ours: u16,
    },
    /// Some ranks did not come.
    #[error("{what}: ranks {} did not come within {waited:?} (joined {joined}/{expected}): look for their output, or whether their node started", list_text(.missing))]
    MissingRanks {
        /// What the ranks were joining.
        what: String,
        /// Those who did not come.
        missing: Vec<usize>,
        /// How many came.
        joined: usize,
        /// How many should have come.
        expected: usize,
        /// How long this rank waited.
        waited: Duration,
    },
    /// The operating system refused something the rendezvous needs.
    #[error("{call}: {source}")]
    System {
        /// What was asked for.
        call: &'static str,
        /// What the system said.
        source: io::Error,
    },
    /// The store failed while the ranks were meeting.
    #[error(transparent)]
    Store(#[from] StoreError),
}

fn owner_text(owner: Option<&(u32, String)>) -> String {
    owner.map(|(pid, name)| format!(" by pid {pid} ({name})")).unwrap_or_default()
}

/// `1,3` or, when there are many, `1,3,… (17 in all)`: a message stays one line.
pub(super) fn list_text(ranks: &[usize]) -> String {
    const SHOWN_MAX: usize = 16;
    let shown: Vec<String> = ranks.iter().take(SHOWN_MAX).map(ToString::to_string).collect();
    let shown = shown.join(",");
    if ranks.len() > SHOWN_MAX {
        format!("{shown},… ({} in all)", ranks.len())
    } else {
        shown
    }
}
