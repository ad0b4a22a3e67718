//! What a group knows about its ranks: who they are, whether they live, and the first failure.

use std::collections::VecDeque;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use rustix::event::EventfdFlags;

use super::connection::Control;
use super::liveness::{self, Liveness};
use super::point::Points;
use super::reconnect::{Returned, Way};
use super::wire::Frame;
use crate::call::Call;
use crate::error::{Error, LastCall, Result};
use crate::memory::board::Board;
use crate::recorder::GroupPart;

/// A rank's process.
#[derive(Debug, Clone)]
pub(crate) struct Identity {
    pub(crate) host: String,
    pub(crate) pid: u32,
    /// On this machine.
    pub(crate) local: bool,
}

/// Calls that have started and not ended, oldest first.
#[derive(Debug, Default)]
pub(crate) struct Journal {
    pub(crate) next_seq: u64,
    pub(crate) open: VecDeque<Arc<Call>>,
}

impl Journal {
    /// How many collectives have ended, counted without gaps.
    pub(crate) fn completed(&self) -> u64 {
        self.open.front().map_or(self.next_seq, |call| call.seq())
    }
}

const STAYS: u64 = u64::MAX;
pub(crate) const NOBODY: usize = usize::MAX;
/// A peer that takes no news for so long hears them when it reads that our socket is closed.
const BROADCAST_LIMIT: Duration = Duration::from_millis(300);

/// How long a rank that leaves waits until those on other machines know: as long as they may be silent
/// without being dead, but no longer than this. A process that ends sooner may take with it what the
/// kernel has not yet sent, and looks like one that died.
const FAREWELL_MAX: Duration = Duration::from_secs(10);
/// The same for a failure, where a connection is lost at that moment: who cannot be told has so long to come back.
const FAREWELL_AFTER_FAILURE_MAX: Duration = Duration::from_millis(300);
/// And where it seems to be there: what was written may be on a connection of which this end does not know yet that it is lost.
const HEARD_OF_FAILURE_MAX: Duration = Duration::from_millis(100);

/// How long the reason why a socket failed may take to come; why not less: `Links::broken`.
pub(crate) const VERDICT_MAX: Duration = Duration::from_millis(300);

/// A rank's orderly end.
#[derive(Debug)]
struct Departure {
    completed: AtomicU64,
    panicking: AtomicBool,
    /// It knows that the group has failed: it has said so.
    knows_failure: AtomicBool,
}

/// A memfd that a peer has sent.
#[derive(Debug)]
struct Parcel {
    peer: usize,
    id: u64,
    bytes: u64,
    fd: OwnedFd,
}

/// What connects this rank with the others, by peer.
#[derive(Debug)]
pub(crate) struct Sockets {
    pub(crate) controls: Vec<Option<Control>>,
    /// Copies of the data sockets, to see whether they live.
    pub(crate) data: Vec<Option<OwnedFd>>,
    /// How lost control connections come back.
    pub(crate) ways: Vec<Option<Way>>,
}

/// The ranks of a group, as this one sees them.
#[derive(Debug)]
pub(crate) struct Peers {
    pub(crate) rank: usize,
    pub(crate) identities: Vec<Identity>,
    /// More ranks than cores on this machine.
    pub(crate) is_crowded: bool,
    pub(crate) controls: Vec<Option<Control>>,
    /// Copies of the data sockets, to see whether they live.
    pub(crate) data: Vec<Option<OwnedFd>>,
    pub(crate) ways: Vec<Option<Way>>,
    pub(crate) liveness: Liveness,
    pub(crate) wake: OwnedFd,
    pub(crate) points: Points,
    /// For the flight recorder.
    pub(crate) part: GroupPart,
    failed: AtomicBool,
    failure: OnceLock<Error>,
    departures: Vec<Departure>,
    /// What each has started last, as it said in its last heartbeat.
    pub(crate) heard: Mutex<Vec<LastCall>>,
    /// Where this rank's own last call stands.
    pub(crate) own_board: OnceLock<Arc<Board>>,
    parcels: Mutex<Vec<Parcel>>,
    parcel_came: Condvar,
    returned: Mutex<Vec<Returned>>,
    journal: Mutex<Journal>,
    /// The rank of another machine whose data is waited for; [`NOBODY`].
    pub(crate) awaited: AtomicUsize,
    /// This rank's owner let the group go while it unwound from a panic.
    panicked: AtomicBool,
    leaving: AtomicBool,
    closed: AtomicBool,
}

pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // What these mutexes guard is valid after every statement.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Peers {
    pub(crate) fn new(
        rank: usize,
        identities: Vec<Identity>,
        sockets: Sockets,
        liveness: Liveness,
        part: GroupPart,
    ) -> Result<Self> {
        let Sockets { controls, data, ways } = sockets;
        let wake = rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)
            .map_err(|error| Error::system(rank, "eventfd", error))?;
        let departures = identities
            .iter()
            .map(|_| Departure {
                completed: AtomicU64::new(STAYS),
                panicking: AtomicBool::new(false),
                knows_failure: AtomicBool::new(false),
            })
            .collect();
        let heard = Mutex::new(vec![LastCall::Unknown; identities.len()]);
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let is_crowded = identities.iter().filter(|identity| identity.local).count() > cores;
        Ok(Self {
            rank,
            points: Points::new(identities.len(), is_crowded),
            identities,
            is_crowded,
            controls,
            data,
            ways,
            liveness,
            wake,
            part,
            failed: AtomicBool::new(false),
            failure: OnceLock::new(),
            departures,
            heard,
            own_board: OnceLock::new(),
            parcels: Mutex::default(),
            parcel_came: Condvar::new(),
            returned: Mutex::default(),
            journal: Mutex::default(),
            awaited: AtomicUsize::new(NOBODY),
            panicked: AtomicBool::new(false),
            leaving: AtomicBool::new(false),
            closed: AtomicBool::new(false),
        })
    }

    pub(crate) fn world_size(&self) -> usize {
        self.identities.len()
    }

    pub(crate) fn journal(&self) -> MutexGuard<'_, Journal> {
        lock(&self.journal)
    }

    /// The first failure, if there is one.
    pub(crate) fn failure(&self) -> Option<Error> {
        if self.failed.load(Ordering::Acquire) {
            self.failure.get().cloned()
        } else {
            None
        }
    }

    /// Records a failure found here and tells everybody. Returns the group's first failure, which
    /// may be another one.
    pub(crate) fn fail(&self, error: Error) -> Error {
        let first = self.fail_quietly(error);
        if let Some(mine) = first {
            self.broadcast(&Frame::Failed(mine).encode());
        }
        self.failure().unwrap_or(Error::Aborted { rank: self.rank, reason: String::new() })
    }

    /// Records a failure that the others know of. `Some` when it is the first.
    pub(crate) fn fail_quietly(&self, error: Error) -> Option<Error> {
        let first = self.failure.set(error).is_ok();
        if let (true, Some(failure)) = (first, self.failure.get()) {
            crate::recorder::failed(failure, &self.part);
        }
        self.failed.store(true, Ordering::Release);
        self.points.wake();
        self.parcel_came.notify_all();
        first.then(|| self.failure.get().cloned()).flatten()
    }

    pub(crate) fn broadcast(&self, frame: &[u8]) {
        let controls = || self.controls.iter().flatten();
        let (busy, idle): (Vec<&Control>, Vec<&Control>) = controls().partition(|c| c.is_busy());
        // A peer that reads nothing must not keep the news from the others.
        for control in idle.into_iter().chain(busy) {
            // A peer that cannot be told has gone itself, or will notice our closed socket.
            if let Err(error) = control.send(frame.to_vec(), None, BROADCAST_LIMIT) {
                tracing::debug!(%error, "a peer could not be told");
            }
        }
    }

    pub(crate) fn send(
        &self,
        peer: usize,
        frame: &Frame,
        fd: Option<BorrowedFd<'_>>,
    ) -> Result<()> {
        let Some(control) = self.controls.get(peer).and_then(Option::as_ref) else { return Ok(()) };
        // A peer that does not read for so long is dead, and the monitor says so first.
        let limit = self.liveness.dead_after * 2;
        control.send(frame.encode(), fd, limit).map_err(|error| self.unsent(peer, error))
    }

    /// Sends an encoded part of a message, of which there may be many.
    pub(crate) fn send_part(&self, peer: usize, part: Vec<u8>) -> Result<()> {
        let Some(control) = self.controls.get(peer).and_then(Option::as_ref) else { return Ok(()) };
        let limit = self.liveness.dead_after * 2;
        control.send_in_turn(part, limit).map_err(|error| self.unsent(peer, error))
    }

    /// The monitor's verdict on why the socket failed is the better error, if it comes soon.
    fn unsent(&self, peer: usize, error: std::io::Error) -> Error {
        self.verdict().unwrap_or_else(|| self.connection_lost(peer, "send", error))
    }

    /// Waits briefly for the monitor to say why a socket failed.
    pub(crate) fn verdict(&self) -> Option<Error> {
        let deadline = Instant::now() + VERDICT_MAX;
        let mut parcels = lock(&self.parcels);
        while self.failure().is_none() && Instant::now() < deadline {
            let (guard, _) = self
                .parcel_came
                .wait_timeout(parcels, Duration::from_millis(5))
                .unwrap_or_else(PoisonError::into_inner);
            parcels = guard;
        }
        self.failure()
    }

    pub(crate) fn connection_lost(
        &self,
        peer: usize,
        call: &'static str,
        source: std::io::Error,
    ) -> Error {
        let Identity { host, pid, .. } = self.identities[peer].clone();
        Error::ConnectionLost { peer, host, pid, call, source: Arc::new(source) }
    }

    /// The error for data of `peer` that is not what it has sent.
    pub(crate) fn damaged(&self, peer: usize, during: String, expected: u32, actual: u32) -> Error {
        let Identity { host, pid, .. } = self.identities[peer].clone();
        let receiver = self.identities[self.rank].host.clone();
        Error::DataDamaged { peer, host, pid, rank: self.rank, receiver, during, expected, actual }
    }

    /// The error for a peer that has been silent for too long.
    pub(crate) fn not_responding(&self, peer: usize, silent: Duration) -> Error {
        let Identity { host, pid, local } = self.identities[peer].clone();
        let state = match &self.controls[peer] {
            Some(control) if !local => match control.socket() {
                Some(socket) => liveness::connection_state(socket.as_fd()),
                None => "the connection is closed".to_owned(),
            },
            _ => liveness::process_state(pid),
        };
        Error::NotResponding { peer, host, pid, silent, state, during: self.during() }
    }

    /// What this rank is waiting for, for messages.
    pub(crate) fn during(&self) -> String {
        let journal = self.journal();
        match journal.open.front() {
            Some(call) => match call.seq().checked_sub(1) {
                Some(before) => format!("{} (last completed: #{before})", call.record),
                None => call.record.to_string(),
            },
            None => format!("no collective (this rank had finished {})", journal.next_seq),
        }
    }

    /// A peer said goodbye.
    pub(crate) fn depart(&self, peer: usize, completed: u64, panicking: bool) {
        let departure = &self.departures[peer];
        departure.panicking.store(panicking, Ordering::Relaxed);
        departure.completed.store(completed, Ordering::Release);
        self.points.wake();
    }

    /// A peer said that the group has failed.
    pub(crate) fn tells_failure(&self, peer: usize) {
        self.departures[peer].knows_failure.store(true, Ordering::Release);
    }

    pub(crate) fn knows_failure(&self, peer: usize) -> bool {
        self.departures[peer].knows_failure.load(Ordering::Acquire)
    }

    pub(crate) fn has_departed(&self, peer: usize) -> bool {
        self.departures[peer].completed.load(Ordering::Acquire) != STAYS
    }

    /// The error for waiting on `peer` in collective `seq`, if it can no longer come.
    pub(crate) fn gone_before(&self, peer: usize, seq: u64, during: &str) -> Option<Error> {
        let departure = &self.departures[peer];
        let completed = departure.completed.load(Ordering::Acquire);
        if completed == STAYS || completed > seq {
            return None;
        }
        let Identity { host, pid, .. } = self.identities[peer].clone();
        Some(Error::PeerLeft {
            peer,
            host,
            pid,
            completed,
            panicking: departure.panicking.load(Ordering::Relaxed),
            rank: self.rank,
            during: during.to_owned(),
        })
    }

    pub(crate) fn deliver(&self, peer: usize, id: u64, bytes: u64, fd: OwnedFd) {
        lock(&self.parcels).push(Parcel { peer, id, bytes, fd });
        self.parcel_came.notify_all();
    }

    /// The memfd that `peer` has sent for region `id`, if it has come.
    pub(crate) fn try_parcel(&self, peer: usize, id: u64) -> Option<OwnedFd> {
        let mut parcels = lock(&self.parcels);
        let at = parcels.iter().position(|parcel| parcel.peer == peer && parcel.id == id)?;
        Some(parcels.swap_remove(at).fd)
    }

    /// Waits for the memfd that `peer` sends for region `id`. When the group has failed it waits a
    /// moment longer: ranks that were faster may have failed already over a call of their own, and
    /// that is the answer to this rank's first call, not to its joining.
    pub(crate) fn take_parcel(
        &self,
        peer: usize,
        id: u64,
        deadline: Instant,
    ) -> Result<Option<(OwnedFd, u64)>> {
        let mut parcels = lock(&self.parcels);
        let mut failed_at = None;
        loop {
            if let Some(at) = parcels.iter().position(|p| p.peer == peer && p.id == id) {
                let parcel = parcels.swap_remove(at);
                return Ok(Some((parcel.fd, parcel.bytes)));
            }
            let now = Instant::now();
            if let Some(error) = self.failure() {
                if now > *failed_at.get_or_insert(now) + Duration::from_millis(300) {
                    return Err(error);
                }
            }
            if self.has_departed(peer) || now >= deadline {
                return Ok(None);
            }
            let (guard, _) = self
                .parcel_came
                .wait_timeout(parcels, Duration::from_millis(20))
                .unwrap_or_else(PoisonError::into_inner);
            parcels = guard;
        }
    }

    /// The owner lets the group go. Any thread may say goodbye later: what this one is in goes along.
    pub(crate) fn note_panic(&self) {
        if std::thread::panicking() {
            self.panicked.store(true, Ordering::Release);
        }
    }

    /// Says goodbye, once, and waits briefly until those on other machines have heard it: what is under
    /// way to them would be lost with the sockets of a process that ends. The group's calls are over.
    pub(crate) fn close(&self) {
        if self.leaving.swap(true, Ordering::AcqRel) {
            return;
        }
        let completed = self.journal().completed();
        let panicking = self.panicked.load(Ordering::Acquire);
        match self.failure() {
            // Who has heard of it from nobody yet must not take our closed socket for the cause.
            Some(error) => self.broadcast(&Frame::Failed(error).encode()),
            None => self.broadcast(&Frame::Goodbye { completed, panicking }.encode()),
        }
        self.await_acknowledgements();
        self.closed.store(true, Ordering::Release);
        self.wake();
    }

    fn await_acknowledgements(&self) {
        let start = Instant::now();
        let mut parcels = lock(&self.parcels);
        loop {
            let failure = self.failure();
            let limit = match failure {
                Some(_) => FAREWELL_AFTER_FAILURE_MAX,
                None => self.liveness.dead_after.min(FAREWELL_MAX),
            };
            let blamed = failure.as_ref().and_then(Error::blamed);
            let after = start.elapsed();
            let listens = |peer: usize, control: &Control| {
                // After a failure others end as well: only who may not have been told yet is waited for.
                let is_told = || {
                    self.knows_failure(peer)
                        || after >= HEARD_OF_FAILURE_MAX && control.socket().is_some()
                };
                control.is_resumable()
                    && blamed != Some(peer)
                    && !self.has_departed(peer)
                    && !(failure.is_some() && is_told())
                    && !control.is_acknowledged()
            };
            let mut controls = self.controls.iter().enumerate();
            let is_heard = !controls.any(|(peer, control)| {
                control.as_ref().is_some_and(|control| listens(peer, control))
            });
            if is_heard || after >= limit {
                return;
            }
            let waited = self.parcel_came.wait_timeout(parcels, Duration::from_millis(5));
            parcels = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// A peer has taken in so many of this rank's frames.
    pub(crate) fn acknowledged(&self, peer: usize, frames: u64) {
        if let Some(control) = self.controls[peer].as_ref().filter(|c| c.is_resumable()) {
            control.acknowledge(frames);
            if self.leaving.load(Ordering::Acquire) {
                self.parcel_came.notify_all();
            }
        }
    }

    /// A connection for the monitor.
    pub(crate) fn give_back(&self, returned: Returned) {
        lock(&self.returned).push(returned);
        self.wake();
    }

    pub(crate) fn take_returned(&self) -> Vec<Returned> {
        std::mem::take(&mut lock(&self.returned))
    }

    fn wake(&self) {
        if let Err(error) = rustix::io::write(&self.wake, &1_u64.to_le_bytes()) {
            tracing::debug!(%error, "the monitor could not be woken");
        }
    }

    /// Whether a thread says goodbye, or has said it.
    pub(crate) fn is_leaving(&self) -> bool {
        self.leaving.load(Ordering::Acquire)
    }

    pub(crate) fn is_closed(&self) -> bool {
        self.closed.load(Ordering::Acquire)
    }
}

impl Peers {
    /// The group's failure, where there must be one.
    pub(crate) fn during_failure(&self) -> Error {
        let unnamed = || Error::PeerFailed { rank: self.rank, message: "unknown".to_owned() };
        self.failure().unwrap_or_else(unnamed)
    }
}
