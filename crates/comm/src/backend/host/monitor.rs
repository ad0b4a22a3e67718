//! The thread that watches the control sockets: it notices within milliseconds that a peer's
//! process is gone, and takes in what peers have to say. It also sends this rank's heartbeats and
//! counts the silence of the others.

use std::io::ErrorKind;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::event::{poll, PollFd, PollFlags, Timespec};

use super::control::Received;
use super::liveness::{stat_fields, Silences};
use super::peers::{Identity, Peers};
use super::wire::{Frame, FRAME_HEAD_BYTES};
use crate::error::Error;

const READ_BYTES: usize = 1 << 16;

/// What has come from a peer and is not yet a whole frame.
#[derive(Default)]
struct Incoming {
    bytes: Vec<u8>,
    descriptors: std::collections::VecDeque<OwnedFd>,
    ended: bool,
}

/// Starts the thread; it ends when the group is closed.
pub(crate) fn spawn(peers: Arc<Peers>) -> std::io::Result<()> {
    let name = format!("phalanx-watch-{}", peers.rank);
    // The thread is not joined: it ends by itself when the group is closed, and a Drop that waits
    // for it could wait for a peer.
    drop(std::thread::Builder::new().name(name).spawn(move || watch(&peers))?);
    Ok(())
}

fn watch(peers: &Peers) {
    let mut incoming: Vec<Incoming> = peers.controls.iter().map(|_| Incoming::default()).collect();
    let mut scratch = vec![0; READ_BYTES];
    let mut silences = Silences::new(incoming.len(), peers.liveness);
    let mut last_look = Instant::now();
    beat(peers, &incoming);
    while !peers.is_closed() {
        let beat_at = last_look + peers.liveness.heartbeat;
        let ready = match wait(peers, &incoming, beat_at) {
            Ok(ready) => ready,
            Err(error) => {
                let error = Error::system(peers.rank, "poll", error);
                drop(peers.fail(error));
                return;
            }
        };
        for peer in ready {
            silences.heard(peer);
            take_in(peers, peer, &mut incoming[peer], &mut scratch);
        }
        // Only after everything that has come was taken in: this thread may have been kept waiting.
        let now = Instant::now();
        if now >= beat_at {
            silences.pass(now - last_look);
            last_look = now;
            beat(peers, &incoming);
            bury(peers, &incoming, &silences);
        }
    }
}

/// Waits for the control sockets until `deadline`; returns the peers of which something has come.
fn wait(peers: &Peers, incoming: &[Incoming], deadline: Instant) -> rustix::io::Result<Vec<usize>> {
    let open = |peer: &usize| !incoming[*peer].ended && peers.controls[*peer].is_some();
    let watched: Vec<usize> = (0..incoming.len()).filter(open).collect();
    let mut fds = vec![PollFd::from_borrowed_fd(peers.wake.as_fd(), PollFlags::IN)];
    for peer in &watched {
        if let Some(control) = &peers.controls[*peer] {
            fds.push(PollFd::from_borrowed_fd(control.fd(), PollFlags::IN));
        }
    }
    let left = deadline.saturating_duration_since(Instant::now());
    let limit = Timespec {
        tv_sec: i64::try_from(left.as_secs()).unwrap_or(i64::MAX),
        tv_nsec: left.subsec_nanos().into(),
    };
    match poll(&mut fds, Some(&limit)) {
        Ok(_) => {}
        Err(rustix::io::Errno::INTR) => return Ok(Vec::new()),
        Err(error) => return Err(error),
    }
    if !fds[0].revents().is_empty() {
        // Only the wake-up matters, not what it says.
        rustix::io::read(&peers.wake, &mut [0_u8; 8][..]).ok();
    }
    let ready = watched.iter().zip(&fds[1..]).filter(|(_, fd)| !fd.revents().is_empty());
    Ok(ready.map(|(peer, _)| *peer).collect())
}

/// Tells everybody that this rank lives.
fn beat(peers: &Peers, incoming: &[Incoming]) {
    let frame = Frame::Heartbeat.encode();
    let open = peers.controls.iter().zip(incoming).filter(|(_, incoming)| !incoming.ended);
    for control in open.filter_map(|(control, _)| control.as_ref()) {
        // Why a socket failed shows when it is read.
        if let Err(error) = control.try_send(&frame) {
            tracing::debug!(%error, "no heartbeat to a peer");
        }
    }
}

/// Ends the group when somebody has been silent for too long.
fn bury(peers: &Peers, incoming: &[Incoming], silences: &Silences) {
    let counts = |peer: usize| !incoming[peer].ended && !peers.has_departed(peer);
    let dead = silences.dead().find(|(peer, _)| counts(*peer));
    if let (Some((peer, silent)), None) = (dead, peers.failure()) {
        drop(peers.fail(peers.not_responding(peer, silent)));
    }
}

