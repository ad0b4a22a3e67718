//! One end of a control connection: frames out, bytes and file descriptors in.
//!
//! Between machines a connection may be reset though both processes live. So frames are kept until the
//! peer has said (in its heartbeats) how many it has taken in; on a new connection what it lacks is sent
//! again, in order. Heartbeats are not counted and not repeated. Cost: a message stays in memory until
//! the next word of the peer, [`KEPT_BYTES_MAX`] at most.

use std::collections::VecDeque;
use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, TryLockError};
use std::time::{Duration, Instant};

use rustix::event::{poll, PollFd, PollFlags, Timespec};
use rustix::io::Errno;
use rustix::net::{
    recvmsg, send, sendmsg, shutdown, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags,
    SendAncillaryBuffer, SendAncillaryMessage, SendFlags, Shutdown,
};

/// Parts of messages wait while the peer has not acknowledged so much.
const KEPT_BYTES_MAX: usize = 8 << 20;
/// A peer is told that its frames were taken in after so many bytes of them.
pub(crate) const ACKNOWLEDGE_BYTES: usize = 1 << 20;
/// The longest single sleep.
const SLICE: Duration = Duration::from_millis(100);

/// A control connection. It outlives its socket where it is resumable.
#[derive(Debug)]
pub(crate) struct Control {
    /// `None`: lost. Locked for moments only.
    socket: Mutex<Option<Arc<OwnedFd>>>,
    /// Held while frames are written, so that frames of two threads do not mix.
    line: Mutex<Line>,
    acknowledged: Condvar,
    /// How many frames were given to this connection, and how many of them the peer has taken in, as
    /// far as is known: what is asked while another thread writes.
    given: AtomicU64,
    heard: AtomicU64,
    /// A thread is writing, and so may be waiting for the peer.
    writing: AtomicBool,
    /// A new socket can take the place of one that was lost.
    resumable: bool,
}

/// The outgoing half.
#[derive(Debug, Default)]
struct Line {
    /// What is left of a heartbeat that did not fit; goes first.
    rest: Vec<u8>,
    /// Frames from number `forgotten` on.
    kept: VecDeque<Vec<u8>>,
    kept_bytes: usize,
    /// How many frames are no longer needed.
    forgotten: u64,
    /// The first of `kept` that is not yet written, and how much of it is.
    next: usize,
    written: usize,
}

/// How a read ended.
#[derive(Debug)]
pub(crate) enum Received {
    /// So many bytes, and the descriptors that came with them.
    Bytes(usize, Vec<OwnedFd>),
    /// Nothing more at the moment.
    Later,
    /// The other end is closed.
    End,
}

/// A peer asks for frames that this end has never sent or no longer has.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Forgotten;

impl Control {
    pub(crate) fn new(socket: OwnedFd, resumable: bool) -> std::io::Result<Self> {
        rustix::io::ioctl_fionbio(&socket, true)?;
        let socket = Mutex::new(Some(Arc::new(socket)));
        Ok(Self {
            socket,
            line: Mutex::default(),
            acknowledged: Condvar::new(),
            given: AtomicU64::new(0),
            heard: AtomicU64::new(0),
            writing: AtomicBool::new(false),
            resumable,
        })
    }

    pub(crate) const fn is_resumable(&self) -> bool {
        self.resumable
    }

