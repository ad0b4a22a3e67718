//! Incoming connections while a group is made, until they have proved which rank they come from.
//!
//! All are read at once, each for two seconds and [`HELLO_BYTES`] bytes: one that sends nothing, or
//! slowly, keeps nobody waiting. When there are too many, the oldest is closed.

use std::collections::VecDeque;
use std::io::{ErrorKind, Read};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use std::net::TcpStream;

/// A greeting: magic, kind, rank, secret.
pub(crate) const HELLO_BYTES: usize = 8 + 8 + 32;
/// How long a connection may take to say who it is.
const HELLO_TIMEOUT: Duration = Duration::from_secs(2);
/// Connections at a time, beside those of ranks.
const STRANGERS_MAX: usize = 64;
/// At most one warning in this time.
const WARNING_EVERY: Duration = Duration::from_secs(10);

/// Of either family.
#[derive(Debug)]
pub(crate) enum Line {
    Unix(UnixStream),
    Tcp(TcpStream),
}

impl Line {
    fn read(&mut self, into: &mut [u8]) -> std::io::Result<usize> {
        match self {
            Self::Unix(stream) => stream.read(into),
            Self::Tcp(stream) => stream.read(into),
        }
    }
}

impl AsFd for Line {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Unix(stream) => stream.as_fd(),
            Self::Tcp(stream) => stream.as_fd(),
        }
    }
}

#[derive(Debug)]
struct Caller {
    line: Line,
    hello: [u8; HELLO_BYTES],
    have: usize,
    deadline: Instant,
}

/// How far a caller has come.
enum Heard {
    Later,
    Whole,
    Gone,
}

impl Caller {
    fn hear(&mut self) -> Heard {
        while self.have < HELLO_BYTES {
            match self.line.read(&mut self.hello[self.have..]) {
                Ok(0) => return Heard::Gone,
                Ok(count) => self.have += count,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Heard::Later,
                Err(_) => return Heard::Gone,
            }
        }
        Heard::Whole
    }
}

/// Those who have not yet said who they are, the oldest first.
#[derive(Debug)]
pub(crate) struct Callers {
    callers: VecDeque<Caller>,
    /// Those that had said all when there was no more room for them.
    whole: Vec<(Line, [u8; HELLO_BYTES])>,
    max: usize,
    warned: Option<Instant>,
}

impl Callers {
    /// For a group of so many ranks, each of which may have two connections on their way.
    pub(crate) fn new(ranks: usize) -> Self {
        let max = 2 * ranks + STRANGERS_MAX;
        Self { callers: VecDeque::new(), whole: Vec::new(), max, warned: None }
    }

    /// What to wait for.
    pub(crate) fn fds(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        self.callers.iter().map(|caller| caller.line.as_fd())
    }

    /// A connection that has come.
    pub(crate) fn add(&mut self, line: Line) {
        let ready = match &line {
            Line::Unix(stream) => stream.set_nonblocking(true),
            Line::Tcp(stream) => stream.set_nonblocking(true),
        };
        if ready.is_err() {
            return;
        }
        if self.callers.len() >= self.max {
            self.make_room();
        }
        let deadline = Instant::now() + HELLO_TIMEOUT;
        self.callers.push_back(Caller { line, hello: [0; HELLO_BYTES], have: 0, deadline });
    }

    /// The oldest goes, unless it has said all by now.
    fn make_room(&mut self) {
        let Some(mut oldest) = self.callers.pop_front() else { return };
        match oldest.hear() {
            Heard::Whole => self.whole.push((oldest.line, oldest.hello)),
            Heard::Later | Heard::Gone => {
                self.warn("there are too many connections that have not said who they are");
            }
        }
    }

    /// Those whose greeting is whole by now.
    pub(crate) fn heard(&mut self) -> Vec<(Line, [u8; HELLO_BYTES])> {
        let now = Instant::now();
        let mut whole = std::mem::take(&mut self.whole);
        for mut caller in std::mem::take(&mut self.callers) {
            match caller.hear() {
                Heard::Whole => whole.push((caller.line, caller.hello)),
                Heard::Later if now < caller.deadline => self.callers.push_back(caller),
                Heard::Later => self.warn("a connection did not say in time who it is"),
                Heard::Gone => self.warn("a connection was closed before it had said who it is"),
            }
        }
        whole
    }

    /// Not for each of them.
    pub(crate) fn warn(&mut self, what: &str) {
        let now = Instant::now();
        if self.warned.is_none_or(|warned| now.duration_since(warned) >= WARNING_EVERY) {
            self.warned = Some(now);
            tracing::warn!("{what}: it was closed");
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::thread;

    use super::*;
    use crate::control::card::Card;
    use crate::control::mesh;
    use crate::environment::{HostLink, World};

    /// More than one after another could be heard in the time that there is.
    #[test]
    fn strangers_that_say_nothing_or_slowly_keep_no_rank_waiting() {
        let deadline = Instant::now() + Duration::from_secs(20);
        let listen = |_| mesh::listen(&World::single(), HostLink::Tcp, deadline).unwrap();
        let listening: Vec<mesh::Listening> = (0..2).map(listen).collect();
        let cards: Vec<Card> = listening.iter().map(|one| one.card.clone()).collect();
        let at = cards[0].address;
        let idle: Vec<TcpStream> = (0..40).map(|_| TcpStream::connect(at).unwrap()).collect();
        let mut slow = TcpStream::connect(at).unwrap();
        slow.write_all(b"phal").unwrap();
        let (sender, receiver) = std::sync::mpsc::channel();
        for (rank, one) in listening.into_iter().enumerate() {
            let (cards, sender) = (cards.clone(), sender.clone());
            thread::spawn(move || {
                // The honest one comes last.
                thread::park_timeout(Duration::from_millis(if rank == 1 { 100 } else { 0 }));
                let made = mesh::connect(&one, rank, &cards, deadline).map(|pairs| pairs.len());
                sender.send(made.map_err(|error| error.to_string())).unwrap();
            });
        }
        for _ in 0..2 {
            slow.write_all(b"a").ok();
            assert_eq!(receiver.recv_timeout(Duration::from_secs(60)).unwrap(), Ok(2));
        }
        drop(idle);
    }

    #[test]
    fn the_oldest_goes_when_there_are_too_many_and_late_ones_go_too() {
        let mut callers = Callers::new(1);
        let pairs: Vec<_> = (0..100).map(|_| UnixStream::pair().unwrap()).collect();
        let mut ours = Vec::new();
        for (near, far) in pairs {
            callers.add(Line::Unix(near));
            ours.push(far);
        }
        assert_eq!(callers.fds().count(), 66);
        ours[99].write_all(&[7; HELLO_BYTES]).unwrap();
        assert!(ours[0].write_all(&[7; HELLO_BYTES]).is_err(), "it was closed");
        let heard = callers.heard();
        assert_eq!(heard.len(), 1);
        assert_eq!(heard[0].1, [7; HELLO_BYTES]);
        for caller in &mut callers.callers {
            caller.deadline = Instant::now();
        }
        assert!(callers.heard().is_empty());
        assert_eq!(callers.fds().count(), 0);
    }
}
