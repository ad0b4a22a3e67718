//! Why a launcher could not do its work. What happens to the ranks is no error but a [`Report`](crate::Report).

use std::io;

use phalanx_rendezvous::environment::{EnvironmentError, Launcher};
use phalanx_rendezvous::{RendezvousError, StoreError};

/// The launcher failed before or beside its ranks.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LaunchError {
    /// An option makes no sense.
    #[error("{option} {value} is not {expected}")]
    Option {
        /// The option, as on the command line.
        option: &'static str,
        /// What was given.
        value: String,
        /// What would be right.
        expected: String,
    },
    /// An option says something else than the launcher that started this process as a rank.
    #[error("{option} {asked} contradicts {}, which has started this process; by its environment, {says}: leave the option out, ask that launcher for it, or clear its variables to launch here (docs/environment.md lists them)", .launcher.name())]
    Contradiction {
        /// The option, as on the command line.
        option: &'static str,
        /// What was given.
        asked: String,
        /// Who started this process.
        launcher: Launcher,
        /// What the launcher says of the same.
        says: String,
    },
    /// An option calls for another one.
    #[error("{option} is missing: {because}")]
    MissingOption {
        /// The absent option.
        option: &'static str,
        /// Which other option calls for it.
        because: &'static str,
    },
    /// Several real nodes without a common secret.
    #[error("PHALANX_JOB_TOKEN is not set, and a job on several machines needs the same secret on each: make one with `openssl rand -hex 32` and set it on every node before launching")]
    NoJobToken,
    /// The program could not be started.
    #[error("cannot start {program}: {source}{}", start_help(.source))]
    Start {
        /// The program's path.
        program: String,
        /// What the system said.
        source: io::Error,
    },
    /// The limit of processes is too low for the ranks.
    #[error("the control group {group} allows {limit} processes and threads and has {current}: {ranks} ranks need at least {ranks} more, and one for each of their threads; raise its pids.max (docker: --pids-limit; systemd: TasksMax; Kubernetes: podPidsLimit)")]
    TooFewProcesses {
        /// Its folder.
        group: String,
        /// How many it allows.
        limit: u64,
        /// How many it has.
        current: u64,
        /// How many ranks are to be started.
        ranks: usize,
    },
    /// The folder for logs cannot be written.
    #[error("cannot write {path}: {source}; choose another --log-dir")]
    Log {
        /// The file or folder.
        path: String,
        /// What the system said.
        source: io::Error,
    },
    /// The operating system refused something the launcher needs.
    #[error("{call}: {source}")]
    System {
        /// What was asked for.
        call: &'static str,
        /// What the system said.
        source: io::Error,
    },
    /// Two nodes were started with options that do not fit together.
    #[error("node {node} was launched with --nnodes {theirs}, this node with --nnodes {ours}: give the same on every node")]
    NodeMismatch {
        /// The other node.
        node: usize,
        /// Its count of nodes.
        theirs: usize,
        /// Ours.
        ours: usize,
    },
    /// This node was started with other bounds than node 0.
    #[error("node 0 was launched with --nnodes {theirs}, this node with --nnodes {ours}: give the same on every node")]
    TermsMismatch {
        /// Node 0's, `MIN:MAX`.
        theirs: String,
        /// Ours.
        ours: String,
    },
    /// Who was to start a node could not.
    #[error("node {node} will not come: {why}; its own words stand above")]
    NodeGone {
        /// The node.
        node: usize,
        /// What happened.
        why: String,
    },
    /// The file of hosts cannot be read.
    #[error("cannot read {path}: {source}; give another --hostfile")]
    Hostfile {
        /// The file.
        path: String,
        /// What the system said.
        source: io::Error,
    },
    /// A line of the file of hosts makes no sense.
    #[error("line {number} of {path} is {text:?}: a line is a host and, if you like, slots=N")]
    HostfileLine {
        /// The file.
        path: String,
        /// The line's number, from 1.
        number: usize,
        /// What it holds.
        text: String,
    },
    /// Some nodes did not come.
    #[error("nodes {missing} did not come within {seconds} s (joined {joined}/{expected}): start the launcher there with the same --nnodes, --master-addr and --master-port and its own --node-rank")]
    MissingNodes {
        /// Those who did not come.
        missing: String,
        /// How many came.
        joined: usize,
        /// How many should have come.
        expected: usize,
        /// How long this node waited.
        seconds: u64,
    },
    /// Another node's launcher said something that is no message of ours.
    #[error(
        "the launcher of node {node} sent {what}: run the same build of phalanx on every node"
    )]
    Garbled {
        /// The other node.
        node: usize,
        /// What it sent.
        what: String,
    },
    /// The environment holds something ill-formed.
    #[error(transparent)]
    Environment(#[from] EnvironmentError),
    /// The nodes could not meet.
    #[error(transparent)]
    Rendezvous(#[from] RendezvousError),
    /// The store failed while the nodes were meeting.
    #[error(transparent)]
    Store(#[from] StoreError),
}

impl LaunchError {
    /// The process exit code that says what kind of failure it was: 64 usage, 69 unavailable, 71 operating system, 74 files.
    #[must_use]
    pub const fn exit_code(&self) -> u8 {
        match self {
            Self::Option { .. }
            | Self::MissingOption { .. }
            | Self::Contradiction { .. }
            | Self::NoJobToken
            | Self::NodeMismatch { .. }
            | Self::TermsMismatch { .. }
            | Self::HostfileLine { .. }
            | Self::Start { .. }
            | Self::Environment(_) => 64,
            Self::MissingNodes { .. }
            | Self::NodeGone { .. }
            | Self::Garbled { .. }
            | Self::Rendezvous(_)
            | Self::Store(_) => 69,
            Self::Log { .. } | Self::Hostfile { .. } => 74,
            Self::System { .. } | Self::TooFewProcesses { .. } => 71,
        }
    }
}

fn start_help(source: &io::Error) -> &'static str {
    if source.raw_os_error() == Some(rustix::io::Errno::MFILE.raw_os_error()) {
        return "; the limit of open files is reached (ulimit -n): the launcher has eight for each rank";
    }
    match source.kind() {
        io::ErrorKind::NotFound => "; check the path, or build the program first",
        io::ErrorKind::PermissionDenied => "; it is not executable for this user",
        io::ErrorKind::WouldBlock => {
            "; the limit of processes is reached (ulimit -u, or the pids limit of the container)"
        }
        _ => "",
    }
}

/// Turns a system call's error into one that names the call.
pub(crate) fn system<E: Into<io::Error>>(call: &'static str) -> impl Fn(E) -> LaunchError {
    move |error| LaunchError::System { call, source: error.into() }
}
