//! The store's server: one thread, one poll loop, no more memory than the contents and what honest clients send.
//!
//! Strangers cost little: at most 256 at a time (the oldest goes first), two seconds and 64 bytes each, and one
//! warning in ten seconds for all of them.
//!
//! A request is answered before the next one of the same connection is read; a `get` that waits does not hold up other
//! connections, and ends when its client goes.

mod connection;
mod engine;
#[cfg(test)]
mod simulation;

use std::collections::BTreeMap;
use std::io;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use rustix::event::{eventfd, poll, EventfdFlags, PollFd, PollFlags, Timespec};

use self::connection::{Closed, Connection};
use self::engine::{ConnectionId, Due, Engine};
use super::handshake::Credentials;
use super::{owner, random_bytes, RendezvousError};

/// Connections that have not proved the job token yet.
const STRANGERS_MAX: usize = 256;
/// The longest that a server lingers: a deadline has to be a moment that can be represented.
const LINGER_MAX: Duration = Duration::from_secs(365 * 24 * 3600);
/// At most one warning about strangers in this time.
const WARNING_EVERY: Duration = Duration::from_secs(10);
/// Connections accepted before the others get their turn again.
const ACCEPTS_PER_TURN: usize = 64;
/// How long accepting rests when the process has no file descriptors left.
const ACCEPT_REST: Duration = Duration::from_millis(100);

/// Serves a store over TCP until it is dropped.
///
/// # Example
///
/// ```
/// use std::time::{Duration, Instant};
/// use phalanx_rendezvous::environment::JobToken;
/// use phalanx_rendezvous::{Credentials, Store, StoreClient, StoreServer};
///
/// let credentials = Credentials {
///     run_id: "docs".to_owned(),
///     restart_count: 0,
///     job_token: JobToken::generate()?,
/// };
/// let server = StoreServer::start(([127, 0, 0, 1], 0).into(), credentials.clone())?;
/// let deadline = Instant::now() + Duration::from_secs(5);
/// let port = server.address().port();
/// let client = StoreClient::connect("127.0.0.1", port, credentials, deadline)?;
/// client.set("greeting", b"hello")?;
/// assert_eq!(client.get("greeting", deadline)?, b"hello");
/// # Ok::<(), phalanx_rendezvous::RendezvousError>(())
/// ```
#[derive(Debug)]
pub struct StoreServer {
    address: SocketAddr,
    stop: Arc<Stop>,
    thread: Option<JoinHandle<()>>,
}

impl StoreServer {
    /// Listens on `address` (port 0: a free one) and serves from a thread of its own.
    ///
    /// # Errors
    ///
    /// [`RendezvousError::PortInUse`] naming the owner where `/proc` shows it, [`RendezvousError::Bind`] otherwise.
    pub fn start(address: SocketAddr, credentials: Credentials) -> Result<Self, RendezvousError> {
        let listener = TcpListener::bind(address).map_err(|source| match source.kind() {
            io::ErrorKind::AddrInUse => RendezvousError::PortInUse {
                host: address.ip().to_string(),
                port: address.port(),
                owner: owner::of_port(address.port()),
            },
            _ => RendezvousError::Bind { address: address.to_string(), source },
        })?;
        let system = |call| move |source| RendezvousError::System { call, source };
        let bound = listener.local_addr().map_err(system("getsockname"))?;
        listener.set_nonblocking(true).map_err(system("fcntl"))?;
        let stop = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)
            .map_err(|errno| RendezvousError::System { call: "eventfd", source: errno.into() })?;
        let stop = Arc::new(Stop { event: stop, linger_until: Mutex::new(None) });
        let server = Loop {
            listener,
            stop: Arc::clone(&stop),
            credentials,
            engine: Engine::default(),
            connections: BTreeMap::new(),
            next_id: 0,
            accept_after: None,
            warnings: Warnings::default(),
            linger_until: None,
        };
        let thread = thread::Builder::new()
            .name("store server".to_owned())
            .spawn(move || server.run())
            .map_err(system("start the thread of the store server"))?;
        Ok(Self { address: bound, stop, thread: Some(thread) })
    }

    /// Where it listens; the port is the real one when 0 was asked for.
    #[must_use]
    pub const fn address(&self) -> SocketAddr {
        self.address
    }
}

