//! A client of PyTorch's `TCPStore`: one connection, one request at a time, a deadline for each, bounded replies.

use std::io::{self, Write as _};
use std::net::TcpStream;
use std::time::{Duration, Instant};

use super::super::dial::{read_until, would_block, Dial, Greeting};
use super::super::table::{check_entry, check_key, VALUE_BYTES_MAX};
use super::super::{RendezvousError, StoreError};
use super::message::{
    encode, wire_key, Request, CANCELLED, KEYS_MAX, NOT_READY, READY, WORKERS_KEY,
};

/// After its deadline a wait is called off; the server gets this long to say that it heard.
const CANCEL_MAX: Duration = Duration::from_secs(5);

/// A client of a `TCPStore` that a PyTorch process serves.
///
/// A key is what a Python client passes to its store: the slash that torch puts before it is put here, too.
/// After an error of the connection every later call fails: what has been read of a reply cannot be told.
///
/// # Example
///
/// ```no_run
/// use std::time::{Duration, Instant};
/// use phalanx_comm::rendezvous::TcpStoreClient;
///
/// let deadline = Instant::now() + Duration::from_secs(10);
/// let mut store = TcpStoreClient::connect("node0", 29500, deadline)?;
/// store.set("address", b"10.0.0.1:4000", deadline)?;
/// assert_eq!(store.get("address", deadline)?, b"10.0.0.1:4000");
/// # Ok::<(), phalanx_comm::rendezvous::RendezvousError>(())
/// ```
#[derive(Debug)]
pub struct TcpStoreClient {
    address: String,
    /// `None` after the connection has failed.
    stream: Option<TcpStream>,
}

impl TcpStoreClient {
    /// Connects, trying until `deadline`; what listens must answer a ping within two seconds.
    ///
    /// # Errors
    ///
    /// The [`RendezvousError`] of the last attempt; [`RendezvousError::NotATcpStore`] when another program listens.
    pub fn connect(host: &str, port: u16, deadline: Instant) -> Result<Self, RendezvousError> {
        let hint = ", or has torchrun ended";
        let stream = Dial { host, port, greeting: Greeting::TcpStore, hint }.connect(deadline)?;
        Ok(Self { address: format!("{host}:{port}"), stream: Some(stream) })
    }

    /// Writes `value` under `key`. There is no reply: that it was stored shows in a later call.
    ///
    /// # Errors
    ///
    /// [`StoreError`]: a length over the limit, or the connection was lost.
    pub fn set(&mut self, key: &str, value: &[u8], deadline: Instant) -> Result<(), StoreError> {
        check_entry(key, value)?;
        self.send(&Request::Set { key: wire(key)?, value: value.to_vec() }, deadline)
    }

    /// Adds `value` to the end of what `key` holds. There is no reply.
    ///
    /// # Errors
    ///
    /// As [`TcpStoreClient::set`].
    pub fn append(&mut self, key: &str, value: &[u8], deadline: Instant) -> Result<(), StoreError> {
        check_entry(key, value)?;
        self.send(&Request::Append { key: wire(key)?, value: value.to_vec() }, deadline)
    }

    /// Returns the value of `key`; waits until somebody sets it.
    ///
    /// # Errors
    ///
    /// [`StoreError::Timeout`] at `deadline`, or the connection was lost.
    pub fn get(&mut self, key: &str, deadline: Instant) -> Result<Vec<u8>, StoreError> {
        self.wait(&[key], deadline)?;
        self.send(&Request::Get { key: wire(key)? }, deadline)?;
        self.read_value(deadline)
    }

    /// As [`TcpStoreClient::get`] for several keys, in their order.
    ///
    /// # Errors
    ///
    /// As [`TcpStoreClient::get`].
    pub fn multi_get(
        &mut self,
        keys: &[&str],
        deadline: Instant,
    ) -> Result<Vec<Vec<u8>>, StoreError> {
        self.wait(keys, deadline)?;
        self.send(&Request::MultiGet { keys: wire_all(keys)? }, deadline)?;
        keys.iter().map(|_| self.read_value(deadline)).collect()
    }

    /// Writes several values. There is no reply.
    ///
    /// # Errors
    ///
    /// As [`TcpStoreClient::set`].
    pub fn multi_set(
        &mut self,
        entries: &[(&str, &[u8])],
        deadline: Instant,
    ) -> Result<(), StoreError> {
        let entry = |(key, value): &(&str, &[u8])| {
            check_entry(key, value)?;
            Ok((wire(key)?, value.to_vec()))
        };
        let entries = entries.iter().map(entry).collect::<Result<Vec<_>, StoreError>>()?;
        self.send(&Request::MultiSet { entries }, deadline)
    }

