//! The store as ranks see it: a few authenticated connections, one request at a time on each.
//!
//! A `get` that waits keeps its connection to itself; others use another one, made when it is needed. Giving up a wait
//! is closing its connection, which the server notices at once.

use std::collections::BTreeMap;
use std::io::{self, Write as _};
use std::net::{Shutdown, TcpStream};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::dial::{read_until, Dial, Greeting};
use super::frame::{
    decode_reply_header, encode_request, join_keys, split_keys, KeyList, Reply, ReplyStatus,
    Request, REPLY_HEADER_BYTES,
};
use super::handshake::Credentials;
use super::table::{check_entry, check_key, STORE_BYTES_MAX};
use super::{RendezvousError, Store, StoreError};

/// Idle connections that are kept.
const IDLE_MAX: usize = 4;
/// The server answers at once; a host that is overloaded or stopped for this long counts as gone.
const REPLY_MAX: Duration = Duration::from_secs(30);
/// A `get` that timed out at the server is answered by the server; this much later it counts as gone.
const GET_SLACK: Duration = Duration::from_secs(5);

/// A [`Store`] served by a [`StoreServer`](super::StoreServer) somewhere.
#[derive(Debug)]
pub struct StoreClient {
    host: String,
    port: u16,
    credentials: Credentials,
    state: Mutex<Connections>,
}

#[derive(Debug, Default)]
struct Connections {
    idle: Vec<TcpStream>,
    /// Second handles of the connections on which a `get` waits, to shut them down.
    waiting: BTreeMap<u64, TcpStream>,
    next_wait: u64,
    cancelled: bool,
}

impl StoreClient {
    /// Connects, trying until `deadline`.
    ///
    /// # Errors
    ///
    /// The [`RendezvousError`] of the last attempt: each cause has its own.
    pub fn connect(
        host: &str,
        port: u16,
        credentials: Credentials,
        deadline: Instant,
    ) -> Result<Self, RendezvousError> {
        let hint = "";
        let stream = Dial { host, port, greeting: Greeting::Phalanx(&credentials), hint }
            .connect(deadline)?;
        let state = Mutex::new(Connections { idle: vec![stream], ..Connections::default() });
        Ok(Self { host: host.to_owned(), port, credentials, state })
    }

    fn state(&self) -> MutexGuard<'_, Connections> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Closes the connections that are not in use.
    pub(super) fn close_idle(&self) {
        self.state().idle.clear();
    }

    fn address(&self) -> String {
        format!("{}:{}", self.host, self.port)
    }

    /// An idle connection, or a new one.
    fn checkout(&self, deadline: Instant) -> Result<TcpStream, StoreError> {
        if let Some(stream) = self.state().idle.pop() {
            return Ok(stream);
        }
        let dial = Dial {
            host: &self.host,
            port: self.port,
            greeting: Greeting::Phalanx(&self.credentials),
            hint: "",
        };
        dial.connect(deadline).map_err(|error| StoreError::Rendezvous(Box::new(error)))
    }

    fn give_back(&self, stream: TcpStream) {
        let mut state = self.state();
        if state.idle.len() < IDLE_MAX {
            state.idle.push(stream);
        }
    }

    /// One request that the server answers at once.
    fn call(&self, request: &Request<'_>) -> Result<Reply, StoreError> {
        let deadline = Instant::now() + REPLY_MAX;
        let mut stream = self.checkout(deadline)?;
        let reply = self.exchange(&mut stream, request, deadline)?;
        self.give_back(stream);
        Ok(reply)
    }

    fn exchange(
        &self,
        stream: &mut TcpStream,
        request: &Request<'_>,
        deadline: Instant,
    ) -> Result<Reply, StoreError> {
        let lost = |source| StoreError::Disconnected { address: self.address(), source };
        let garbled = |what: String| StoreError::Protocol { address: self.address(), what };
        stream.set_write_timeout(Some(REPLY_MAX)).map_err(lost)?;
        stream.write_all(&encode_request(request)).map_err(lost)?;
        let mut header = [0; REPLY_HEADER_BYTES];
        read_until(stream, &mut header, deadline).map_err(lost)?;
        let (status, number, value_bytes) =
            decode_reply_header(&header).map_err(|error| garbled(error.to_string()))?;
        let mut value = vec![0; value_bytes];
        // The value follows its header: it gets a time of its own, for a `get` was answered late by nature.
        read_until(stream, &mut value, Instant::now() + REPLY_MAX).map_err(lost)?;
        Ok(Reply { status, number, value })
    }

