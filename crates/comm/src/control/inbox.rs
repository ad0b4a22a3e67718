//! Messages from a rank of this machine: taken out of its channel by who waits for them, straight to where they belong.
//!
//! Nothing is done before that, and nothing needs to be: the sender does not wait. If it does after all ([`outbox`](super::outbox)), the monitor takes
//! in what was asked for, into memory of its own.

use std::collections::VecDeque;
use std::io::ErrorKind;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use super::outbox::CHANNEL_ID;
use super::peers::Peers;
use super::point;
use crate::call::{Call, CallMemory};
use crate::error::{Error, Result};
use crate::fingerprint::CallRecord;
use crate::memory::channel::{Channel, Piece};
use crate::memory::patience;

/// A message that was asked for and is not wholly here.
#[derive(Debug)]
struct Expected {
    index: u64,
    call: Arc<Call>,
    /// How much of it is here; none: it has not begun to come.
    filled: Option<usize>,
    /// Who waits for it has memory for it: nobody else takes it in.
    is_claimed: bool,
}

/// Messages from one rank.
#[derive(Debug, Default)]
pub(super) struct Inbox {
    channel: Option<Arc<Channel>>,
    /// Pieces read so far.
    consumed: u64,
    expected: VecDeque<Expected>,
}

/// Who takes in, and where to.
#[derive(Debug)]
struct Taker<'a> {
    call: &'a Arc<Call>,
    into: Option<&'a mut [u8]>,
}

/// What there is to wait for.
enum Next {
    Ended(Result<()>),
    /// The channel.
    Channel,
    /// The next piece.
    Piece(Arc<Channel>, u64),
    /// Another thread, which takes in a message before it.
    Other,
}

fn lock(inbox: &Mutex<Inbox>) -> MutexGuard<'_, Inbox> {
    // An inbox is valid after every statement.
    inbox.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Inbox {
    /// Opens the channel, if it has come.
    fn open_if_there(&mut self, peers: &Peers, peer: usize) -> Result<()> {
        match self.channel {
            Some(_) => Ok(()),
            None => peers.try_parcel(peer, CHANNEL_ID).map_or(Ok(()), |fd| self.open(peers, &fd)),
        }
    }

    fn open(&mut self, peers: &Peers, fd: &OwnedFd) -> Result<()> {
        let channel = Channel::open(fd.as_fd());
        let channel = channel.map_err(|error| Error::system(peers.rank, "mmap", error))?;
        self.channel = Some(Arc::new(channel));
        Ok(())
    }

    /// Takes in what is there: the messages up to the taker's, and what the sender waits for.
    fn take_in(&mut self, peers: &Peers, peer: usize, mut taker: Option<Taker<'_>>) -> Result<()> {
        let Some(channel) = self.channel.clone() else { return Ok(()) };
        let published = channel.published().load(Ordering::Acquire);
        while self.consumed < published {
            let is_wanted = || self.consumed < channel.wanted().load(Ordering::Acquire);
            let waits = taker.as_ref().is_some_and(|own| !own.call.is_done());
            if !waits && !is_wanted() {
                break;
            }
            let Some(front) = self.expected.front_mut() else { break };
            let own = taker.as_mut().filter(|own| Arc::ptr_eq(own.call, &front.call));
            if front.is_claimed && own.is_none() {
                break;
            }
            let piece = channel.piece(self.consumed).ok_or_else(|| senseless(peers, peer))?;
            if front.filled.is_none() {
                front.compare(peers, peer, channel.record(self.consumed))?;
            }
            let into = own.and_then(|own| own.into.as_deref_mut());
            front.take(&channel, &piece, into).ok_or_else(|| senseless(peers, peer))?;
            self.consumed += 1;
            channel.freed().announce(channel.consumed(), self.consumed);
            if !piece.is_last {
                continue;
            }
            if front.filled != Some(front.call.segment) {
                return Err(senseless(peers, peer));
            }
            if let Some(whole) = self.expected.pop_front() {
                whole.call.finish(Ok(()));
                peers.points.wake_sleeping();
            }
        }
        Ok(())
    }

    /// What the taker waits for, once it has taken in what is there.
    fn next(&mut self, peers: &Peers, peer: usize, taker: Taker<'_>) -> Result<Next> {
        let call = taker.call;
        if taker.into.is_some() {
            let own = self.expected.iter_mut().find(|one| Arc::ptr_eq(&one.call, call));
            own.into_iter().for_each(|own| own.is_claimed = true);
        }
        self.take_in(peers, peer, Some(taker))?;
        if let Some(result) = call.lock().result.clone() {
            return Ok(Next::Ended(result));
        }
        let Some(channel) = &self.channel else { return Ok(Next::Channel) };
        let front = self.expected.front().filter(|one| !Arc::ptr_eq(&one.call, call));
        Ok(match front.is_some_and(|front| front.is_claimed) {
            true => Next::Other,
            false => Next::Piece(Arc::clone(channel), self.consumed + 1),
        })
    }

    /// Whether all of a message is there.
    fn has(&self, call: &Arc<Call>) -> bool {
        let Some(channel) = &self.channel else { return false };
        let Some(own) = self.expected.iter().find(|one| Arc::ptr_eq(&one.call, call)) else {
            return false;
        };
        let published = channel.published().load(Ordering::Acquire);
        let is_end = |piece: Piece| piece.index == own.index && piece.is_last;
        (self.consumed..published).any(|number| channel.piece(number).is_some_and(is_end))
    }
}

