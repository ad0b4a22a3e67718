//! A store that serves PyTorch's clients: `torch.distributed.TCPStore(host, port, is_master=False)`.
//!
//! One thread a connection: PyTorch keeps one or two for each process. What a stranger can cost is bounded: connections,
//! bytes of a request, bytes of all contents.

use std::collections::BTreeMap;
use std::io::{self, Read as _, Write as _};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::os::fd::OwnedFd;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use rustix::event::{eventfd, poll, EventfdFlags, PollFd, PollFlags, Timespec};

use super::super::dial::would_block;
use super::super::table::Table;
use super::super::{owner, RendezvousError};
use super::message::{
    decode, put, Decoded, Request, CANCELLED, KEYS_MAX, NOT_READY, READY, VALIDATION,
};
use super::queues::Queues;

const CONNECTIONS_MAX: usize = 1024;
/// A request, and a reply, may be this long; torch's largest value and some keys fit.
const MESSAGE_BYTES_MAX: usize = 16 << 20;
const CHUNK_BYTES: usize = 64 << 10;
/// A new connection has this long to say the word that every client says first.
const VALIDATION_MAX: Duration = Duration::from_secs(10);
/// A request, or the taking of a reply, that stops moving for this long ends its connection.
const STALL_MAX: Duration = Duration::from_secs(60);
/// While a client waits for keys, its own word (that it waits no longer) is looked for this often.
const LOOK_EVERY: Duration = Duration::from_millis(20);

/// Serves PyTorch's `TCPStore` protocol until it is dropped.
///
/// Off unless somebody starts it: phalanx itself never needs it. It is for Python processes that join a job of phalanx's
/// launcher (an evaluation in PyTorch, say) and want a store to meet at.
///
/// # Security
///
/// The protocol has **no authentication and no encryption**: whoever reaches the port reads and changes everything in
/// this store. Bind it to loopback, or to a network that you trust. It shares nothing with phalanx's own store.
///
/// # Example
///
/// ```
/// use std::time::{Duration, Instant};
/// use phalanx_comm::rendezvous::{TcpStoreClient, TcpStoreServer};
///
/// let server = TcpStoreServer::start(([127, 0, 0, 1], 0).into())?;
/// let deadline = Instant::now() + Duration::from_secs(5);
/// let mut client = TcpStoreClient::connect("127.0.0.1", server.address().port(), deadline)?;
/// client.set("k", b"v", deadline)?;
/// assert_eq!(client.get("k", deadline)?, b"v");
/// # Ok::<(), phalanx_comm::rendezvous::RendezvousError>(())
/// ```
#[derive(Debug)]
pub struct TcpStoreServer {
    address: SocketAddr,
    shared: Arc<Shared>,
    acceptor: Option<JoinHandle<()>>,
}

#[derive(Debug)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
    stop: OwnedFd,
}

#[derive(Debug, Default)]
struct State {
    table: Table,
    queues: Queues,
    /// Second handles, to end connections from outside.
    connections: BTreeMap<u64, TcpStream>,
    is_over: bool,
}

impl State {
    fn has(&self, key: &str) -> bool {
        self.table.get(key).is_some() || self.queues.len(key) > 0
    }

    /// Those that are absent; a client waits for them from here on.
    fn enter_wait(&mut self, keys: &[String]) -> Vec<String> {
        let missing: Vec<String> = keys.iter().filter(|key| !self.has(key)).cloned().collect();
        for key in &missing {
            self.queues.enter(key);
        }
        missing
    }

    fn ends_wait(&self, keys: &[String]) -> bool {
        keys.iter().all(|key| self.table.get(key).is_some() || self.queues.wakes(key))
    }

    fn leave_wait(&mut self, keys: &[String], was_woken: bool) {
        for key in keys {
            self.queues.leave(key, was_woken);
        }
    }
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        // Every operation of Table leaves it whole, so a panic of another thread harms nothing.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl TcpStoreServer {
    /// Listens on `address` (port 0: a free one).
    ///
    /// # Errors
    ///
    /// [`RendezvousError::PortInUse`] naming the owner where `/proc` shows it, [`RendezvousError::Bind`] otherwise.
    pub fn start(address: SocketAddr) -> Result<Self, RendezvousError> {
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
        let state = Mutex::new(State::default());
        let shared = Arc::new(Shared { state, changed: Condvar::new(), stop });
        let of_thread = Arc::clone(&shared);
        let acceptor = thread::Builder::new()
            .name("TCPStore server".to_owned())
            .spawn(move || accept(&listener, &of_thread))
            .map_err(system("start the thread of the TCPStore server"))?;
        Ok(Self { address: bound, shared, acceptor: Some(acceptor) })
    }

    /// Where it listens; the port is the real one when 0 was asked for.
    #[must_use]
    pub const fn address(&self) -> SocketAddr {
        self.address
    }
}

