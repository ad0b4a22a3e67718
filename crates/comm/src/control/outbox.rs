//! Messages to a rank of this machine: copied into its channel by the thread that sends, which waits for nobody.
//!
//! Where the channel is full the rest waits in memory of its own for a thread that lives as long as that lasts. It and who waits for a message to be taken
//! in tell the receiver so (`Waits`), if that one has not come by itself in the time that a thread watches before it sleeps: the
//! receiver's monitor then takes in what was asked for, whatever its threads compute.

use std::collections::VecDeque;
use std::os::fd::AsFd;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use super::peers::Peers;
use super::point;
use super::wire::Frame;
use crate::call::{Call, CallMemory};
use crate::error::{Error, Result};
use crate::memory::channel::{Channel, Piece, CHANNEL_BYTES, PIECES, PIECE_BYTES};
use crate::memory::patience;

/// What the memory of a channel is called beside regions, whose numbers begin at 1 and are counted.
pub(super) const CHANNEL_ID: u64 = u64::MAX;

/// A message that is not wholly written.
#[derive(Debug)]
struct Unwritten {
    index: u64,
    /// Its memory is what is left of it.
    call: Arc<Call>,
    at: usize,
    begun: bool,
}

/// Messages to one rank.
#[derive(Debug, Default)]
pub(super) struct Outbox {
    channel: Option<Arc<Channel>>,
    /// Pieces written so far.
    published: u64,
    /// The areas of pieces that are written and not read, oldest first; and the others, the one that was freed last at the end.
    in_flight: VecDeque<usize>,
    free: Vec<usize>,
    unwritten: VecDeque<Unwritten>,
    /// Messages that are written, with the piece after their last one.
    written: VecDeque<(u64, Arc<Call>)>,
    /// A thread writes what is unwritten.
    is_fed: bool,
}

/// How far a message is.
enum Stage {
    Unwritten,
    /// Its receiver has it when it has read so many pieces.
    Written(Arc<Channel>, u64),
    Ended(Result<()>),
}

fn lock(outbox: &Mutex<Outbox>) -> MutexGuard<'_, Outbox> {
    // An outbox is valid after every statement.
    outbox.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Notes messages that have ended though nobody waits for them, unless a thread is at them.
pub(super) fn note_ends(outbox: &Mutex<Outbox>) {
    if let Ok(mut outbox) = outbox.try_lock() {
        outbox.reclaim();
    }
}

/// Whether [`wait`] would return at once.
pub(super) fn is_taken(peers: &Peers, peer: usize, call: &Call) -> bool {
    lock(peers.points.outbox(peer)).reclaim();
    call.is_done()
}

impl Outbox {
    /// Notes what was read.
    fn reclaim(&mut self) {
        let Some(channel) = &self.channel else { return };
        let consumed = channel.consumed().load(Ordering::Acquire);
        let left = usize::try_from(self.published.saturating_sub(consumed)).unwrap_or(usize::MAX);
        while self.in_flight.len() > left {
            self.free.extend(self.in_flight.pop_front());
        }
        while self.written.front().is_some_and(|(end, _)| *end <= consumed) {
            if let Some((_, call)) = self.written.pop_front() {
                call.finish(Ok(()));
            }
        }
    }

    /// Writes as much of `bytes`, from `at` on, as there is room for; whether that was all.
    fn write(&mut self, call: &Call, bytes: &[u8], message: &mut Unwritten) -> bool {
        let Some(channel) = self.channel.clone() else { return false };
        loop {
            if self.free.is_empty() {
                self.reclaim();
            }
            let Some(area) = self.free.pop() else { return false };
            let end = bytes.len().min(message.at + PIECE_BYTES);
            let part = &bytes[message.at..end];
            let is_last = end == bytes.len();
            let piece = Piece { index: message.index, area, bytes: part.len(), is_last };
            let record = (!message.begun).then_some(&call.encoded);
            channel.write(self.published, &piece, record, part);
            self.in_flight.push_back(area);
            self.published += 1;
            (message.at, message.begun) = (end, true);
            if is_last {
                return true;
            }
        }
    }

    /// Writes what had no room; whether all of it is written.
    fn write_rest(&mut self) -> bool {
        while let Some(mut message) = self.unwritten.pop_front() {
            let call = Arc::clone(&message.call);
            let state = call.lock();
            let rest: &[u8] = match &state.memory {
                CallMemory::Private(rest) => rest,
                _ => &[],
            };
            if !self.write(&call, rest, &mut message) {
                self.unwritten.push_front(message);
                return false;
            }
            drop(state);
            call.lock().memory = CallMemory::Nothing;
            self.written.push_back((self.published, call));
        }
        true
    }

