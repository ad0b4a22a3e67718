//! Messages between two ranks: `send` and `receive`. Messages of a pair are matched in the order of the calls.
//!
//! Between ranks of one machine they lie in memory that both have mapped: [`outbox`] and [`inbox`].
//!
//! Between machines they travel on the control sockets. The receiver says that it is ready and what it expects; only
//! then does the sender send, in parts, so nothing is buffered that nobody waits for. A thread of
//! its own sends and the monitor takes in, so two ranks may send each other large messages at once.

use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::inbox::{self, Inbox};
use super::outbox::{self, Outbox};
use super::part::Part;
use super::peers::Peers;
use super::wire::Frame;
use crate::call::{Call, CallMemory};
use crate::error::{Error, Result};
use crate::fingerprint::{CallRecord, Op};
use crate::memory::patience;

/// A message travels in parts of this size.
const PART_BYTES: usize = 1 << 18;

/// How long to watch for a message before sleeping: about what a wake-up takes. The core that it takes may be the one on which the peer is to
/// write it, also where there are as many cores as ranks, if other programs have them.
const PATIENCE: Duration = Duration::from_micros(20);

/// An open call of one side.
#[derive(Debug)]
struct Open {
    peer: usize,
    index: u64,
    call: Arc<Call>,
    /// Receiving: how much has come.
    filled: usize,
}

#[derive(Debug, Default)]
struct Table {
    sends: Vec<Open>,
    receives: Vec<Open>,
    /// Peers that are ready for a message, and what they expect.
    ready: Vec<(usize, u64, CallRecord)>,
    /// What peers have called of messages between GPUs.
    announced: Vec<(usize, u64, CallRecord)>,
}

/// The messages of a group that are under way.
#[derive(Debug)]
pub(crate) struct Points {
    table: Mutex<Table>,
    changed: Condvar,
    /// Threads that wait for another one of this rank, which takes in a message before theirs or writes it.
    sleeping: AtomicUsize,
    /// Whether the sending thread runs.
    sending: AtomicBool,
    sent: Vec<AtomicU64>,
    received: Vec<AtomicU64>,
    /// The same of messages between GPUs, which have an order of their own.
    device_sent: Vec<AtomicU64>,
    device_received: Vec<AtomicU64>,
    /// Messages to and from ranks of this machine.
    outboxes: Vec<Mutex<Outbox>>,
    inboxes: Vec<Mutex<Inbox>>,
    /// More ranks than cores.
    is_crowded: bool,
}

impl Points {
    pub(crate) fn new(world_size: usize, is_crowded: bool) -> Self {
        let counters = || (0..world_size).map(|_| AtomicU64::new(0)).collect();
        Self {
            table: Mutex::default(),
            changed: Condvar::new(),
            sleeping: AtomicUsize::new(0),
            sending: AtomicBool::new(false),
            sent: counters(),
            received: counters(),
            device_sent: counters(),
            device_received: counters(),
            outboxes: (0..world_size).map(|_| Mutex::default()).collect(),
            inboxes: (0..world_size).map(|_| Mutex::default()).collect(),
            is_crowded,
        }
    }

    pub(super) fn outbox(&self, peer: usize) -> &Mutex<Outbox> {
        &self.outboxes[peer]
    }

    pub(super) fn inbox(&self, peer: usize) -> &Mutex<Inbox> {
        &self.inboxes[peer]
    }

    fn table(&self) -> MutexGuard<'_, Table> {
        // The table is valid after every statement.
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn wake(&self) {
        self.changed.notify_all();
    }

    /// Sleeps until something changes, at most `limit`.
    pub(super) fn sleep(&self, limit: Duration) {
        self.sleeping.fetch_add(1, Ordering::SeqCst);
        drop(self.changed.wait_timeout(self.table(), limit));
        self.sleeping.fetch_sub(1, Ordering::SeqCst);
    }

    /// Wakes those who [sleep](Self::sleep): most of the time nobody, without a system call then. Who is about to may be missed.
    pub(super) fn wake_sleeping(&self) {
        if self.sleeping.load(Ordering::SeqCst) > 0 {
            self.wake();
        }
    }

    /// Watches for as long as a thread does that is about to sleep: whether it came.
    pub(super) fn watch(&self, reached: impl Fn() -> bool) -> bool {
        let (spins, is_alone) = (patience::spins(false), !self.is_crowded);
        reached() || is_alone && patience::watch(Instant::now(), PATIENCE, spins, reached)
    }

    /// The number of the next message to (or from) `peer`.
    pub(crate) fn next_index(&self, peer: usize, sending: bool) -> u64 {
        let counters = if sending { &self.sent } else { &self.received };
        counters[peer].load(Ordering::Relaxed)
    }

    /// As [`Points::next_index`], for a message that begins.
    pub(super) fn next(&self, peer: usize, sending: bool) -> u64 {
        let counters = if sending { &self.sent } else { &self.received };
        counters[peer].fetch_add(1, Ordering::Relaxed)
    }

