//! One end of a control socket: frames out, bytes and file descriptors in.

use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use rustix::event::{poll, PollFd, PollFlags, Timespec};
use rustix::io::Errno;
use rustix::net::{
    recvmsg, send, sendmsg, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags,
    SendAncillaryBuffer, SendAncillaryMessage, SendFlags,
};

/// A control socket.
#[derive(Debug)]
pub(crate) struct Control {
    fd: OwnedFd,
    /// Held while a frame is written, so that frames of two threads do not mix. What is left of a
    /// heartbeat that did not fit goes first.
    writing: Mutex<Vec<u8>>,
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

impl Control {
    pub(crate) fn new(fd: OwnedFd) -> std::io::Result<Self> {
        rustix::io::ioctl_fionbio(&fd, true)?;
        Ok(Self { fd, writing: Mutex::default() })
    }

    pub(crate) fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    /// Writes a frame if nobody else writes and it fits at once: a peer that has unread frames of
    /// ours needs no sign of life.
    pub(crate) fn try_send(&self, frame: &[u8]) -> std::io::Result<()> {
        let Ok(mut rest) = self.writing.try_lock() else { return Ok(()) };
        if rest.is_empty() {
            rest.extend_from_slice(frame);
            let sent = match send(&self.fd, &rest, SendFlags::NOSIGNAL) {
                Ok(sent) => sent,
                Err(Errno::AGAIN | Errno::INTR) => rest.len(),
                Err(error) => {
                    rest.clear();
                    return Err(error.into());
                }
            };
            rest.drain(..sent);
        }
        Ok(())
    }

    /// Writes a whole frame within `limit`, with a descriptor attached to its first byte.
    pub(crate) fn send(
        &self,
        frame: &[u8],
        descriptor: Option<BorrowedFd<'_>>,
        limit: Duration,
    ) -> std::io::Result<()> {
        let mut rest = self.writing.lock().unwrap_or_else(PoisonError::into_inner);
        let deadline = Instant::now() + limit;
        if !rest.is_empty() {
            self.write(&rest, None, deadline)?;
            rest.clear();
        }
        self.write(frame, descriptor, deadline)
    }

    fn write(
        &self,
        frame: &[u8],
        descriptor: Option<BorrowedFd<'_>>,
        deadline: Instant,
    ) -> std::io::Result<()> {
        let mut sent = 0;
        while sent < frame.len() {
            let rest = &frame[sent..];
            let result = match descriptor {
                Some(descriptor) if sent == 0 => self.send_with(rest, descriptor),
                _ => send(&self.fd, rest, SendFlags::NOSIGNAL),
            };
            match result {
                Ok(bytes) => sent += bytes,
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => self.wait_writable(deadline)?,
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    fn send_with(&self, bytes: &[u8], descriptor: BorrowedFd<'_>) -> rustix::io::Result<usize> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        let descriptors = [descriptor];
        let fits = ancillary.push(SendAncillaryMessage::ScmRights(&descriptors));
        debug_assert!(fits, "the space is made for one descriptor");
        sendmsg(&self.fd, &[IoSlice::new(bytes)], &mut ancillary, SendFlags::NOSIGNAL)
    }

    fn wait_writable(&self, deadline: Instant) -> std::io::Result<()> {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            let what = "the peer does not read its control socket";
            return Err(std::io::Error::new(std::io::ErrorKind::TimedOut, what));
        }
        let limit = Timespec { tv_sec: 0, tv_nsec: left.min(SLICE).subsec_nanos().into() };
        match poll(&mut [PollFd::new(&self.fd, PollFlags::OUT)], Some(&limit)) {
            Ok(_) | Err(Errno::INTR) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    /// Reads what is there.
    pub(crate) fn receive(&self, into: &mut [u8]) -> std::io::Result<Received> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(4))];
        let mut ancillary = RecvAncillaryBuffer::new(&mut space);
        let mut buffers = [IoSliceMut::new(into)];
        let message = recvmsg(&self.fd, &mut buffers, &mut ancillary, RecvFlags::CMSG_CLOEXEC);
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

/// The longest single sleep.
const SLICE: Duration = Duration::from_millis(100);