    fn stage(&mut self, call: &Arc<Call>) -> Stage {
        self.reclaim();
        if let Some(result) = call.lock().result.clone() {
            return Stage::Ended(result);
        }
        let written = self.written.iter().find(|(_, written)| Arc::ptr_eq(written, call));
        match (written, &self.channel) {
            (Some((end, _)), Some(channel)) => Stage::Written(Arc::clone(channel), *end),
            _ => Stage::Unwritten,
        }
    }
}

/// Makes the channel, and sends it to its receiver.
fn open(peers: &Peers, peer: usize) -> Result<Arc<Channel>> {
    let system = |call| move |error: std::io::Error| Error::system(peers.rank, call, error);
    let (fd, channel) = Channel::create().map_err(system("memfd_create"))?;
    let frame = Frame::Region { id: CHANNEL_ID, bytes: CHANNEL_BYTES as u64 };
    let told = peers.send(peer, &frame, Some(fd.as_fd()));
    // Whoever waits for the message says that the peer has left.
    told.or_else(|error| if peers.has_departed(peer) { Ok(()) } else { Err(error) })?;
    Ok(Arc::new(channel))
}

/// Sends `bytes`, which are read before this returns.
pub(super) fn start(peers: &Arc<Peers>, peer: usize, call: Arc<Call>, bytes: &[u8]) -> Result<()> {
    let mut outbox = lock(peers.points.outbox(peer));
    if outbox.channel.is_none() {
        outbox.channel = Some(open(peers, peer)?);
        outbox.free = (0..PIECES).rev().collect();
    }
    // What was read last is in the caches.
    outbox.reclaim();
    let index = peers.points.next(peer, true);
    let mut message = Unwritten { index, call: Arc::clone(&call), at: 0, begun: false };
    if outbox.unwritten.is_empty() && outbox.write(&call, bytes, &mut message) {
        let end = outbox.published;
        outbox.written.push_back((end, call));
        return Ok(());
    }
    call.lock().memory = CallMemory::Private(bytes[message.at..].to_vec());
    message.at = 0;
    outbox.unwritten.push_back(message);
    if outbox.is_fed {
        return Ok(());
    }
    let ours = Arc::clone(peers);
    let thread = std::thread::Builder::new().name(format!("phalanx-send-{}", peers.rank));
    // Not joined: it ends when all is written, or the group is closed.
    let started = thread.spawn(move || feed(&ours, peer));
    drop(started.map_err(|error| Error::system(peers.rank, "start a thread", error))?);
    outbox.is_fed = true;
    Ok(())
}

/// Writes what had no room, until all is written.
fn feed(peers: &Peers, peer: usize) {
    let mut told = 0;
    loop {
        let mut outbox = lock(peers.points.outbox(peer));
        let is_over = outbox.write_rest() || peers.is_closed() || peers.failure().is_some();
        let channel = outbox.channel.clone().filter(|_| !is_over);
        let Some(channel) = channel else {
            outbox.is_fed = false;
            drop(outbox);
            return peers.points.wake();
        };
        let published = outbox.published;
        drop(outbox);
        let needed = (published + 1).saturating_sub(PIECES as u64);
        if peers.points.watch(|| channel.consumed().load(Ordering::Acquire) >= needed) {
            continue;
        }
        if told < published {
            told = published;
            if tell(peers, peer, &channel, published).is_err() {
                // The monitor finds out why.
                tracing::debug!(peer, "a peer could not be told that messages wait");
            }
        }
        channel.freed().sleep(channel.consumed(), needed, patience::SLEEP_MAX);
    }
}

/// Tells the receiver that somebody waits until it has read so many pieces.
fn tell(peers: &Peers, peer: usize, channel: &Channel, pieces: u64) -> Result<()> {
    channel.wanted().fetch_max(pieces, Ordering::AcqRel);
    let told = peers.send(peer, &Frame::Waits, None);
    told.or_else(|error| if peers.has_departed(peer) { Ok(()) } else { Err(error) })
}

/// Waits until the receiver has the message.
pub(super) fn wait(peers: &Peers, peer: usize, call: &Arc<Call>) -> Result<()> {
    let deadline = call.started.unwrap_or_else(Instant::now) + call.timeout;
    let mut limit = patience::SLEEP_FIRST;
    let mut is_told = false;
    loop {
        let has_departed = peers.has_departed(peer);
        let stage = match lock(peers.points.outbox(peer)).stage(call) {
            Stage::Ended(result) => return result,
            stage => stage,
        };
        point::goes_on(peers, peer, call, has_departed, deadline)?;
        let Stage::Written(channel, end) = stage else {
            peers.points.sleep(limit);
            continue;
        };
        let is_read = || channel.consumed().load(Ordering::Acquire) >= end;
        if !is_told {
            is_told = true;
            if peers.points.watch(is_read) {
                continue;
            }
            tell(peers, peer, &channel, end).map_err(|error| peers.fail(error))?;
        }
        channel.freed().sleep(channel.consumed(), end, limit);
        limit = (limit * 2).min(patience::SLEEP_MAX);
    }
}
