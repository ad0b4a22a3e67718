//! Data sockets between machines: sends that never block, receives that do.
//!
//! What the kernel does not take at once is kept and written while something is received, so two
//! ranks that send to each other never wait for each other. The algorithms bound how much that is.
//!
//! What is posted at a time is followed by its checksum (`PHALANX_DATA_CHECKS`), computed while the data is in the cache for the
//! system call; the receiver compares before anybody uses it.

use std::collections::VecDeque;
use std::io::{ErrorKind, IoSlice, IoSliceMut, Read, Write};
use std::net::TcpStream;
use std::sync::Arc;
use std::time::Instant;

use rustix::event::{poll, PollFd, PollFlags, Timespec};

use crate::call::Call;
use crate::checksum::{self, CHECKSUM_BYTES};
use crate::control::liveness;
use crate::control::peers::{Peers, VERDICT_MAX};
use crate::error::{Error, Result};

#[derive(Debug)]
struct Link {
    stream: TcpStream,
    outgoing: VecDeque<Vec<u8>>,
    /// How much of the first outgoing piece is written.
    written: usize,
}

/// Data with its trailer is a multiple of this, a cache line, so that what follows is copied from where lines begin.
const LINE_BYTES: usize = 64;
const TRAILER_BYTES_MAX: usize = LINE_BYTES + CHECKSUM_BYTES - 1;

/// How long the trailer of so many bytes is.
const fn trailer_bytes(bytes: usize) -> usize {
    (bytes + CHECKSUM_BYTES).next_multiple_of(LINE_BYTES) - bytes
}

/// The checksum, and zeros.
fn trailer(checksum: u32) -> [u8; TRAILER_BYTES_MAX] {
    let mut trailer = [0; TRAILER_BYTES_MAX];
    trailer[..CHECKSUM_BYTES].copy_from_slice(&checksum.to_le_bytes());
    trailer
}

/// This rank's data sockets, by peer.
#[derive(Debug)]
pub(crate) struct Links {
    peers: Arc<Peers>,
    links: Vec<Option<Link>>,
    pending: usize,
    /// Checksums follow the data.
    checked: bool,
}

/// For whom a wait is, and until when.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Wait<'a> {
    pub(crate) call: &'a Call,
    pub(crate) deadline: Instant,
}

impl Links {
    pub(crate) fn new(
        peers: Arc<Peers>,
        streams: Vec<Option<TcpStream>>,
        checked: bool,
    ) -> std::io::Result<Self> {
        let mut links = Vec::new();
        for stream in streams {
            links.push(match stream {
                None => None,
                Some(stream) => {
                    stream.set_nonblocking(true)?;
                    stream.set_nodelay(true)?;
                    liveness::watch_connection(&stream, peers.liveness.dead_after)?;
                    Some(Link { stream, outgoing: VecDeque::new(), written: 0 })
                }
            });
        }
        Ok(Self { peers, links, pending: 0, checked })
    }

    fn link(&mut self, peer: usize) -> Result<&mut Link> {
        let rank = self.peers.rank;
        self.links.get_mut(peer).and_then(Option::as_mut).ok_or_else(|| {
            let what = format!("rank {peer} has no data socket");
            Error::system(rank, "send", std::io::Error::new(ErrorKind::NotConnected, what))
        })
    }

    /// Why a socket failed: the monitor's verdict or the peer's goodbye, if either comes soon.
    ///
    /// What comes ends the wait; that nothing will come takes all of it. A peer tells its news before it closes its data
    /// sockets, so the answer to a question that was asked after the break, with no news before it, would prove that
    /// the peer lives and only this connection is lost. No frame asks such a question: acknowledgements go with
    /// heartbeats, which are rarer than this limit and may overtake news that a busy connection keeps. To go by
    /// them, or by what other peers have said meanwhile, could name this peer for one that has failed it.
    fn broken(&self, peer: usize, call: &'static str, error: std::io::Error) -> Error {
        let deadline = Instant::now() + VERDICT_MAX;
        loop {
            if let Some(failure) = self.peers.failure() {
                return failure;
            }
            let during = self.peers.during();
            if let Some(left) = self.peers.gone_before(peer, u64::MAX - 1, &during) {
                return left;
            }
            if Instant::now() >= deadline {
                return self.peers.connection_lost(peer, call, error);
            }
            poll(&mut [], Some(&Timespec { tv_sec: 0, tv_nsec: 1_000_000 })).ok();
        }
    }

    /// Sends without waiting, for one [`Links::receive`] of as many bytes: what does not fit into the socket is kept.
    pub(crate) fn post(&mut self, peer: usize, bytes: &[u8]) -> Result<()> {
        if bytes.is_empty() || !self.checked {
            return self.post_sealed(peer, bytes, &[]);
        }
        let trailer = trailer(checksum::of(bytes));
        self.post_sealed(peer, bytes, &trailer[..trailer_bytes(bytes.len())])
    }

    /// Ends with its checksum what begins at `from` in a frame for [`Links::post_sealed`].
    pub(crate) fn seal(&self, frame: &mut Vec<u8>, from: usize) {
        if self.checked && from < frame.len() {
            let trailer = trailer(checksum::of(&frame[from..]));
            frame.extend_from_slice(&trailer[..trailer_bytes(frame.len() - from)]);
        }
    }