    /// The line; waits for other threads that write.
    fn line(&self, deadline: Instant) -> std::io::Result<MutexGuard<'_, Line>> {
        loop {
            if let Some(line) = self.idle_line() {
                return Ok(line);
            }
            if Instant::now() >= deadline {
                return Err(late("another thread waits for the peer to read its control socket"));
            }
            poll(&mut [], Some(&Timespec { tv_sec: 0, tv_nsec: 200_000 }))?;
        }
    }

    /// The line, if no other thread is writing.
    fn idle_line(&self) -> Option<MutexGuard<'_, Line>> {
        match self.line.try_lock() {
            Ok(line) => Some(line),
            // A line is valid after every statement.
            Err(TryLockError::Poisoned(error)) => Some(error.into_inner()),
            Err(TryLockError::WouldBlock) => None,
        }
    }

    /// Whether a thread is writing, and so may be waiting for the peer.
    pub(crate) fn is_busy(&self) -> bool {
        self.writing.load(Ordering::Relaxed)
    }

    fn place(&self) -> MutexGuard<'_, Option<Arc<OwnedFd>>> {
        self.socket.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The socket; `None` while the connection is lost.
    pub(crate) fn socket(&self) -> Option<Arc<OwnedFd>> {
        self.place().clone()
    }

    /// Writes an uncounted frame if nobody else writes and it fits at once: a peer that has unread
    /// frames of ours needs no sign of life. False: another thread is writing.
    pub(crate) fn try_send(&self, frame: &[u8]) -> std::io::Result<bool> {
        let Some(mut line) = self.idle_line() else { return Ok(false) };
        let Some(socket) = self.socket() else { return Ok(true) };
        let result = line.pump(&socket, None).and_then(|all_written| {
            if all_written {
                line.rest.extend_from_slice(frame);
                line.pump(&socket, None)?;
            }
            Ok(())
        });
        self.settle(&mut line, result).map(|()| true)
    }

    /// Writes a whole frame within `limit`, with a descriptor attached to its first byte. On a
    /// resumable connection that is lost the frame is kept.
    pub(crate) fn send(
        &self,
        frame: Vec<u8>,
        descriptor: Option<BorrowedFd<'_>>,
        limit: Duration,
    ) -> std::io::Result<()> {
        let deadline = Instant::now() + limit;
        let mut line = self.line(deadline)?;
        line.kept_bytes += frame.len();
        line.kept.push_back(frame);
        self.given.fetch_add(1, Ordering::Release);
        let Some(socket) = self.socket() else { return Ok(()) };
        self.writing.store(true, Ordering::Relaxed);
        let result = line.write(&socket, descriptor, deadline);
        self.writing.store(false, Ordering::Relaxed);
        self.settle(&mut line, result)
    }

    /// As [`Control::send`], for frames of which there may be many: waits first until the peer has
    /// acknowledged enough.
    pub(crate) fn send_in_turn(&self, frame: Vec<u8>, limit: Duration) -> std::io::Result<()> {
        let deadline = Instant::now() + limit;
        let mut line = self.line(deadline)?;
        while {
            self.forget_heard(&mut line);
            line.kept_bytes > KEPT_BYTES_MAX
        } {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(late("the peer does not acknowledge what it is sent"));
            }
            let waited = self.acknowledged.wait_timeout(line, left.min(SLICE));
            line = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        drop(line);
        self.send(frame, None, deadline.saturating_duration_since(Instant::now()))
    }

    /// What a write's end means for the line.
    fn settle(&self, line: &mut Line, result: std::io::Result<()>) -> std::io::Result<()> {
        if !self.resumable {
            line.forget_written();
        }
        match result {
            Err(error) if self.resumable && error.kind() != std::io::ErrorKind::TimedOut => {
                // Whoever reads sees it end, and finds out why.
                self.lose();
                Ok(())
            }
            other => other,
        }
    }

    /// The peer has taken in so many frames. Who is writing drops them later.
    pub(crate) fn acknowledge(&self, frames: u64) {
        self.heard.fetch_max(frames, Ordering::AcqRel);
        if let Some(mut line) = self.idle_line() {
            self.forget_heard(&mut line);
            self.acknowledged.notify_all();
        }
    }

    fn forget_heard(&self, line: &mut Line) {
        // A peer that acknowledges what was never sent is found out when it asks for the rest.
        drop(line.forget(self.heard.load(Ordering::Acquire)));
    }

    /// Whether the peer has acknowledged everything.
    pub(crate) fn is_acknowledged(&self) -> bool {
        let given = self.given.load(Ordering::Acquire);
        !self.resumable || self.heard.load(Ordering::Acquire) == given
    }

    /// The socket has ended. A thread that waits for it goes on.
    pub(crate) fn lose(&self) {
        if let Some(socket) = self.place().take() {
            // It may be closed already.
            shutdown(&*socket, Shutdown::Both).ok();
        }
    }

    /// Goes on over a new socket to a peer that has taken in so many frames.
    pub(crate) fn resume(&self, socket: OwnedFd, frames: u64) -> Result<(), Forgotten> {
        self.lose();
        // Who was writing has nothing to wait for any more.
        let mut line = self.line.lock().unwrap_or_else(PoisonError::into_inner);
        line.forget(frames)?;
        line.rest.clear();
        line.next = 0;
        line.written = 0;
        let ready = rustix::io::ioctl_fionbio(&socket, true);
        let socket = Arc::new(socket);
        *self.place() = Some(Arc::clone(&socket));
        let result = ready.map_err(Into::into).and_then(|()| line.pump(&socket, None));
        if result.is_err() {
            self.lose();
        }
        self.acknowledged.notify_all();
        Ok(())
    }

    /// Reads what is there.
    pub(crate) fn receive(socket: BorrowedFd<'_>, into: &mut [u8]) -> std::io::Result<Received> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(4))];
        let mut ancillary = RecvAncillaryBuffer::new(&mut space);
        let mut buffers = [IoSliceMut::new(into)];
        let message = recvmsg(socket, &mut buffers, &mut ancillary, RecvFlags::CMSG_CLOEXEC);
        let bytes = match message {
            Ok(message) => message.bytes,
            Err(Errno::AGAIN | Errno::INTR) => return Ok(Received::Later),
            Err(error) => return Err(error.into()),
        };
        let mut descriptors = Vec::new();
        for control_message in ancillary.drain() {
            if let RecvAncillaryMessage::ScmRights(rights) = control_message {
                descriptors.extend(rights);
            }
        }
        Ok(if bytes == 0 { Received::End } else { Received::Bytes(bytes, descriptors) })
    }
}