    /// Sends a change and turns a status that refuses it into its error.
    fn change(&self, key: &str, request: &Request<'_>) -> Result<Reply, StoreError> {
        let reply = self.call(request)?;
        match reply.status {
            ReplyStatus::Done | ReplyStatus::Absent => Ok(reply),
            ReplyStatus::NotACounter => Err(StoreError::NotACounter { key: key.to_owned() }),
            ReplyStatus::Full => Err(StoreError::Full { max: STORE_BYTES_MAX }),
            ReplyStatus::TimedOut => Err(StoreError::Protocol {
                address: self.address(),
                what: "a time-out for a request that does not wait".to_owned(),
            }),
        }
    }

    /// Registers a waiting connection; `None` when this handle was cancelled.
    fn register(&self, stream: &TcpStream) -> io::Result<Option<u64>> {
        let second = stream.try_clone()?;
        let mut state = self.state();
        if state.cancelled {
            return Ok(None);
        }
        let id = state.next_wait;
        state.next_wait += 1;
        state.waiting.insert(id, second);
        Ok(Some(id))
    }
}

impl Store for StoreClient {
    fn set(&self, key: &str, value: &[u8]) -> Result<(), StoreError> {
        check_entry(key, value)?;
        self.change(key, &Request::Set { key, value }).map(drop)
    }

    fn get(&self, key: &str, deadline: Instant) -> Result<Vec<u8>, StoreError> {
        check_key(key)?;
        let start = Instant::now();
        let cancelled = || StoreError::Cancelled { key: key.to_owned() };
        let mut stream = self.checkout(deadline.max(start + GET_SLACK))?;
        let lost = |source| StoreError::Disconnected { address: self.address(), source };
        let Some(id) = self.register(&stream).map_err(lost)? else { return Err(cancelled()) };
        let left = deadline.saturating_duration_since(Instant::now());
        // Rounded up: a server that gives up a moment before the deadline would make callers spin.
        let wait_ms = i64::try_from(left.as_micros().div_ceil(1000)).unwrap_or(i64::MAX);
        let request = Request::Get { key, wait_ms };
        let result = self.exchange(&mut stream, &request, deadline.max(start) + GET_SLACK);
        let mut state = self.state();
        drop(state.waiting.remove(&id));
        if state.cancelled {
            return Err(cancelled());
        }
        drop(state);
        let reply = result?;
        self.give_back(stream);
        match reply.status {
            ReplyStatus::Done => Ok(reply.value),
            _ => Err(StoreError::Timeout { key: key.to_owned(), waited: start.elapsed() }),
        }
    }

    fn add(&self, key: &str, delta: i64) -> Result<i64, StoreError> {
        check_key(key)?;
        self.change(key, &Request::Add { key, delta }).map(|reply| reply.number)
    }

    fn compare_set(
        &self,
        key: &str,
        expected: Option<&[u8]>,
        desired: &[u8],
    ) -> Result<Option<Vec<u8>>, StoreError> {
        check_entry(key, desired)?;
        check_entry(key, expected.unwrap_or_default())?;
        let reply = self.change(key, &Request::CompareSet { key, expected, desired })?;
        Ok((reply.status == ReplyStatus::Done).then_some(reply.value))
    }

    fn delete(&self, key: &str) -> Result<bool, StoreError> {
        check_key(key)?;
        self.change(key, &Request::Delete { key }).map(|reply| reply.number == 1)
    }

    fn check(&self, keys: &[&str]) -> Result<bool, StoreError> {
        // In portions that fit into a frame.
        for portion in keys.chunks(CHECK_KEYS_AT_ONCE) {
            for key in portion {
                check_key(key)?;
            }
            let joined = join_keys(portion);
            let request = Request::Check { keys: KeyList::joined(&joined) };
            if self.change("", &request)?.number != 1 {
                return Ok(false);
            }
        }
        Ok(true)
    }

    fn list(&self, prefix: &str) -> Result<Vec<String>, StoreError> {
        check_key(prefix)?;
        let reply = self.change(prefix, &Request::List { prefix })?;
        split_keys(&reply.value).ok_or_else(|| StoreError::Protocol {
            address: self.address(),
            what: "a malformed list of keys".to_owned(),
        })
    }

    fn cancel(&self) {
        let mut state = self.state();
        state.cancelled = true;
        for stream in state.waiting.values() {
            if let Err(error) = stream.shutdown(Shutdown::Both) {
                tracing::debug!(%error, "a cancelled wait had lost its connection already");
            }
        }
    }
}

/// 8 MiB of value ÷ 8 KiB of key, less what the lengths take.
const CHECK_KEYS_AT_ONCE: usize = 1000;