impl Drop for TcpStoreServer {
    fn drop(&mut self) {
        if let Err(errno) = rustix::io::write(&self.shared.stop, &[1; 8]) {
            tracing::debug!(%errno, "the TCPStore server was told to stop before");
        }
        // The acceptor waits in poll alone, and waits for those that it has started.
        if let Some(acceptor) = self.acceptor.take() {
            if acceptor.join().is_err() {
                tracing::error!("the TCPStore server's thread panicked");
            }
        }
    }
}

/// Takes connections until the server is dropped, then ends them all.
fn accept(listener: &TcpListener, shared: &Arc<Shared>) {
    let mut threads: BTreeMap<u64, JoinHandle<()>> = BTreeMap::new();
    let mut next = 0;
    loop {
        let mut fds =
            [PollFd::new(&shared.stop, PollFlags::IN), PollFd::new(listener, PollFlags::IN)];
        let second = Timespec { tv_sec: 1, tv_nsec: 0 };
        if poll(&mut fds, Some(&second)).is_ok() && !fds[0].revents().is_empty() {
            break;
        }
        threads.retain(|_, thread| !thread.is_finished());
        let Ok((stream, peer)) = listener.accept() else {
            // Nobody, or no descriptors: then a moment later there may be some.
            thread::park_timeout(Duration::from_millis(1));
            continue;
        };
        if threads.len() >= CONNECTIONS_MAX {
            tracing::warn!(%peer, "the TCPStore has {CONNECTIONS_MAX} connections and takes no more");
            continue;
        }
        let Ok(second_handle) = stream.try_clone() else { continue };
        next += 1;
        let id = next;
        shared.state().connections.insert(id, second_handle);
        let of_thread = Arc::clone(shared);
        let serve = move || {
            if let Err(error) = Connection::serve(stream, &of_thread) {
                tracing::debug!(%peer, %error, "a connection to the TCPStore has ended");
            }
            drop(of_thread.state().connections.remove(&id));
        };
        match thread::Builder::new().name("TCPStore client".to_owned()).spawn(serve) {
            Ok(thread) => drop(threads.insert(id, thread)),
            Err(_) => drop(shared.state().connections.remove(&id)),
        }
    }
    let mut state = shared.state();
    state.is_over = true;
    for stream in state.connections.values() {
        // One that has ended by itself needs no end.
        drop(stream.shutdown(Shutdown::Both));
    }
    drop(state);
    shared.changed.notify_all();
    for thread in threads.into_values() {
        if thread.join().is_err() {
            tracing::error!("a thread of the TCPStore server panicked");
        }
    }
}

struct Connection<'s> {
    stream: TcpStream,
    shared: &'s Shared,
    input: Vec<u8>,
}

fn refused(what: impl Into<String>) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what.into())
}

impl<'s> Connection<'s> {
    fn serve(stream: TcpStream, shared: &'s Shared) -> io::Result<()> {
        stream.set_nonblocking(false)?;
        stream.set_nodelay(true)?;
        stream.set_write_timeout(Some(STALL_MAX))?;
        stream.set_read_timeout(Some(VALIDATION_MAX))?;
        let mut connection = Self { stream, shared, input: Vec::new() };
        match connection.next_request()? {
            Some(Request::Validate { magic: VALIDATION }) => {}
            _ => return Err(refused("it does not begin as a client of PyTorch 2.2 or newer does")),
        }
        connection.stream.set_read_timeout(Some(STALL_MAX))?;
        while let Some(request) = connection.next_request()? {
            connection.answer(request)?;
        }
        Ok(())
    }

    /// The next whole request; `None` when the client has gone between two.
    fn next_request(&mut self) -> io::Result<Option<Request>> {
        loop {
            match decode(&self.input) {
                Ok(Decoded::Whole(request, used)) => {
                    self.input.drain(..used);
                    return Ok(Some(request));
                }
                Ok(Decoded::More) if self.input.len() > MESSAGE_BYTES_MAX => {
                    return Err(refused(format!(
                        "a request of more than {MESSAGE_BYTES_MAX} bytes"
                    )))
                }
                Ok(Decoded::More) => {}
                Err(malformed) => return Err(refused(malformed.to_string())),
            }
            let start = self.input.len();
            self.input.resize(start + CHUNK_BYTES, 0);
            let got = self.stream.read(&mut self.input[start..]);
            self.input.truncate(start + got.as_ref().map_or(0, |count| *count));
            match got {
                Ok(0) if self.input.is_empty() => return Ok(None),
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                // A client may be silent between requests for as long as it likes, once it is known to be one.
                Err(error)
                    if would_block(&error)
                        && self.input.is_empty()
                        && self.stream.read_timeout()? == Some(STALL_MAX) => {}
                Err(error) => return Err(error),
            }
        }
    }

