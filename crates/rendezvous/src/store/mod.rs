//! Where ranks find each other: a small key-value store that outlives no job.
//!
//! [`Store`] is the interface; [`MemoryStore`] serves the threads of one process, [`StoreServer`] and
//! [`StoreClient`] serve processes over TCP. The server lives in the launcher, or in rank 0 when no launcher of
//! ours is there ([`StoreHost`](crate::environment::StoreHost)); [`connect`] does what the environment asks for.
//!
//! The store carries addresses and small facts, never tensors: keys up to 8 KiB, values up to 8 MiB.
//!
//! # Security
//!
//! Every connection proves in both directions that it knows the 32-byte job token (HMAC-SHA256 over fresh nonces,
//! bound to run id and restart count) before any other byte is parsed. The traffic is **not encrypted**: on a network
//! that others can read, run the job over SSH tunnels or `WireGuard`.
//!
//! # Source
//!
//! The operations are those of PyTorch's `TCPStore` (`torch/csrc/distributed/c10d/TCPStore.hpp`), minus the queues.

mod advertise;
mod client;
mod dial;
mod error;
mod frame;
mod handshake;
mod join;
mod memory;
mod owner;
mod server;
mod table;
mod tcp_store;

use std::time::Instant;

pub use client::StoreClient;
pub use dial::resolve;
pub use error::{RendezvousError, StoreError};
pub use handshake::Credentials;
pub use join::{connect, hosted, join, listen_address, Meeting};
pub use memory::MemoryStore;
pub use server::StoreServer;
pub use tcp_store::TcpStoreClient;

/// A key-value store that all ranks of a job share.
///
/// A handle may be used from several threads at once: a `get` that waits does not hold up the calls of others.
pub trait Store: Send + Sync + std::fmt::Debug {
    /// Writes `value` under `key`, replacing what was there, and wakes those who wait for it.
    ///
    /// # Errors
    ///
    /// [`StoreError`]: a length over the limit, or the connection was lost.
    fn set(&self, key: &str, value: &[u8]) -> Result<(), StoreError>;

    /// Returns the value of `key`; waits until somebody sets it.
    ///
    /// # Errors
    ///
    /// [`StoreError::Timeout`] at `deadline`, [`StoreError::Cancelled`] after [`Store::cancel`], or the connection was
    /// lost.
    fn get(&self, key: &str, deadline: Instant) -> Result<Vec<u8>, StoreError>;

    /// Adds `delta` to the counter `key` (0 when absent) and returns its new value. Counters are stored as decimal
    /// text, so that `get` can read them.
    ///
    /// # Errors
    ///
    /// [`StoreError::NotACounter`] when the key holds something else, or the connection was lost.
    fn add(&self, key: &str, delta: i64) -> Result<i64, StoreError>;

    /// Writes `desired` if the key now holds `expected` (`None`: is absent), and returns what the key holds
    /// afterwards: `desired` when this call or an equal one won; `None` when the key is absent and was expected not to be.
    ///
    /// # Errors
    ///
    /// [`StoreError`]: a length over the limit, or the connection was lost.
    fn compare_set(
        &self,
        key: &str,
        expected: Option<&[u8]>,
        desired: &[u8],
    ) -> Result<Option<Vec<u8>>, StoreError>;

    /// Removes `key`; says whether it was there.
    ///
    /// # Errors
    ///
    /// The connection was lost.
    fn delete(&self, key: &str) -> Result<bool, StoreError>;

    /// Whether all of `keys` are there now. Does not wait.
    ///
    /// # Errors
    ///
    /// The connection was lost.
    fn check(&self, keys: &[&str]) -> Result<bool, StoreError>;

    /// The keys that start with `prefix`, sorted. For diagnostics and for naming who is absent.
    ///
    /// # Errors
    ///
    /// The connection was lost.
    fn list(&self, prefix: &str) -> Result<Vec<String>, StoreError>;

    /// Ends all waits of this handle, now and later, with [`StoreError::Cancelled`]. Other handles are unaffected.
    fn cancel(&self);
}

/// Random bytes of the kernel, for tokens and nonces.
///
/// # Errors
///
/// [`RendezvousError::System`] when it has none to give.
pub fn random_bytes<const N: usize>() -> Result<[u8; N], RendezvousError> {
    let mut bytes = [0; N];
    let mut filled = 0;
    while filled < N {
        let got =
            rustix::rand::getrandom(&mut bytes[filled..], rustix::rand::GetRandomFlags::empty());
        match got {
            Ok(count) => filled += count,
            Err(rustix::io::Errno::INTR) => {}
            Err(errno) => {
                return Err(RendezvousError::System { call: "getrandom", source: errno.into() })
            }
        }
    }
    Ok(bytes)
}