impl StoreServer {
    /// From now on it ends as soon as no client is connected any more, at `limit` at the latest. Dropping it afterwards
    /// waits for that: a rank that hosts the store does not take it from under the others.
    pub fn linger(&self, limit: Duration) {
        let until = Instant::now() + limit.min(LINGER_MAX);
        *self.stop.linger_until.lock().unwrap_or_else(PoisonError::into_inner) = Some(until);
    }
}

/// How the server's thread is told to end.
#[derive(Debug)]
struct Stop {
    event: OwnedFd,
    /// Not at once, but when the clients have gone.
    linger_until: Mutex<Option<Instant>>,
}

impl Drop for StoreServer {
    fn drop(&mut self) {
        // The loop blocks nowhere but in poll, which any count but zero ends.
        if let Err(errno) = rustix::io::write(&self.stop.event, &[1; 8]) {
            tracing::debug!(%errno, "the store server was told to stop before");
        }
        if let Some(thread) = self.thread.take() {
            if thread.join().is_err() {
                tracing::error!("the store server's thread panicked");
            }
        }
    }
}

/// The poll loop's state.
struct Loop {
    listener: TcpListener,
    stop: Arc<Stop>,
    credentials: Credentials,
    engine: Engine,
    connections: BTreeMap<ConnectionId, Connection>,
    next_id: ConnectionId,
    /// Accepting rests until then.
    accept_after: Option<Instant>,
    warnings: Warnings,
    /// The server ends when its clients have gone, or then.
    linger_until: Option<Instant>,
}

/// What poll reported.
struct Events {
    stop: PollFlags,
    listener: PollFlags,
    connections: Vec<(ConnectionId, PollFlags)>,
}

impl Loop {
    fn run(mut self) {
        loop {
            let events = match self.poll() {
                Ok(events) => events,
                Err(error) => {
                    tracing::error!(%error, "the store server stops: poll failed");
                    return;
                }
            };
            if !events.stop.is_empty() {
                let linger = self.stop.linger_until.lock().unwrap_or_else(PoisonError::into_inner);
                self.linger_until = *linger;
                if linger.is_none() {
                    return;
                }
            }
            let now = Instant::now();
            for (id, flags) in events.connections {
                self.serve(id, flags, now);
            }
            let expired = self.engine.expired(now);
            self.deliver(expired, now);
            self.close_late(now);
            if !events.listener.is_empty() {
                self.accept(now);
            }
            if self.linger_until.is_some_and(|until| until <= now || !self.has_members()) {
                return;
            }
        }
    }

    fn poll(&self) -> io::Result<Events> {
        let resting = self.accept_after.is_some_and(|after| after > Instant::now());
        // Its event stays readable for ever: once it is heeded it is of no more interest.
        let stop = if self.linger_until.is_some() { PollFlags::empty() } else { PollFlags::IN };
        let accepting = if resting { PollFlags::empty() } else { PollFlags::IN };
        let mut fds =
            vec![PollFd::new(&self.stop.event, stop), PollFd::new(&self.listener, accepting)];
        fds.extend(self.connections.iter().map(|(&id, connection)| {
            let flags = if connection.has_output() {
                PollFlags::OUT
            } else if self.engine.is_waiting(id) {
                // It owes us nothing: only its end is of interest.
                PollFlags::RDHUP
            } else {
                PollFlags::IN
            };
            PollFd::new(&connection.stream, flags)
        }));
        let timeout = self.next_deadline().map(timespec_until);
        while let Err(errno) = poll(&mut fds, timeout.as_ref()) {
            if errno != rustix::io::Errno::INTR {
                return Err(errno.into());
            }
        }
        let connections = self.connections.keys().zip(&fds[2..]);
        Ok(Events {
            stop: fds[0].revents(),
            listener: fds[1].revents(),
            connections: connections
                .filter(|(_, fd)| !fd.revents().is_empty())
                .map(|(&id, fd)| (id, fd.revents()))
                .collect(),
        })
    }

    fn has_members(&self) -> bool {
        self.connections.values().any(|connection| !connection.is_stranger())
    }

    fn next_deadline(&self) -> Option<Instant> {
        let connections = self.connections.values().filter_map(Connection::deadline).min();
        [connections, self.engine.next_deadline(), self.accept_after, self.linger_until]
            .into_iter()
            .flatten()
            .min()
    }