fn take_in(peers: &Peers, peer: usize, incoming: &mut Incoming, scratch: &mut [u8]) {
    let Some(control) = &peers.controls[peer] else { return };
    loop {
        match control.receive(scratch) {
            Ok(Received::Bytes(bytes, descriptors)) => {
                incoming.bytes.extend_from_slice(&scratch[..bytes]);
                incoming.descriptors.extend(descriptors);
                if !take_frames(peers, peer, incoming) {
                    let what = "it sent bytes that are no message of this version of phalanx";
                    let source = std::io::Error::new(std::io::ErrorKind::InvalidData, what);
                    let error = peers.connection_lost(peer, "recvmsg", source);
                    drop(peers.fail(error));
                    incoming.ended = true;
                    return;
                }
            }
            Ok(Received::Later) => return,
            Ok(Received::End) => return ended(peers, peer, incoming, None),
            Err(error) => return ended(peers, peer, incoming, Some(error)),
        }
    }
}

/// Handles the whole frames; false when they make no sense.
fn take_frames(peers: &Peers, peer: usize, incoming: &mut Incoming) -> bool {
    let mut at = 0;
    while let Some(head) = incoming.bytes.get(at..at + FRAME_HEAD_BYTES) {
        let kind = head[0];
        let Ok(head) = head.try_into() else { return false };
        let Ok(body_bytes) = Frame::body_bytes(head) else { return false };
        let start = at + FRAME_HEAD_BYTES;
        let Some(body) = incoming.bytes.get(start..start + body_bytes) else { break };
        let Ok(frame) = Frame::decode(kind, body) else { return false };
        at = start + body_bytes;
        match frame {
            Frame::Heartbeat => {}
            Frame::Goodbye { completed, panicking } => peers.depart(peer, completed, panicking),
            Frame::Failed(error) => failed_elsewhere(peers, peer, error),
            Frame::Region { id, bytes } => match incoming.descriptors.pop_front() {
                Some(fd) => peers.deliver(peer, id, bytes, fd),
                None => return false,
            },
            Frame::Ready { index, record } => peers.points.ready(peer, index, record),
            Frame::Message { index, bytes } => {
                if !peers.points.arrived(peer, index, &bytes) {
                    return false;
                }
            }
        }
    }
    incoming.bytes.drain(..at);
    true
}

fn failed_elsewhere(peers: &Peers, peer: usize, error: Error) {
    let error = match error {
        // An error that has no encoding of its own comes without the number of its rank.
        Error::PeerFailed { message, rank: usize::MAX } => {
            Error::PeerFailed { rank: peer, message }
        }
        other => other,
    };
    peers.fail_quietly(error);
}

fn ended(peers: &Peers, peer: usize, incoming: &mut Incoming, error: Option<std::io::Error>) {
    incoming.ended = true;
    if peers.has_departed(peer) || peers.is_closed() || peers.failure().is_some() {
        return;
    }
    let Identity { host, pid, local } = peers.identities[peer].clone();
    let lost = error
        .unwrap_or_else(|| std::io::Error::new(ErrorKind::UnexpectedEof, "closed by the peer"));
    match lost.kind() {
        ErrorKind::ConnectionReset | ErrorKind::ConnectionAborted | ErrorKind::UnexpectedEof => {}
        ErrorKind::TimedOut | ErrorKind::HostUnreachable | ErrorKind::NetworkUnreachable => {
            drop(peers.fail(peers.not_responding(peer, peers.liveness.dead_after)));
            return;
        }
        _ => {
            drop(peers.fail(peers.connection_lost(peer, "control socket", lost)));
            return;
        }
    }
    // The sockets of a process that dies all close; the loss of one alone is something else.
    if !local && data_socket_lives(peers, peer) {
        drop(peers.fail(peers.connection_lost(peer, "control socket", lost)));
        return;
    }
    let cause = if local { how_it_ended(pid) } else { None };
    let during = peers.during();
    drop(peers.fail(Error::PeerGone { peer, host, pid, cause, during }));
}

/// Whether the data socket to `peer` is open and stays so for a moment.
fn data_socket_lives(peers: &Peers, peer: usize) -> bool {
    let Some(data) = &peers.data[peer] else { return false };
    let mut fds = [PollFd::new(data, PollFlags::RDHUP)];
    let limit = Timespec { tv_sec: 0, tv_nsec: 200_000_000 };
    matches!(poll(&mut fds, Some(&limit)), Ok(0))
}

/// The end of a process of this machine, while nobody has reaped it.
fn how_it_ended(pid: u32) -> Option<String> {
    if pid == std::process::id() {
        return None;
    }
    // Sockets close a moment before the exit status is there.
    let deadline = Instant::now() + Duration::from_millis(20);
    while Instant::now() < deadline {
        let fields = stat_fields(pid)?;
        if matches!(fields.first().map(String::as_str), Some("Z" | "X")) {
            let status: i32 = fields.get(49)?.parse().ok()?;
            let signal = status & 0x7f;
            return Some(match signal {
                0 => format!("exit code {}, without leaving the group", status >> 8 & 0xff),
                signal => format!("signal {signal}"),
            });
        }
        let limit = Timespec { tv_sec: 0, tv_nsec: 1_000_000 };
        poll(&mut [], Some(&limit)).ok();
    }
    None
}