    /// Adds `delta` to the counter `key` (0 when absent) and returns its new value.
    ///
    /// # Errors
    ///
    /// As [`TcpStoreClient::set`]. PyTorch's server ends the connection where the key holds no number.
    pub fn add(&mut self, key: &str, delta: i64, deadline: Instant) -> Result<i64, StoreError> {
        self.send(&Request::Add { key: wire(key)?, delta }, deadline)?;
        self.read_number(deadline)
    }

    /// Writes `desired` if the key holds `expected`, where an absent key counts as empty, and returns what it holds
    /// afterwards; for an absent key and another expectation it returns `expected`.
    ///
    /// # Errors
    ///
    /// As [`TcpStoreClient::set`].
    pub fn compare_set(
        &mut self,
        key: &str,
        expected: &[u8],
        desired: &[u8],
        deadline: Instant,
    ) -> Result<Vec<u8>, StoreError> {
        check_entry(key, expected)?;
        check_entry(key, desired)?;
        let (expected, desired) = (expected.to_vec(), desired.to_vec());
        self.send(&Request::CompareSet { key: wire(key)?, expected, desired }, deadline)?;
        self.read_value(deadline)
    }

    /// Whether all of `keys` are there now.
    ///
    /// # Errors
    ///
    /// As [`TcpStoreClient::set`].
    pub fn check(&mut self, keys: &[&str], deadline: Instant) -> Result<bool, StoreError> {
        self.send(&Request::Check { keys: wire_all(keys)? }, deadline)?;
        match self.read::<1>(deadline)? {
            [READY] => Ok(true),
            [NOT_READY] => Ok(false),
            [other] => Err(self.garbled(format!("{other} in answer to CHECK"))),
        }
    }

    /// Waits until all of `keys` are there, where a queue that holds something counts as well. The connection stays good after a timeout.
    ///
    /// # Errors
    ///
    /// [`StoreError::Timeout`] at `deadline`, or the connection was lost.
    pub fn wait(&mut self, keys: &[&str], deadline: Instant) -> Result<(), StoreError> {
        let start = Instant::now();
        self.send(&Request::Wait { keys: wire_all(keys)? }, deadline)?;
        match self.try_read::<1>(deadline) {
            Ok([READY]) => Ok(()),
            Ok([other]) => Err(self.garbled(format!("{other} in answer to WAIT"))),
            Err(error) if would_block(&error) => {
                self.cancel_wait()?;
                let key = keys.join(", ");
                Err(StoreError::Timeout { key, waited: start.elapsed() })
            }
            Err(error) => Err(self.lost(error)),
        }
    }

    /// Calls a wait off, and reads up to the answer: the wait may have ended meanwhile.
    fn cancel_wait(&mut self) -> Result<(), StoreError> {
        let deadline = Instant::now() + CANCEL_MAX;
        self.send(&Request::CancelWait, deadline)?;
        while self.read::<1>(deadline)? != [CANCELLED] {}
        Ok(())
    }

    /// Adds `value` to the end of the queue `key`. There is no reply. Queues and values of the same name are apart.
    ///
    /// # Errors
    ///
    /// As [`TcpStoreClient::set`]; servers without libuv end the connection at the next call, here and in all calls on queues.
    pub fn queue_push(
        &mut self,
        key: &str,
        value: &[u8],
        deadline: Instant,
    ) -> Result<(), StoreError> {
        check_entry(key, value)?;
        self.send(&Request::QueuePush { key: wire(key)?, value: value.to_vec() }, deadline)
    }

    /// Takes the first value out of the queue `key`; waits until there is one.
    ///
    /// # Errors
    ///
    /// [`StoreError::Timeout`] at `deadline`, or the connection was lost.
    pub fn queue_pop(&mut self, key: &str, deadline: Instant) -> Result<Vec<u8>, StoreError> {
        loop {
            if let Some(value) = self.queue_try_pop(key, deadline)? {
                return Ok(value);
            }
            self.wait(&[key], deadline)?;
            // PyTorch's server keeps a client that a queue has woken on its list, and would end this client's next
            // wait, for whatever key, with the queue's next push.
            self.cancel_wait()?;
        }
    }

    /// Takes the first value out of the queue `key`, if there is one now.
    ///
    /// # Errors
    ///
    /// As [`TcpStoreClient::set`].
    pub fn queue_try_pop(
        &mut self,
        key: &str,
        deadline: Instant,
    ) -> Result<Option<Vec<u8>>, StoreError> {
        self.send(&Request::QueuePop { key: wire(key)? }, deadline)?;
        match self.read_number(deadline)? {
            0 => Ok(None),
            1.. => self.read_value(deadline).map(Some),
            other => Err(self.garbled(format!("a queue of {other} values"))),
        }
    }

    /// How many values the queue `key` holds.
    ///
    /// # Errors
    ///
    /// As [`TcpStoreClient::set`].
    pub fn queue_len(&mut self, key: &str, deadline: Instant) -> Result<i64, StoreError> {
        self.send(&Request::QueueLen { key: wire(key)? }, deadline)?;
        self.read_number(deadline)
    }

