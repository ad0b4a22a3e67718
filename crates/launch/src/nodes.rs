//! Launchers of several real machines: they meet at node 0's store, compare options, and tell each other of failures.

use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use phalanx_comm::recorder::FlightRecord;
use phalanx_rendezvous::{join, Credentials, RendezvousError, Store, StoreClient, StoreError};

use crate::error::{system, LaunchError};
use crate::messenger::{Message, Messenger};
use crate::plan::LaunchPlan;
use crate::rank::Rank;
use crate::report::Failure;
use crate::signals;

const MEETING: &str = "launch/nodes";
const FAILURE_KEY: &str = "launch/failure";
/// Node 0 waits this long for the others after its own ranks have ended: they may write checkpoints.
const DONE_MAX: Duration = Duration::from_secs(3600);
/// After a failure node 0 waits this long for the other nodes' records.
const FLIGHT_MAX: Duration = Duration::from_secs(2);
/// A wait for news is renewed this often; a cancelled one ends at once.
const NEWS_WAIT: Duration = Duration::from_secs(60);

/// The connection between this launcher and the others.
#[derive(Debug)]
pub(crate) struct Nodes {
    store: Arc<StoreClient>,
    mine: usize,
    count: usize,
    news: Arc<Mutex<Option<Failure>>>,
    /// Readable (closed) when there is news.
    signal: UnixStream,
    watcher: Option<JoinHandle<()>>,
    messenger: Messenger,
}

impl Nodes {
    /// Meets the other launchers; returns how many ranks each node starts, too.
    pub(crate) fn meet(
        plan: &LaunchPlan,
        mine: usize,
        credentials: Credentials,
        deadline: Instant,
    ) -> Result<(Self, Vec<usize>), LaunchError> {
        let (start, count) = (Instant::now(), plan.node_count());
        let store =
            StoreClient::connect(plan.master_addr(), plan.master_port, credentials, deadline)?;
        let ours = format!("{count} {}", plan.ranks_per_node);
        let said = join(&store, MEETING, mine, count, ours.as_bytes(), deadline)
            .map_err(|error| missing_nodes(error, start))?;
        let ranks_of_nodes = said
            .iter()
            .enumerate()
            .map(|(node, said)| ranks_of_node(node, said, count))
            .collect::<Result<Vec<_>, _>>()?;
        let nodes = Self::watching(Arc::new(store), mine, count)?;
        Ok((nodes, ranks_of_nodes))
    }

    fn watching(store: Arc<StoreClient>, mine: usize, count: usize) -> Result<Self, LaunchError> {
        let (signal, write) = UnixStream::pair().map_err(system("socketpair"))?;
        let news = Arc::new(Mutex::new(None));
        let watcher = {
            let (store, news) = (Arc::clone(&store), Arc::clone(&news));
            thread::Builder::new()
                .name("news of other nodes".to_owned())
                .spawn(move || watch(&*store, mine, &news, write))
                .map_err(system("start a thread"))?
        };
        let messenger = Messenger::start(Arc::clone(&store))?;
        Ok(Self { store, mine, count, news, signal, watcher: Some(watcher), messenger })
    }

    /// The connection to node 0's store.
    pub(crate) fn store(&self) -> &StoreClient {
        &self.store
    }

    /// Becomes readable when another node has failed.
    pub(crate) fn fd(&self) -> BorrowedFd<'_> {
        self.signal.as_fd()
    }

    /// The failure of another node, if there is one.
    pub(crate) fn news(&self) -> Option<Failure> {
        self.news.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    /// Tells the others that this node failed; the first one to say so counts. Does not wait, as [`Nodes::publish`].
    pub(crate) fn announce(&self, report: &str, code: u8) {
        let value = format!("{} {code} {report}", self.mine).into_bytes();
        self.messenger.send(Message { key: FAILURE_KEY.to_owned(), value, is_first: true });
    }

    /// Puts down what the ranks of this node have recorded until now, for node 0.
    pub(crate) fn publish(&self, ranks: &[Rank]) {
        for rank in ranks.iter().filter(|_| !self.is_first()) {
            match rank.recorded() {
                Ok(value) => {
                    let key = flight_key(rank.number);
                    self.messenger.send(Message { key, value, is_first: false });
                }
                Err(error) => {
                    tracing::debug!(%error, rank = rank.number, "its operations cannot be read");
                }
            }
        }
    }

    /// The end of what this launcher has to say: waits a short while until the others can hear it.
    pub(crate) fn flush(&mut self) {
        self.messenger.flush();
    }

    /// On node 0: what the ranks of the other nodes have recorded, of those who put it down in time.
    pub(crate) fn gather(&self, ranks: impl Iterator<Item = usize>) -> Vec<FlightRecord> {
        if !self.is_first() {
            return Vec::new();
        }
        let deadline = Instant::now() + FLIGHT_MAX;
        let record = |rank| {
            let bytes = self.store.get(&flight_key(rank), deadline);
            let bytes = bytes.inspect_err(|error| {
                tracing::debug!(%error, rank, "its operations are not known here");
            });
            FlightRecord::decode(&bytes.ok()?)
        };
        ranks.filter_map(record).collect()
    }

    /// Tells the others that the user ended the job here.
    pub(crate) fn announce_end(&self, signal: i32) {
        let (node, name) = (self.mine, signals::name(signal));
        let report =
            format!("error[PHX0704]: the job was ended by {name} to the launcher of node {node}");
        self.announce(&report, u8::try_from(128 + signal).unwrap_or(70));
    }

    /// Says that this node's ranks have ended well. The answer is a socket that becomes readable when this launcher may
    /// end: that of node 0, which takes the store with it, when the ranks of all nodes have ended.
    pub(crate) fn finish(&self) -> Result<UnixStream, LaunchError> {
        let (signal, write) = UnixStream::pair().map_err(system("socketpair"))?;
        let (store, mine) = (Arc::clone(&self.store), self.mine);
        let awaited = if self.is_first() { 1..self.count } else { 0..0 };
        let say_and_hear = move || {
            let deadline = Instant::now() + DONE_MAX;
            // An error is the end of the wait, too: node 0 has gone, the store was cancelled, or the time is over.
            let heard = store.set(&done_key(mine), b"").and_then(|()| {
                awaited
                    .into_iter()
                    .try_for_each(|node| store.get(&done_key(node), deadline).map(drop))
            });
            if let Err(error) = heard {
                tracing::debug!(%error, "left before the other nodes were done");
            }
            drop(write);
        };
        thread::Builder::new()
            .name("end of other nodes".to_owned())
            .spawn(say_and_hear)
            .map_err(system("start a thread"))?;
        Ok(signal)
    }

    /// Whether this is node 0.
    pub(crate) const fn is_first(&self) -> bool {
        self.mine == 0
    }
}