    /// Moves the bytes of one connection and answers the requests that are complete.
    fn serve(&mut self, id: ConnectionId, flags: PollFlags, now: Instant) {
        let Some(connection) = self.connections.get_mut(&id) else { return };
        let moved = if flags.contains(PollFlags::OUT) {
            connection.flush(now).map_err(Closed::from)
        } else if flags.contains(PollFlags::RDHUP) {
            Err(Closed::Gone)
        } else {
            connection.receive(&self.credentials, now)
        };
        match moved {
            Ok(()) => self.answer(id, now),
            Err(closed) => self.close(id, closed, now),
        }
    }

    /// Answers requests until the input holds no whole one, or the connection waits.
    fn answer(&mut self, id: ConnectionId, now: Instant) {
        loop {
            let Some(connection) = self.connections.get_mut(&id) else { return };
            if connection.has_output() || self.engine.is_waiting(id) {
                return;
            }
            match connection.next_request(|request| self.engine.handle(id, request, now)) {
                Ok(None) => return,
                Ok(Some(due)) => self.deliver(due, now),
                Err(closed) => self.close(id, closed, now),
            }
        }
    }

    fn deliver(&mut self, due: Due, now: Instant) {
        for (id, reply) in due {
            let Some(connection) = self.connections.get_mut(&id) else { continue };
            if let Err(closed) = connection.reply(&reply, now) {
                self.close(id, closed, now);
            }
        }
    }

    fn close_late(&mut self, now: Instant) {
        let late: Vec<ConnectionId> = self
            .connections
            .iter()
            .filter(|(_, connection)| connection.deadline().is_some_and(|at| at <= now))
            .map(|(&id, _)| id)
            .collect();
        for id in late {
            let Some(connection) = self.connections.get(&id) else { continue };
            let closed = connection.late();
            self.close(id, closed, now);
        }
    }

    fn accept(&mut self, now: Instant) {
        self.accept_after = None;
        for _ in 0..ACCEPTS_PER_TURN {
            match self.listener.accept() {
                Ok((stream, peer)) => self.welcome(stream, peer, now),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(error) => {
                    // Out of descriptors or memory, or the peer is gone again: others are still served.
                    tracing::debug!(%error, "the store server could not accept a connection");
                    self.accept_after = Some(now + ACCEPT_REST);
                    return;
                }
            }
        }
    }

    fn welcome(&mut self, stream: TcpStream, peer: SocketAddr, now: Instant) {
        let strangers = self.connections.iter().filter(|(_, c)| c.is_stranger());
        let (oldest, count) =
            strangers.fold((None, 0), |(oldest, count), (&id, _)| (oldest.or(Some(id)), count + 1));
        if let Some(oldest) = oldest.filter(|_| count >= STRANGERS_MAX) {
            let why = "was the oldest of too many that had not finished the handshake";
            self.close(oldest, Closed::Suspicious(why.to_owned()), now);
        }
        let Ok(nonce) = random_bytes() else { return };
        if let Ok(connection) = Connection::new(stream, peer, &self.credentials, nonce, now) {
            self.connections.insert(self.next_id, connection);
            self.next_id += 1;
        }
    }

    fn close(&mut self, id: ConnectionId, closed: Closed, now: Instant) {
        self.engine.forget(id);
        let Some(connection) = self.connections.remove(&id) else { return };
        if let Closed::Suspicious(what) = closed {
            self.warnings.warn(connection.peer, &what, now);
        }
    }
}

/// Time until `deadline`, rounded up to a millisecond so that poll does not return just before it.
fn timespec_until(deadline: Instant) -> Timespec {
    let left = deadline.saturating_duration_since(Instant::now()) + Duration::from_millis(1);
    Timespec {
        tv_sec: i64::try_from(left.as_secs()).unwrap_or(i64::MAX),
        tv_nsec: i64::from(left.subsec_nanos()),
    }
}

/// One warning in ten seconds, however many strangers there are.
#[derive(Debug, Default)]
struct Warnings {
    last: Option<Instant>,
    suppressed: u64,
}

impl Warnings {
    fn warn(&mut self, peer: SocketAddr, what: &str, now: Instant) {
        if self.last.is_some_and(|last| now.duration_since(last) < WARNING_EVERY) {
            self.suppressed += 1;
            return;
        }
        tracing::warn!(%peer, suppressed = self.suppressed, "closed a connection to the store that {what}");
        self.last = Some(now);
        self.suppressed = 0;
    }
}
