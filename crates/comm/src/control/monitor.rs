//! The thread that watches the control sockets: it notices within milliseconds that a peer's
//! process is gone, and takes in what peers have to say. It also sends this rank's heartbeats and
//! counts the silence of the others. A control connection to another machine that ends while the data
//! connection lives is lost, not the peer: `reconnect` brings it back.

use std::io::ErrorKind;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::event::{poll, PollFd, PollFlags, Timespec};

use super::connection::{Control, Received, ACKNOWLEDGE_BYTES};
use super::intake::Intake;
use super::liveness::{self, stat_fields, Silences};
use super::part::Part;
use super::peers::{Identity, Peers};
use super::point;
use super::reconnect::{redial, Door, Returned};
use super::wire::{Damaged, Frame, FrameHead, FRAME_HEAD_BYTES};
use crate::error::Error;

/// How soon an acknowledgement is tried again when another thread was writing.
const OWED: Duration = Duration::from_millis(2);

/// What has come from a peer and is not yet a whole frame.
#[derive(Default)]
struct Incoming {
    /// `None`: there is none, or it is lost.
    socket: Option<Arc<OwnedFd>>,
    intake: Intake,
    descriptors: std::collections::VecDeque<OwnedFd>,
    /// Frames taken in, but for heartbeats, and how many of their bytes the peer was not told of.
    taken_in: u64,
    unacknowledged: usize,
    /// When the connection was lost and why, while it is.
    lost: Option<(Instant, Arc<std::io::Error>)>,
    ended: bool,
}

impl Incoming {
    /// Whether the peer waits for word of what was taken in.
    const fn owes(&self) -> bool {
        self.unacknowledged >= ACKNOWLEDGE_BYTES
    }
}

/// Starts the thread; it ends when the group is closed.
pub(crate) fn spawn(peers: Arc<Peers>, door: Door) -> std::io::Result<()> {
    let name = format!("phalanx-watch-{}", peers.rank);
    // The thread is not joined: it ends by itself when the group is closed, and a Drop that waits
    // for it could wait for a peer.
    drop(std::thread::Builder::new().name(name).spawn(move || watch(&peers, door))?);
    Ok(())
}

/// What there is to do.
#[derive(Default)]
struct Events {
    /// Peers of which something has come.
    ready: Vec<usize>,
    /// Peers whose data connection has ended after their control connection.
    gone: Vec<usize>,
    door: bool,
}

fn watch(peers: &Arc<Peers>, mut door: Door) {
    let open = |control: &Option<Control>| Incoming {
        socket: control.as_ref().and_then(Control::socket),
        ..Incoming::default()
    };
    let mut incoming: Vec<Incoming> = peers.controls.iter().map(open).collect();
    let mut silences = Silences::new(incoming.len(), peers.liveness);
    let mut last_look = Instant::now();
    beat(peers, &mut incoming);
    while !peers.is_closed() {
        let beat_at = last_look + peers.liveness.heartbeat;
        let owes = incoming.iter().any(|theirs| theirs.owes() && !theirs.ended);
        let wait_until = if owes { beat_at.min(Instant::now() + OWED) } else { beat_at };
        let events = match wait(peers, &incoming, &door, wait_until) {
            Ok(events) => events,
            Err(error) => {
                let error = Error::system(peers.rank, "poll", error);
                drop(peers.fail(error));
                return;
            }
        };
        for peer in events.ready {
            silences.heard(peer);
            take_in(peers, peer, &mut incoming[peer]);
        }
        for (control, theirs) in peers.controls.iter().zip(&mut incoming) {
            if let (Some(control), true, false) = (control, theirs.owes(), theirs.ended) {
                acknowledge(peers, control, theirs);
            }
        }
        for peer in events.gone {
            gone(peers, peer, &mut incoming[peer]);
        }
        let mut returned = peers.take_returned();
        if events.door || door.deadline().is_some_and(|deadline| deadline <= Instant::now()) {
            returned.extend(door.serve(peers, |peer| {
                let theirs = &incoming[peer];
                (!theirs.ended).then_some(theirs.taken_in)
            }));
        }
        for back in returned {
            silences.heard(back.peer);
            go_on(peers, &mut incoming, back);
        }
        // Only after everything that has come was taken in: this thread may have been kept waiting.
        let now = Instant::now();
        if now >= beat_at {
            silences.pass(now - last_look);
            last_look = now;
            beat(peers, &mut incoming);
            point::note_ends(peers);
            bury(peers, &incoming, &silences);
        }
    }
}