    /// As [`Links::post`], of what has its checksums.
    pub(crate) fn post_sealed(&mut self, peer: usize, bytes: &[u8], more: &[u8]) -> Result<()> {
        let link = self.link(peer)?;
        let whole = bytes.len() + more.len();
        let left = |sent: usize| {
            (&bytes[sent.min(bytes.len())..], &more[sent.saturating_sub(bytes.len())..])
        };
        let mut sent = 0;
        if link.outgoing.is_empty() {
            while sent < whole {
                let (first, second) = left(sent);
                match link.stream.write_vectored(&[IoSlice::new(first), IoSlice::new(second)]) {
                    Ok(count) => sent += count,
                    Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                    Err(error) if error.kind() == ErrorKind::Interrupted => {}
                    Err(error) => return Err(self.broken(peer, "send", error)),
                }
            }
        }
        if sent < whole {
            let (first, second) = left(sent);
            self.link(peer)?.outgoing.push_back([first, second].concat());
            self.pending += 1;
        }
        Ok(())
    }

    /// Receives exactly `into`, sending meanwhile what was kept.
    ///
    /// # Errors
    ///
    /// Also [`Error::DataDamaged`]: `into` then has what has come.
    pub(crate) fn receive(&mut self, peer: usize, into: &mut [u8], wait: Wait<'_>) -> Result<()> {
        if into.is_empty() {
            return Ok(());
        }
        let (bytes, mut checksum) = (into.len(), [0; TRAILER_BYTES_MAX]);
        let trailer = if self.checked { trailer_bytes(bytes) } else { 0 };
        let (mut filled, mut waited, mut computed) = (0, false, 0);
        while filled < bytes + trailer {
            let (data, sum) = (filled.min(bytes), filled.saturating_sub(bytes));
            let mut buffers =
                [IoSliceMut::new(&mut into[data..]), IoSliceMut::new(&mut checksum[sum..trailer])];
            match self.link(peer)?.stream.read_vectored(&mut buffers) {
                Ok(0) => {
                    let closed =
                        std::io::Error::new(ErrorKind::UnexpectedEof, "closed by the peer");
                    return Err(self.broken(peer, "receive", closed));
                }
                Ok(count) => {
                    filled += count;
                    if self.checked {
                        computed = checksum::append(computed, &into[data..filled.min(bytes)]);
                    }
                }
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => {
                    self.peers.await_data(Some(peer));
                    waited = true;
                    self.wait_ready(Some(peer), wait)?;
                }
                Err(error) => return Err(self.broken(peer, "receive", error)),
            }
        }
        if waited {
            self.peers.await_data(None);
        }
        let expected = u32::from_le_bytes([checksum[0], checksum[1], checksum[2], checksum[3]]);
        if self.checked && computed != expected {
            let during = wait.call.record.to_string();
            return Err(self.peers.damaged(peer, during, expected, computed));
        }
        Ok(())
    }

    /// Waits until everything posted is in the kernel's hands.
    pub(crate) fn flush(&mut self, wait: Wait<'_>) -> Result<()> {
        while self.pending > 0 {
            self.wait_ready(None, wait)?;
        }
        Ok(())
    }

    /// Sleeps until `peer` can be read or something kept can be written.
    fn wait_ready(&mut self, peer: Option<usize>, wait: Wait<'_>) -> Result<()> {
        if let Some(error) = self.peers.failure() {
            return Err(error);
        }
        if let Some(peer) = peer {
            let during = wait.call.record.to_string();
            if let Some(error) = self.peers.gone_before(peer, wait.call.seq(), &during) {
                // Its last bytes may still be under way to us; they are, if it finished this one.
                return Err(error);
            }
        }
        let late = || match peer {
            Some(peer) => self.peers.late_for(wait.call, peer),
            None => self.peers.late(wait.call, &[]),
        };
        let left = wait.deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(late());
        }
        self.peers.remind(wait.call, left, late);
        let mut fds = Vec::new();
        let mut whose = Vec::new();
        for (rank, link) in self.links.iter().enumerate() {
            let Some(link) = link else { continue };
            let mut flags = PollFlags::empty();
            if peer == Some(rank) {
                flags |= PollFlags::IN;
            }
            if !link.outgoing.is_empty() {
                flags |= PollFlags::OUT;
            }
            if !flags.is_empty() {
                fds.push(PollFd::new(&link.stream, flags));
                whose.push(rank);
            }
        }
        let limit = Timespec { tv_sec: 0, tv_nsec: 20_000_000 };
        match poll(&mut fds, Some(&limit)) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(Error::system(self.peers.rank, "poll", error)),
        }
        let writable: Vec<usize> = whose
            .into_iter()
            .zip(&fds)
            .filter(|(_, fd)| fd.revents().intersects(PollFlags::OUT | PollFlags::ERR))
            .map(|(rank, _)| rank)
            .collect();
        for rank in writable {
            self.write_kept(rank)?;
        }
        Ok(())
    }

    fn write_kept(&mut self, peer: usize) -> Result<()> {
        let link = self.link(peer)?;
        let mut finished = 0;
        let result = loop {
            let Some(first) = link.outgoing.front() else { break Ok(()) };
            match link.stream.write(&first[link.written..]) {
                Ok(count) => {
                    link.written += count;
                    if link.written == first.len() {
                        link.outgoing.pop_front();
                        link.written = 0;
                        finished += 1;
                    }
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => break Ok(()),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => break Err(error),
            }
        };
        self.pending -= finished;
        result.map_err(|error| self.broken(peer, "send", error))
    }
}