    /// Counts this process among those that use the store, and returns how many there are so far. A Python process that
    /// hosts a store with `wait_for_workers=True` waits until as many have counted themselves as its `world_size`
    /// says, itself among them; call it once in a process.
    ///
    /// # Errors
    ///
    /// As [`TcpStoreClient::set`].
    pub fn count_as_worker(&mut self, deadline: Instant) -> Result<i64, StoreError> {
        self.send(&Request::Add { key: WORKERS_KEY.to_owned(), delta: 1 }, deadline)?;
        self.read_number(deadline)
    }

    /// Removes `key`; says whether it was there.
    ///
    /// # Errors
    ///
    /// As [`TcpStoreClient::set`].
    pub fn delete(&mut self, key: &str, deadline: Instant) -> Result<bool, StoreError> {
        self.send(&Request::Delete { key: wire(key)? }, deadline)?;
        Ok(self.read_number(deadline)? > 0)
    }

    /// How many keys there are, PyTorch's own among them.
    ///
    /// # Errors
    ///
    /// As [`TcpStoreClient::set`].
    pub fn count_keys(&mut self, deadline: Instant) -> Result<i64, StoreError> {
        self.send(&Request::CountKeys, deadline)?;
        self.read_number(deadline)
    }

    /// All keys as the server names them, with the slash that torch puts before each.
    ///
    /// # Errors
    ///
    /// As [`TcpStoreClient::set`]; servers without libuv end the connection.
    pub fn list_keys(&mut self, deadline: Instant) -> Result<Vec<String>, StoreError> {
        self.send(&Request::ListKeys, deadline)?;
        let count = self.read_number(deadline)?;
        let count = usize::try_from(count)
            .ok()
            .filter(|count| *count <= KEYS_MAX)
            .ok_or_else(|| self.garbled(format!("a list of {count} keys")))?;
        let key = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
        (0..count).map(|_| self.read_value(deadline).map(key)).collect()
    }

    fn send(&mut self, request: &Request, deadline: Instant) -> Result<(), StoreError> {
        let sent = match &mut self.stream {
            Some(stream) => write_until(stream, &encode(request), deadline),
            None => Err(io::Error::new(
                io::ErrorKind::NotConnected,
                "an earlier call on this connection failed",
            )),
        };
        sent.map_err(|error| self.lost(error))
    }

    fn try_read<const N: usize>(&mut self, deadline: Instant) -> io::Result<[u8; N]> {
        let mut bytes = [0; N];
        match &mut self.stream {
            Some(stream) => read_until(stream, &mut bytes, deadline)?,
            None => return Err(io::ErrorKind::NotConnected.into()),
        }
        Ok(bytes)
    }

    fn read<const N: usize>(&mut self, deadline: Instant) -> Result<[u8; N], StoreError> {
        self.try_read(deadline).map_err(|error| self.lost(error))
    }

    fn read_number(&mut self, deadline: Instant) -> Result<i64, StoreError> {
        self.read(deadline).map(i64::from_le_bytes)
    }

    fn read_value(&mut self, deadline: Instant) -> Result<Vec<u8>, StoreError> {
        let length = u64::from_le_bytes(self.read(deadline)?);
        let length = usize::try_from(length)
            .ok()
            .filter(|length| *length <= VALUE_BYTES_MAX)
            .ok_or_else(|| self.garbled(format!("a value of {length} bytes")))?;
        let mut value = vec![0; length];
        let read = match &mut self.stream {
            Some(stream) => read_until(stream, &mut value, deadline),
            None => Err(io::ErrorKind::NotConnected.into()),
        };
        read.map_err(|error| self.lost(error))?;
        Ok(value)
    }

    fn lost(&mut self, source: io::Error) -> StoreError {
        self.stream = None;
        StoreError::Disconnected { address: self.address.clone(), source }
    }

    fn garbled(&mut self, what: String) -> StoreError {
        self.stream = None;
        StoreError::Protocol { address: self.address.clone(), what }
    }
}

/// The key as it travels; the server counts the slash, too.
fn wire(key: &str) -> Result<String, StoreError> {
    let key = wire_key(key);
    check_key(&key)?;
    Ok(key)
}

fn wire_all(keys: &[&str]) -> Result<Vec<String>, StoreError> {
    keys.iter().map(|key| wire(key)).collect()
}

/// Sends all bytes or fails at `deadline`, however slowly the other side takes them.
fn write_until(stream: &mut TcpStream, mut bytes: &[u8], deadline: Instant) -> io::Result<()> {
    while !bytes.is_empty() {
        let left = deadline.saturating_duration_since(Instant::now());
        stream.set_write_timeout(Some(left.max(Duration::from_millis(1))))?;
        match stream.write(bytes) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(count) => bytes = &bytes[count..],
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) if left.is_zero() || !would_block(&error) => return Err(error),
            Err(_) => {}
        }
    }
    Ok(())
}