impl Expected {
    /// Whether what comes is what was asked for.
    fn compare(&self, peers: &Peers, peer: usize, record: Option<CallRecord>) -> Result<()> {
        let theirs = record.ok_or_else(|| senseless(peers, peer))?;
        let ours = self.call.record.travelled();
        if (ours.dtype, ours.len, &ours.tag) == (theirs.dtype, theirs.len, &theirs.tag) {
            return Ok(());
        }
        let (ours, theirs) = (Box::new(ours), Box::new(theirs));
        Err(Error::OutOfStep { seq: self.index, rank: peers.rank, ours, peer, theirs })
    }

    /// Copies a piece to `into`, or where there is none, or the message was begun without, to memory of the call. `None` if it does not fit.
    fn take(&mut self, channel: &Channel, piece: &Piece, into: Option<&mut [u8]>) -> Option<()> {
        let start = self.filled.unwrap_or(0);
        let range = start..start + piece.bytes;
        if piece.index != self.index {
            return None;
        }
        let mut state = self.call.lock();
        match (&mut state.memory, into) {
            (CallMemory::Private(bytes), _) => channel.read(piece, bytes.get_mut(range)?),
            (_, Some(into)) => channel.read(piece, into.get_mut(range)?),
            (memory, None) => {
                let mut bytes = vec![0; self.call.segment];
                channel.read(piece, bytes.get_mut(range)?);
                *memory = CallMemory::Private(bytes);
            }
        }
        self.filled = Some(start + piece.bytes);
        Some(())
    }
}

/// The error for a channel with what no sender writes.
fn senseless(peers: &Peers, peer: usize) -> Error {
    let what = "what it wrote into shared memory is no message of this version of phalanx";
    let source = std::io::Error::new(ErrorKind::InvalidData, what);
    peers.connection_lost(peer, "receive", source)
}

/// Asks for a message.
pub(super) fn start(peers: &Peers, peer: usize, call: Arc<Call>) -> Result<()> {
    let index = peers.points.next(peer, false);
    let expected = Expected { index, call, filled: None, is_claimed: false };
    let taken = {
        let mut inbox = lock(peers.points.inbox(peer));
        inbox.expected.push_back(expected);
        // The sender may wait for that.
        inbox.take_in(peers, peer, None)
    };
    taken.map_err(|error| peers.fail(error))
}

/// The sender waits until its messages are taken in.
pub(super) fn awaited(peers: &Peers, peer: usize) {
    let taken = {
        let mut inbox = lock(peers.points.inbox(peer));
        let opened = inbox.open_if_there(peers, peer);
        opened.and_then(|()| inbox.take_in(peers, peer, None))
    };
    if let Err(error) = taken {
        drop(peers.fail(error));
    }
}

/// Whether [`wait`] would wait for nobody.
pub(super) fn is_there(peers: &Peers, peer: usize, call: &Arc<Call>) -> bool {
    let mut inbox = lock(peers.points.inbox(peer));
    let opened = inbox.open_if_there(peers, peer);
    let is_there = inbox.has(call);
    drop(inbox);
    match opened {
        Ok(()) => is_there,
        Err(error) => {
            drop(peers.fail(error));
            true
        }
    }
}

/// Waits for a message, and takes it in: to `into`, as long as the message, or to memory of the call.
pub(super) fn wait(
    peers: &Peers,
    peer: usize,
    call: &Arc<Call>,
    mut into: Option<&mut [u8]>,
) -> Result<()> {
    let deadline = call.started.unwrap_or_else(Instant::now) + call.timeout;
    let mut limit = patience::SLEEP_FIRST;
    let mut is_late = false;
    loop {
        let has_departed = peers.has_departed(peer);
        let next = {
            let mut inbox = lock(peers.points.inbox(peer));
            inbox.next(peers, peer, Taker { call, into: into.as_deref_mut() })
        };
        let next = match next.map_err(|error| peers.fail(error))? {
            Next::Ended(result) => {
                result?;
                break;
            }
            next => next,
        };
        point::goes_on(peers, peer, call, has_departed, deadline)?;
        match next {
            Next::Piece(channel, needed) => {
                let is_there = || channel.published().load(Ordering::Acquire) >= needed;
                // A message that has begun to come goes on at once.
                if !is_late && peers.points.watch(is_there) {
                    continue;
                }
                is_late = true;
                channel.told().sleep(channel.published(), needed, limit);
                if is_there() {
                    (is_late, limit) = (false, patience::SLEEP_FIRST);
                }
            }
            Next::Channel => {
                let until = deadline.min(Instant::now() + patience::SLEEP_MAX);
                if let Some((fd, _)) = peers.take_parcel(peer, CHANNEL_ID, until)? {
                    let opened = lock(peers.points.inbox(peer)).open(peers, &fd);
                    opened.map_err(|error| peers.fail(error))?;
                }
            }
            Next::Other | Next::Ended(_) => peers.points.sleep(limit),
        }
        limit = (limit * 2).min(patience::SLEEP_MAX);
    }
    if let (Some(into), CallMemory::Private(bytes)) = (into, &call.lock().memory) {
        into.copy_from_slice(bytes);
    }
    Ok(())
}