fn late(what: &'static str) -> std::io::Error {
    std::io::Error::new(std::io::ErrorKind::TimedOut, what)
}

impl Line {
    /// Writes what is kept, until everything is written (true) or the socket is full. The descriptor
    /// goes with the last frame.
    fn pump(
        &mut self,
        socket: &OwnedFd,
        descriptor: Option<BorrowedFd<'_>>,
    ) -> std::io::Result<bool> {
        loop {
            let result = if !self.rest.is_empty() {
                send(socket, &self.rest, SendFlags::NOSIGNAL)
            } else if let Some(frame) = self.kept.get(self.next) {
                let bytes = &frame[self.written..];
                match descriptor {
                    Some(fd) if self.written == 0 && self.next + 1 == self.kept.len() => {
                        send_with(socket.as_fd(), bytes, fd)
                    }
                    _ => send(socket, bytes, SendFlags::NOSIGNAL),
                }
            } else {
                return Ok(true);
            };
            match result {
                Ok(sent) => self.wrote(sent),
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return Ok(false),
                Err(error) => return Err(error.into()),
            }
        }
    }

    fn wrote(&mut self, sent: usize) {
        if !self.rest.is_empty() {
            self.rest.drain(..sent);
            return;
        }
        self.written += sent;
        if self.kept.get(self.next).is_some_and(|frame| frame.len() == self.written) {
            self.next += 1;
            self.written = 0;
        }
    }

    /// Writes everything until `deadline`.
    fn write(
        &mut self,
        socket: &OwnedFd,
        descriptor: Option<BorrowedFd<'_>>,
        deadline: Instant,
    ) -> std::io::Result<()> {
        while !self.pump(socket, descriptor)? {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(late("the peer does not read its control socket"));
            }
            let limit = Timespec { tv_sec: 0, tv_nsec: left.min(SLICE).subsec_nanos().into() };
            match poll(&mut [PollFd::new(socket, PollFlags::OUT)], Some(&limit)) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    /// Drops the frames before number `frames`.
    fn forget(&mut self, frames: u64) -> Result<(), Forgotten> {
        let count = frames.checked_sub(self.forgotten).ok_or(Forgotten)?;
        let count = usize::try_from(count).or(Err(Forgotten))?;
        // What was taken in had been written.
        self.next = self.next.checked_sub(count).ok_or(Forgotten)?;
        self.kept_bytes -= self.kept.drain(..count).map(|frame| frame.len()).sum::<usize>();
        self.forgotten = frames;
        Ok(())
    }

    fn forget_written(&mut self) {
        let written = self.next as u64;
        // What is written is among what is kept.
        drop(self.forget(self.forgotten + written));
    }
}

fn send_with(
    socket: BorrowedFd<'_>,
    bytes: &[u8],
    descriptor: BorrowedFd<'_>,
) -> rustix::io::Result<usize> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    let descriptors = [descriptor];
    let fits = ancillary.push(SendAncillaryMessage::ScmRights(&descriptors));
    debug_assert!(fits, "the space is made for one descriptor");
    sendmsg(socket, &[IoSlice::new(bytes)], &mut ancillary, SendFlags::NOSIGNAL)
}