    fn answer(&mut self, request: Request) -> io::Result<()> {
        let reply = match request {
            Request::Wait { keys } => return self.wait(&keys),
            Request::CancelWait => vec![CANCELLED],
            Request::Ping { nonce } => nonce.to_le_bytes().to_vec(),
            Request::Validate { .. } => return Err(refused("a second validation")),
            other => {
                let reply = other_reply(&mut self.shared.state(), other)?;
                self.shared.changed.notify_all();
                reply
            }
        };
        self.stream.write_all(&reply)
    }

    /// Answers when all keys are there, or when the client calls the wait off.
    fn wait(&mut self, keys: &[String]) -> io::Result<()> {
        let missing = self.shared.state().enter_wait(keys);
        if missing.is_empty() {
            return self.stream.write_all(&[READY]);
        }
        let end = self.wait_on(&missing);
        self.shared.state().leave_wait(&missing, matches!(end, Ok(Some(READY))));
        match end? {
            Some(answer) => self.stream.write_all(&[answer]),
            None => Ok(()),
        }
    }

    /// What to answer a client that waits; nothing to one that is gone, or when the server ends.
    fn wait_on(&mut self, keys: &[String]) -> io::Result<Option<u8>> {
        loop {
            let state = self.shared.state();
            if state.ends_wait(keys) {
                return Ok(Some(READY));
            }
            if state.is_over {
                return Ok(None);
            }
            let waited = self.shared.changed.wait_timeout(state, LOOK_EVERY);
            drop(waited.unwrap_or_else(PoisonError::into_inner));
            self.stream.set_nonblocking(true)?;
            let peeked = self.stream.peek(&mut [0]);
            self.stream.set_nonblocking(false)?;
            match peeked {
                Ok(0) => return Ok(None),
                // Its next word: that it waits no longer.
                Ok(_) => {
                    return match self.next_request()? {
                        None => Ok(None),
                        Some(Request::CancelWait) => Ok(Some(CANCELLED)),
                        Some(_) => Err(refused("another request while it waits")),
                    }
                }
                Err(error) if would_block(&error) => {}
                Err(error) => return Err(error),
            }
        }
    }
}

/// What the contents have to say.
fn other_reply(state: &mut State, request: Request) -> io::Result<Vec<u8>> {
    let all_there =
        matches!(&request, Request::Check { keys } if keys.iter().all(|key| state.has(key)));
    let State { table, queues, .. } = state;
    let failed = |error: super::super::StoreError| refused(error.to_string());
    let mut reply = Vec::new();
    match request {
        Request::Set { key, value } => table.set(&key, &value).map_err(failed)?,
        Request::CompareSet { key, expected, desired } => {
            let now = match table.get(&key) {
                None if !expected.is_empty() => expected,
                now if now.unwrap_or_default() == expected => {
                    table.set(&key, &desired).map_err(failed)?;
                    desired
                }
                now => now.unwrap_or_default().to_vec(),
            };
            put(&mut reply, &now);
        }
        Request::Get { key } => put(&mut reply, table.get(&key).unwrap_or_default()),
        Request::Add { key, delta } => {
            reply.extend(table.add(&key, delta).map_err(failed)?.to_le_bytes());
        }
        Request::Check { .. } => reply.push(if all_there { READY } else { NOT_READY }),
        Request::CountKeys => reply.extend(count(table.list("").len())),
        Request::Delete { key } => reply.extend(i64::from(table.delete(&key)).to_le_bytes()),
        Request::Append { key, value } => {
            let all = [table.get(&key).unwrap_or_default(), &value].concat();
            table.set(&key, &all).map_err(failed)?;
        }
        Request::MultiGet { keys } => {
            for key in keys {
                put(&mut reply, table.get(&key).unwrap_or_default());
                if reply.len() > MESSAGE_BYTES_MAX {
                    return Err(refused("it asks for too many bytes at once"));
                }
            }
        }
        Request::MultiSet { entries } => {
            for (key, value) in entries {
                table.set(&key, &value).map_err(failed)?;
            }
        }
        Request::QueuePush { key, value } => queues.push(&key, value).map_err(failed)?,
        Request::QueuePop { key } => {
            let (length, first) = queues.pop(&key);
            reply.extend(count(length));
            if let Some(value) = first {
                put(&mut reply, &value);
            }
        }
        Request::QueueLen { key } => reply.extend(count(queues.len(&key))),
        Request::ListKeys => {
            let keys = table.list("");
            let shown = &keys[..keys.len().min(KEYS_MAX)];
            reply.extend(count(shown.len()));
            for key in shown {
                put(&mut reply, key.as_bytes());
            }
        }
        Request::Wait { .. }
        | Request::CancelWait
        | Request::Ping { .. }
        | Request::Validate { .. } => {}
    }
    Ok(reply)
}

fn count(number: usize) -> [u8; 8] {
    (number as u64).to_le_bytes()
}
