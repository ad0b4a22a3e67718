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

/// A peer that does not read for so long is stopped or gone.
const SEND_TIMEOUT: Duration = Duration::from_secs(2);

/// A control socket.
#[derive(Debug)]
pub(crate) struct Control {
    fd: OwnedFd,
    /// Held while a frame is written, so that frames of two threads do not mix.
    writing: Mutex<()>,
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
        Ok(Self { fd, writing: Mutex::new(()) })
    }

    pub(crate) fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    /// Writes a whole frame, with a descriptor attached to its first byte.
    pub(crate) fn send(
        &self,
        frame: &[u8],
        descriptor: Option<BorrowedFd<'_>>,
    ) -> std::io::Result<()> {
        let _writing = self.writing.lock().unwrap_or_else(PoisonError::into_inner);
        let deadline = Instant::now() + SEND_TIMEOUT;
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