/// Waits until something comes, until `deadline` at the longest.
fn wait(
    peers: &Peers,
    incoming: &[Incoming],
    door: &Door,
    deadline: Instant,
) -> rustix::io::Result<Events> {
    let control = |peer: &usize| incoming[*peer].socket.as_ref().map(|socket| socket.as_fd());
    let data = |peer: &usize| incoming[*peer].lost.as_ref().and(peers.data[*peer].as_ref());
    let open = || (0..incoming.len()).filter(|peer| !incoming[*peer].ended);
    let listened: Vec<(usize, BorrowedFd<'_>)> =
        open().filter_map(|peer| Some((peer, control(&peer)?))).collect();
    let doubted: Vec<(usize, BorrowedFd<'_>)> =
        open().filter_map(|peer| Some((peer, data(&peer)?.as_fd()))).collect();
    let mut fds = vec![PollFd::from_borrowed_fd(peers.wake.as_fd(), PollFlags::IN)];
    fds.extend(listened.iter().map(|(_, fd)| PollFd::from_borrowed_fd(*fd, PollFlags::IN)));
    fds.extend(doubted.iter().map(|(_, fd)| PollFd::from_borrowed_fd(*fd, PollFlags::RDHUP)));
    fds.extend(door.fds().map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN)));
    let deadline = door.deadline().map_or(deadline, |door| deadline.min(door));
    let left = deadline.saturating_duration_since(Instant::now());
    let limit = Timespec {
        tv_sec: i64::try_from(left.as_secs()).unwrap_or(i64::MAX),
        tv_nsec: left.subsec_nanos().into(),
    };
    match poll(&mut fds, Some(&limit)) {
        Ok(_) => {}
        Err(rustix::io::Errno::INTR) => return Ok(Events::default()),
        Err(error) => return Err(error),
    }
    let events: Vec<bool> = fds.iter().map(|fd| !fd.revents().is_empty()).collect();
    if events[0] {
        // Only the wake-up matters, not what it says.
        rustix::io::read(&peers.wake, &mut [0_u8; 8][..]).ok();
    }
    let (of_controls, rest) = events[1..].split_at(listened.len());
    let (of_data, of_door) = rest.split_at(doubted.len());
    let of_whom = |watched: &[(usize, BorrowedFd<'_>)], of_these: &[bool]| {
        let there = watched.iter().zip(of_these).filter(|(_, has_come)| **has_come);
        there.map(|((peer, _), _)| *peer).collect()
    };
    Ok(Events {
        ready: of_whom(&listened, of_controls),
        gone: of_whom(&doubted, of_data),
        door: of_door.contains(&true),
    })
}

/// Tells everybody that this rank lives, and what has come from them.
fn beat(peers: &Peers, incoming: &mut [Incoming]) {
    for (control, theirs) in peers.controls.iter().zip(incoming) {
        if let (Some(control), false) = (control, theirs.ended) {
            acknowledge(peers, control, theirs);
        }
    }
}

fn acknowledge(peers: &Peers, control: &Control, incoming: &mut Incoming) {
    let heartbeat = Frame::Heartbeat { taken_in: incoming.taken_in, last: peers.own_last() };
    match control.try_send(&heartbeat.encode()) {
        Ok(true) => incoming.unacknowledged = 0,
        // Again soon.
        Ok(false) => {}
        // Why a socket failed shows when it is read.
        Err(error) => {
            incoming.unacknowledged = 0;
            tracing::debug!(%error, "no heartbeat to a peer");
        }
    }
}

/// Ends the group when somebody has been silent for too long.
fn bury(peers: &Peers, incoming: &[Incoming], silences: &Silences) {
    let counts = |peer: usize| !incoming[peer].ended && !peers.has_departed(peer);
    let dead = silences.dead().find(|(peer, _)| counts(*peer));
    if let (Some((peer, silent)), None) = (dead, peers.failure()) {
        drop(peers.fail(match &incoming[peer].lost {
            Some((since, why)) => {
                let late =
                    format!("{why}, and not back after {:.1} s", since.elapsed().as_secs_f64());
                let error = std::io::Error::new(why.kind(), late);
                peers.connection_lost(peer, "control socket", error)
            }
            None => peers.not_responding(peer, silent),
        }));
    }
}

fn take_in(peers: &Arc<Peers>, peer: usize, incoming: &mut Incoming) {
    let (Some(control), Some(socket)) = (&peers.controls[peer], incoming.socket.clone()) else {
        return;
    };
    loop {
        match Control::receive(socket.as_fd(), incoming.intake.space()) {
            Ok(Received::Bytes(bytes, descriptors)) => {
                incoming.intake.came(bytes);
                incoming.descriptors.extend(descriptors);
                if let Err(unreadable) = take_frames(peers, peer, incoming) {
                    drop(peers.fail(unreadable.error(peers, peer)));
                    incoming.ended = true;
                    return;
                }
                if incoming.owes() {
                    acknowledge(peers, control, incoming);
                }
            }
            Ok(Received::Later) => return,
            Ok(Received::End) => return ended(peers, peer, incoming, None),
            Err(error) => return ended(peers, peer, incoming, Some(error)),
        }
    }
}

/// Why what has come cannot be taken in.
enum Unreadable {
    /// It is not what was sent.
    Damaged(Damaged),
    /// It is, and makes no sense.
    Malformed,
}

impl Unreadable {
    fn error(self, peers: &Peers, peer: usize) -> Error {
        match self {
            Self::Damaged(Damaged { expected, actual }) => {
                let during =
                    format!("a message or a word of its; this rank was in {}", peers.during());
                peers.damaged(peer, during, expected, actual)
            }
            Self::Malformed => {
                let what = "it sent bytes that are no message of this version of phalanx";
                let source = std::io::Error::new(ErrorKind::InvalidData, what);
                peers.connection_lost(peer, "recvmsg", source)
            }
        }
    }
}

/// Handles the whole frames.
fn take_frames(peers: &Peers, peer: usize, incoming: &mut Incoming) -> Result<(), Unreadable> {
    let mut at = 0;
    let read = incoming.intake.bytes();
    while let Some(head) = read.get(at..).and_then(<[u8]>::first_chunk) {
        let head = FrameHead::decode(*head).map_err(Unreadable::Damaged)?;
        if head.is_too_long() {
            return Err(Unreadable::Malformed);
        }
        let start = at + FRAME_HEAD_BYTES;
        let Some(body) = read.get(start..start + head.body_bytes) else { break };
        head.check(body).map_err(Unreadable::Damaged)?;
        at = start + head.body_bytes;
        let frame_bytes = FRAME_HEAD_BYTES + head.body_bytes;
        if head.kind == Part::KIND {
            let part = Part::decode(body).or(Err(Unreadable::Malformed))?;
            incoming.taken_in += 1;
            incoming.unacknowledged += frame_bytes;
            if !peers.points.arrived(peer, part) {
                return Err(Unreadable::Malformed);
            }
            continue;
        }
        let frame = Frame::decode(head.kind, body).or(Err(Unreadable::Malformed))?;
        if frame.is_counted() {
            incoming.taken_in += 1;
            incoming.unacknowledged += frame_bytes;
        }
        match frame {
            Frame::Heartbeat { taken_in, last } => {
                peers.acknowledged(peer, taken_in);
                peers.heard(peer, last);
            }
            Frame::Goodbye { completed, panicking } => {
                peers.depart(peer, completed, panicking);
                // It waits for that.
                incoming.unacknowledged += ACKNOWLEDGE_BYTES;
            }
            Frame::Failed(error) => {
                peers.tells_failure(peer);
                failed_elsewhere(peers, peer, error);
                // It may wait for that before it ends.
                incoming.unacknowledged += ACKNOWLEDGE_BYTES;
            }
            Frame::Region { id, bytes } => match incoming.descriptors.pop_front() {
                Some(fd) => peers.deliver(peer, id, bytes, fd),
                None => return Err(Unreadable::Malformed),
            },
            Frame::Ready { index, record } => peers.points.ready(peer, index, record),
            Frame::Announced { index, record } => {
                peers.points.announced(peer, index, record);
            }
            Frame::Waits => point::awaited(peers, peer),
        }
    }
    incoming.intake.take(at);
    Ok(())
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

/// The control socket has ended: so has the peer, or only the connection.
fn ended(peers: &Arc<Peers>, peer: usize, incoming: &mut Incoming, error: Option<std::io::Error>) {
    incoming.socket = None;
    let control = peers.controls[peer].as_ref().filter(|control| control.is_resumable());
    let needs_no_news = control.is_none_or(Control::is_acknowledged) || peers.knows_failure(peer);
    let is_over = peers.failure().is_some() && needs_no_news;
    if peers.has_departed(peer) || peers.is_closed() || is_over {
        incoming.ended = true;
        return;
    }
    let why = error
        .unwrap_or_else(|| std::io::Error::new(ErrorKind::UnexpectedEof, "closed by the peer"));
    let verdict = match why.kind() {
        ErrorKind::ConnectionReset
        | ErrorKind::ConnectionAborted
        | ErrorKind::BrokenPipe
        | ErrorKind::UnexpectedEof => match control {
            // The sockets of a process that dies all close; the loss of one alone is something else.
            Some(control) => return lose(peers, peer, control, incoming, why),
            None => return gone(peers, peer, incoming),
        },
        ErrorKind::TimedOut | ErrorKind::HostUnreachable | ErrorKind::NetworkUnreachable => {
            peers.not_responding(peer, peers.liveness.dead_after)
        }
        _ => peers.connection_lost(peer, "control socket", why),
    };
    incoming.ended = true;
    drop(peers.fail(verdict));
}

/// Tries to get a lost connection back. The peer's data connection tells whether the peer lives.
fn lose(
    peers: &Arc<Peers>,
    peer: usize,
    control: &Control,
    incoming: &mut Incoming,
    why: std::io::Error,
) {
    control.lose();
    incoming.intake.clear();
    tracing::debug!(peer, error = %why, "the control connection is lost");
    incoming.lost = Some((Instant::now(), Arc::new(why)));
    if peer < peers.rank {
        if let Err(error) = redial(peers, peer, incoming.taken_in) {
            let error = Error::system(peers.rank, "start a thread", error);
            drop(peers.fail(error));
        }
    }
}

/// A peer is back on a new connection, of which this rank may not have missed the old one yet.
fn go_on(peers: &Arc<Peers>, incoming: &mut [Incoming], returned: Returned) {
    let Returned { peer, socket, taken_in } = returned;
    let (Some(control), theirs) = (&peers.controls[peer], &mut incoming[peer]) else { return };
    if theirs.ended {
        return;
    }
    theirs.intake.clear();
    let watched = liveness::watch_connection(&socket, peers.liveness.dead_after);
    if control.resume(socket, taken_in).is_err() {
        let what = "it asks for messages that it has acknowledged or that were never sent";
        let error = std::io::Error::new(ErrorKind::InvalidData, what);
        drop(peers.fail(peers.connection_lost(peer, "control socket", error)));
        theirs.ended = true;
        return;
    }
    theirs.socket = control.socket();
    let after = theirs.lost.take().map_or(0.0, |(since, _)| since.elapsed().as_secs_f64());
    if let Err(error) = watched {
        tracing::debug!(%error, "setsockopt");
    }
    tracing::warn!(peer, after, "the control connection was lost and is back");
    if theirs.socket.is_none() {
        let why = std::io::Error::new(ErrorKind::ConnectionReset, "lost again");
        lose(peers, peer, control, theirs, why);
    } else {
        acknowledge(peers, control, theirs);
    }
}

/// The peer's process is gone.
fn gone(peers: &Peers, peer: usize, incoming: &mut Incoming) {
    incoming.ended = true;
    let Identity { host, pid, local } = peers.identities[peer].clone();
    let cause = if local { how_it_ended(pid) } else { None };
    let during = peers.during();
    drop(peers.fail(Error::PeerGone { peer, host, pid, cause, during }));
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
