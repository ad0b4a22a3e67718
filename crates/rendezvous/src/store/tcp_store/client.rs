//! A client of PyTorch's `TCPStore`: one connection, one request at a time, a deadline for each, bounded replies.

use std::io::{self, Write as _};
use std::net::TcpStream;
use std::time::{Duration, Instant};

use super::super::dial::{read_until, would_block, Dial, Greeting};
use super::super::table::{check_entry, check_key, VALUE_BYTES_MAX};
use super::super::{RendezvousError, StoreError};
use super::message::{encode, wire_key, TcpStoreRequest, CANCELLED, NOT_READY, READY};

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
/// use phalanx_rendezvous::TcpStoreClient;
///
/// let deadline = Instant::now() + Duration::from_secs(10);
/// let mut store = TcpStoreClient::connect("node0", 29500, deadline)?;
/// store.set("address", b"10.0.0.1:4000", deadline)?;
/// assert_eq!(store.get("address", deadline)?, b"10.0.0.1:4000");
/// # Ok::<(), phalanx_rendezvous::RendezvousError>(())
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
        self.send(&TcpStoreRequest::Set { key: wire(key)?, value: value.to_vec() }, deadline)
    }

    /// Returns the value of `key`; waits until somebody sets it.
    ///
    /// # Errors
    ///
    /// [`StoreError::Timeout`] at `deadline`, or the connection was lost.
    pub fn get(&mut self, key: &str, deadline: Instant) -> Result<Vec<u8>, StoreError> {
        self.wait(&[key], deadline)?;
        self.send(&TcpStoreRequest::Get { key: wire(key)? }, deadline)?;
        self.read_value(deadline)
    }

    /// Adds `delta` to the counter `key` (0 when absent) and returns its new value.
    ///
    /// # Errors
    ///
    /// As [`TcpStoreClient::set`]. PyTorch's server ends the connection where the key holds no number.
    pub fn add(&mut self, key: &str, delta: i64, deadline: Instant) -> Result<i64, StoreError> {
        self.send(&TcpStoreRequest::Add { key: wire(key)?, delta }, deadline)?;
        self.read_number(deadline)
    }

    /// Whether all of `keys` are there now.
    ///
    /// # Errors
    ///
    /// As [`TcpStoreClient::set`].
    pub fn check(&mut self, keys: &[&str], deadline: Instant) -> Result<bool, StoreError> {
        self.send(&TcpStoreRequest::Check { keys: wire_all(keys)? }, deadline)?;
        match self.read::<1>(deadline)? {
            [READY] => Ok(true),
            [NOT_READY] => Ok(false),
            [other] => Err(self.garbled(format!("{other} in answer to CHECK"))),
        }
    }

    /// Waits until all of `keys` are there. The connection stays good after a timeout.
    ///
    /// # Errors
    ///
    /// [`StoreError::Timeout`] at `deadline`, or the connection was lost.
    pub(crate) fn wait(&mut self, keys: &[&str], deadline: Instant) -> Result<(), StoreError> {
        let start = Instant::now();
        self.send(&TcpStoreRequest::Wait { keys: wire_all(keys)? }, deadline)?;
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
        self.send(&TcpStoreRequest::CancelWait, deadline)?;
        while self.read::<1>(deadline)? != [CANCELLED] {}
        Ok(())
    }

    /// Removes `key`; says whether it was there.
    ///
    /// # Errors
    ///
    /// As [`TcpStoreClient::set`].
    pub fn delete(&mut self, key: &str, deadline: Instant) -> Result<bool, StoreError> {
        self.send(&TcpStoreRequest::Delete { key: wire(key)? }, deadline)?;
        Ok(self.read_number(deadline)? > 0)
    }

    /// How many keys there are, PyTorch's own among them.
    ///
    /// # Errors
    ///
    /// As [`TcpStoreClient::set`].
    pub fn count_keys(&mut self, deadline: Instant) -> Result<i64, StoreError> {
        self.send(&TcpStoreRequest::CountKeys, deadline)?;
        self.read_number(deadline)
    }

    fn send(&mut self, request: &TcpStoreRequest, deadline: Instant) -> Result<(), StoreError> {
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