    pub(crate) fn ready(&self, peer: usize, index: u64, record: CallRecord) {
        self.table().ready.push((peer, index, record));
        self.changed.notify_all();
    }

    pub(crate) fn announced(&self, peer: usize, index: u64, record: CallRecord) {
        self.table().announced.push((peer, index, record));
    }

    /// What `peer` has called as the other side of `op`, message `index` between the GPUs of the two.
    pub(crate) fn take_announced(&self, peer: usize, op: Op, index: u64) -> Option<CallRecord> {
        let other = if op == Op::Send { Op::Receive } else { Op::Send };
        let mut table = self.table();
        let is_side = |one: &(usize, u64, CallRecord)| one.0 == peer && one.2.op == other;
        // Short messages may end before anybody asks for their other side.
        table.announced.retain(|one| !is_side(one) || one.1 >= index);
        let fits = |one: &(usize, u64, CallRecord)| is_side(one) && one.1 == index;
        let at = table.announced.iter().position(fits)?;
        Some(table.announced.swap_remove(at).2)
    }

    /// Takes in a part of a message; false when nobody asked for it.
    pub(super) fn arrived(&self, peer: usize, Part { index, bytes }: Part<'_>) -> bool {
        let mut table = self.table();
        let Some(at) = table.receives.iter().position(|o| o.peer == peer && o.index == index)
        else {
            return false;
        };
        let open = &mut table.receives[at];
        let mut state = open.call.lock();
        let CallMemory::Private(buffer) = &mut state.memory else { return false };
        let Some(place) = buffer.get_mut(open.filled..open.filled + bytes.len()) else {
            return false;
        };
        place.copy_from_slice(bytes);
        let complete = open.filled + bytes.len() == buffer.len();
        drop(state);
        open.filled += bytes.len();
        if complete {
            table.receives.swap_remove(at).call.finish(Ok(()));
            self.changed.notify_all();
        }
        true
    }
}

/// Starts sending `bytes`, which are read before this returns.
pub(crate) fn start_send(
    peers: &Arc<Peers>,
    peer: usize,
    call: Arc<Call>,
    bytes: &[u8],
) -> Result<()> {
    if peers.identities[peer].local {
        return outbox::start(peers, peer, call, bytes);
    }
    call.lock().memory = CallMemory::Private(bytes.to_vec());
    let points = &peers.points;
    let index = points.next(peer, true);
    points.table().sends.push(Open { peer, index, call, filled: 0 });
    points.changed.notify_all();
    if !points.sending.swap(true, Ordering::AcqRel) {
        let ours = Arc::clone(peers);
        let thread = std::thread::Builder::new().name(format!("phalanx-send-{}", peers.rank));
        // Not joined: it ends when the group is closed.
        let started = thread.spawn(move || send_all(&ours));
        drop(started.map_err(|error| Error::system(peers.rank, "start a thread", error))?);
    }
    Ok(())
}

/// Tells `peer` of a message between GPUs, so that both sides can compare; its number among them.
pub(crate) fn announce(peers: &Peers, peer: usize, record: &CallRecord) -> Result<u64> {
    let points = &peers.points;
    let counters =
        if record.op == Op::Send { &points.device_sent } else { &points.device_received };
    let index = counters[peer].fetch_add(1, Ordering::Relaxed);
    let told = peers.send(peer, &Frame::Announced { index, record: record.clone() }, None);
    // Whoever waits for the message says that the peer has left.
    let told = told.or_else(|error| if peers.has_departed(peer) { Ok(()) } else { Err(error) });
    told.map(|()| index)
}

/// Asks for a message, as long as the call's segment.
pub(crate) fn start_receive(peers: &Peers, peer: usize, call: Arc<Call>) -> Result<()> {
    if peers.identities[peer].local {
        return inbox::start(peers, peer, call);
    }
    call.lock().memory = CallMemory::Private(vec![0; call.segment]);
    let index = peers.points.next(peer, false);
    let record = call.record.clone();
    peers.points.table().receives.push(Open { peer, index, call, filled: 0 });
    let asked = peers.send(peer, &Frame::Ready { index, record }, None);
    // Whoever waits for the message says that the peer has left.
    asked.or_else(|error| if peers.has_departed(peer) { Ok(()) } else { Err(error) })
}

/// Sends the messages whose receivers are ready, until the group is closed.
fn send_all(peers: &Peers) {
    let mut table = peers.points.table();
    while !peers.is_closed() && peers.failure().is_none() {
        let Some((send, expected)) = table.take_ready() else {
            let (guard, _) = peers
                .points
                .changed
                .wait_timeout(table, Duration::from_millis(200))
                .unwrap_or_else(PoisonError::into_inner);
            table = guard;
            continue;
        };
        drop(table);
        let result = transmit(peers, &send, &expected).map_err(|error| {
            let during = send.call.record.to_string();
            peers.gone_before(send.peer, u64::MAX - 1, &during).unwrap_or(error)
        });
        send.call.finish(result.map_err(|error| peers.fail(error)));
        peers.points.wake();
        table = peers.points.table();
    }
}