#[cfg(test)]
mod tests {
    use std::io::Read as _;
    use std::os::unix::net::UnixStream;

    use super::*;

    const LIMIT: Duration = Duration::from_secs(5);

    fn pair() -> (UnixStream, OwnedFd) {
        let (theirs, ours) = UnixStream::pair().unwrap();
        theirs.set_read_timeout(Some(LIMIT)).unwrap();
        (theirs, ours.into())
    }

    fn read(stream: &mut UnixStream, bytes: usize) -> Vec<u8> {
        let mut into = vec![0; bytes];
        stream.read_exact(&mut into).unwrap();
        into
    }

    #[test]
    fn what_the_peer_has_not_taken_in_is_sent_again_in_order() {
        for taken_in in 0..=5_u8 {
            let (mut theirs, ours) = pair();
            let control = Control::new(ours, true).unwrap();
            for frame in 0..4 {
                control.send(vec![frame; 3], None, LIMIT).unwrap();
            }
            assert_eq!(read(&mut theirs, 12), [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]);
            control.acknowledge(1);
            drop(theirs);
            // Into a socket that is gone, and while there is none.
            control.send(vec![4; 3], None, LIMIT).unwrap();
            assert!(control.try_send(&[9]).unwrap());
            assert!(control.socket().is_none());
            control.send(vec![5; 3], None, LIMIT).unwrap();
            let (mut far, near) = pair();
            let resumed = control.resume(near, taken_in.into());
            if matches!(taken_in, 0 | 5) {
                assert_eq!(resumed, Err(Forgotten), "0 is acknowledged, 4 was never written");
                continue;
            }
            assert_eq!(resumed, Ok(()));
            control.send(vec![6; 3], None, LIMIT).unwrap();
            let expected: Vec<u8> = (taken_in..=6).flat_map(|frame| [frame; 3]).collect();
            assert_eq!(read(&mut far, expected.len()), expected);
            assert!(!control.is_acknowledged());
            control.acknowledge(7);
            assert!(control.is_acknowledged());
        }
    }

    #[test]
    fn a_frame_that_was_never_sent_cannot_be_acknowledged() {
        let (_theirs, ours) = pair();
        let control = Control::new(ours, true).unwrap();
        control.send(vec![1], None, LIMIT).unwrap();
        control.acknowledge(2);
        assert!(!control.is_acknowledged());
        let (_far, near) = pair();
        assert_eq!(control.resume(near, 2), Err(Forgotten));
    }

    #[test]
    fn a_frame_cut_by_a_full_socket_is_finished_before_the_next_one() {
        let (mut theirs, ours) = pair();
        let control = Control::new(ours, false).unwrap();
        let long = vec![1; 4 << 20];
        let error = control.send(long.clone(), None, Duration::from_millis(20)).unwrap_err();
        assert_eq!(error.kind(), std::io::ErrorKind::TimedOut);
        let reader = std::thread::spawn(move || {
            let bytes = read(&mut theirs, (4 << 20) + 3);
            (theirs, bytes)
        });
        control.send(vec![2; 3], None, LIMIT).unwrap();
        let (_theirs, bytes) = reader.join().unwrap();
        assert!(bytes[..4 << 20] == long && bytes[4 << 20..] == [2; 3]);
        assert!(control.is_acknowledged(), "nothing is kept where nothing is repeated");
    }

    #[test]
    fn messages_wait_for_acknowledgements_and_news_do_not() {
        let (theirs, ours) = pair();
        let control = Arc::new(Control::new(ours, true).unwrap());
        let reader = std::thread::spawn(move || {
            let mut bytes = Vec::new();
            (&theirs).read_to_end(&mut bytes).unwrap();
            bytes.len()
        });
        for _ in 0..9 {
            control.send_in_turn(vec![0; 1 << 20], LIMIT).unwrap();
        }
        let error = control.send_in_turn(vec![0; 1], Duration::from_millis(20)).unwrap_err();
        assert_eq!(error.kind(), std::io::ErrorKind::TimedOut);
        control.send(vec![1], None, LIMIT).unwrap();
        control.acknowledge(5);
        control.send_in_turn(vec![2], LIMIT).unwrap();
        control.lose();
        assert_eq!(reader.join().unwrap(), (9 << 20) + 2);
    }
}