/// Where a node says that it is there; or who was to start it, that it will not come.
pub(crate) fn meeting_key(node: usize) -> String {
    format!("{MEETING}/{node:08}")
}

fn flight_key(rank: usize) -> String {
    format!("launch/flight/{rank}")
}

fn done_key(node: usize) -> String {
    format!("launch/done/{node}")
}

impl Drop for Nodes {
    fn drop(&mut self) {
        self.store.cancel();
        if let Some(watcher) = self.watcher.take() {
            if watcher.join().is_err() {
                tracing::error!("the thread that waits for news of other nodes panicked");
            }
        }
    }
}

/// Waits for the first failure of any node; closing `signal` wakes the launcher.
fn watch(store: &dyn Store, mine: usize, news: &Mutex<Option<Failure>>, signal: UnixStream) {
    let failure = loop {
        match store.get(FAILURE_KEY, Instant::now() + NEWS_WAIT) {
            Ok(text) => match parse_failure(&String::from_utf8_lossy(&text)) {
                Some(Failure::Node { node, .. }) if node == mine => return,
                Some(other) => break other,
                None => break gone("it left an unreadable message"),
            },
            Err(StoreError::Timeout { .. }) => {}
            Err(StoreError::Cancelled { .. }) => return,
            Err(error) => break gone(&error.to_string()),
        }
    };
    *news.lock().unwrap_or_else(PoisonError::into_inner) = Some(failure);
    // Closing it makes the other end readable.
    drop(signal);
}

fn gone(why: &str) -> Failure {
    let report =
        format!("error[PHX0703]: the launcher of node 0 is gone: {why} | help: look at its output");
    Failure::Node { node: 0, report, code: 69 }
}

fn parse_failure(text: &str) -> Option<Failure> {
    let (node, rest) = text.split_once(' ')?;
    let (code, report) = rest.split_once(' ')?;
    Some(Failure::Node {
        node: node.parse().ok()?,
        report: report.to_owned(),
        code: code.parse().ok()?,
    })
}

fn ranks_of_node(node: usize, said: &[u8], ours: usize) -> Result<usize, LaunchError> {
    let text = String::from_utf8_lossy(said).into_owned();
    if let Some(why) = text.strip_prefix("gone ") {
        return Err(LaunchError::NodeGone { node, why: why.to_owned() });
    }
    let numbers = text.split_once(' ').and_then(|(theirs, ranks)| {
        Some((theirs.parse::<usize>().ok()?, ranks.parse::<usize>().ok()?))
    });
    match numbers {
        Some((theirs, _)) if theirs != ours => {
            Err(LaunchError::NodeMismatch { node, theirs, ours })
        }
        Some((_, ranks)) => Ok(ranks),
        None => Err(LaunchError::Garbled { node, what: format!("{text:?}") }),
    }
}

fn missing_nodes(error: RendezvousError, start: Instant) -> LaunchError {
    match error {
        RendezvousError::MissingRanks { missing, joined, expected, .. } => {
            let missing: Vec<String> = missing.iter().map(ToString::to_string).collect();
            let seconds = start.elapsed().as_secs();
            LaunchError::MissingNodes { missing: missing.join(","), joined, expected, seconds }
        }
        other => other.into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_nodes_say_is_checked() {
        assert_eq!(ranks_of_node(1, b"4 2", 4).unwrap(), 2);
        let message = |said| ranks_of_node(1, said, 4).unwrap_err().to_string();
        assert!(message(b"3 2").contains("node 1 was launched with --nnodes 3"));
        assert!(message(b"gone it ended").contains("node 1 will not come: it ended"));
        for garbage in [&b""[..], b"4", b"x y", b"\xff\xff"] {
            assert!(message(garbage).contains("same build"), "{garbage:?}");
        }
    }

    #[test]
    fn a_failure_keeps_its_report_whole() {
        let Some(Failure::Node { node, report, code }) = parse_failure("1 70 error[X]: a b | c")
        else {
            panic!("it is well-formed");
        };
        assert_eq!((node, report.as_str(), code), (1, "error[X]: a b | c", 70));
        assert!(parse_failure("nonsense").is_none());
    }
}