impl Table {
    /// Whether the peer has yet to do its part of `call`.
    fn waits(&self, call: &Call) -> bool {
        let open = self.sends.iter().chain(&self.receives);
        open.into_iter().any(|open| std::ptr::eq(Arc::as_ptr(&open.call), call))
    }

    /// A message whose receiver is ready, and what that one expects.
    fn take_ready(&mut self) -> Option<(Open, CallRecord)> {
        let Self { sends, ready, .. } = self;
        let (at, ready_at) = sends.iter().enumerate().find_map(|(at, send)| {
            let entry = ready.iter().position(|r| r.0 == send.peer && r.1 == send.index);
            entry.map(|ready_at| (at, ready_at))
        })?;
        Some((sends.swap_remove(at), ready.swap_remove(ready_at).2))
    }
}

fn transmit(peers: &Peers, send: &Open, expected: &CallRecord) -> Result<()> {
    let ours = &send.call.record.travelled();
    if ours.dtype != expected.dtype || ours.len != expected.len || ours.tag != expected.tag {
        return Err(Error::OutOfStep {
            seq: send.index,
            rank: peers.rank,
            ours: Box::new(ours.clone()),
            peer: send.peer,
            theirs: Box::new(expected.clone()),
        });
    }
    let mut at = 0;
    loop {
        // The call stays locked for a copy only: sending may wait for the peer, and the peer for this
        // rank's monitor, which must not wait for us.
        let (part, is_last) = {
            let state = send.call.lock();
            let CallMemory::Private(buffer) = &state.memory else { return Ok(()) };
            let (start, end) = (at, buffer.len().min(at + PART_BYTES));
            at = end;
            let part = Part { index: send.index, bytes: &buffer[start..end] };
            (part.encode(), end == buffer.len())
        };
        // An empty message is one empty part.
        peers.send_part(send.peer, part)?;
        if is_last {
            return Ok(());
        }
    }
}

/// The sender of messages to this rank waits until they are taken in.
pub(super) fn awaited(peers: &Peers, peer: usize) {
    if peers.identities[peer].local {
        inbox::awaited(peers, peer);
    }
}

/// Notes messages that have ended though nobody waits for them.
pub(super) fn note_ends(peers: &Peers) {
    peers.points.outboxes.iter().for_each(outbox::note_ends);
}

/// Whether waiting for a message call takes no time.
pub(crate) fn is_done(peers: &Peers, peer: usize, call: &Arc<Call>) -> bool {
    match call.op() {
        _ if call.is_done() => true,
        _ if !peers.identities[peer].local => false,
        Op::Send => outbox::is_taken(peers, peer, call),
        _ => inbox::is_there(peers, peer, call),
    }
}

/// Waits for a message call to end. What is received goes to `into`, which has the message's length, or where there is none to memory of the call.
pub(crate) fn wait(
    peers: &Peers,
    peer: usize,
    call: &Arc<Call>,
    into: Option<&mut [u8]>,
) -> Result<()> {
    match call.op() {
        _ if !peers.identities[peer].local => wait_for_sockets(peers, peer, call)?,
        Op::Send => return outbox::wait(peers, peer, call),
        _ => return inbox::wait(peers, peer, call, into),
    }
    if let (Some(into), CallMemory::Private(bytes)) = (into, &call.lock().memory) {
        into.copy_from_slice(bytes);
    }
    Ok(())
}

fn wait_for_sockets(peers: &Peers, peer: usize, call: &Call) -> Result<()> {
    let deadline = call.started.unwrap_or_else(Instant::now) + call.timeout;
    loop {
        if let Some(result) = call.lock().result.clone() {
            return result;
        }
        // A message that is being sent ends by itself: the peer may have left because it has it all.
        let is_over = peers.has_departed(peer) && peers.points.table().waits(call);
        goes_on(peers, peer, call, is_over, deadline)?;
        let table = peers.points.table();
        if !call.is_done() {
            drop(peers.points.changed.wait_timeout(table, Duration::from_millis(20)));
        }
    }
}

/// Whether a message may still end well: the group has not failed, the peer has not left before (`has_departed`), and there is time.
pub(super) fn goes_on(
    peers: &Peers,
    peer: usize,
    call: &Call,
    has_departed: bool,
    deadline: Instant,
) -> Result<()> {
    if let Some(error) = peers.failure() {
        return Err(error);
    }
    if has_departed {
        let during = call.record.to_string();
        let gone = peers.gone_before(peer, u64::MAX - 1, &during);
        return Err(gone.map_or_else(|| peers.during_failure(), |error| peers.fail(error)));
    }
    let left = deadline.saturating_duration_since(Instant::now());
    if left.is_zero() {
        return Err(peers.fail(peers.late_for(call, peer)));
    }
    peers.remind(call, left, || peers.late_for(call, peer));
    Ok(())
}
