//! Joins: waiting in the store until all ranks have come, with a deadline and the names of those
//! that are absent; and the way from a [`World`] to a store.

use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::dial::resolve;
use super::error::list_text;
use super::{advertise, RendezvousError, Store, StoreClient, StoreError, StoreServer};
use crate::environment::{StoreHost, World};

/// A waiting join says who is missing this often.
const PROGRESS_EVERY: Duration = Duration::from_secs(10);

/// A rank that hosts the store stays this long for ranks that still hold it.
const LINGER_MAX: Duration = Duration::from_secs(5);

/// Connects this rank to the job's store, and hosts it first when `world.store_host` says so.
///
/// With [`StoreHost::Agent`] rank 0 returns when all ranks have come.
///
/// The server lives as long as the returned store (in the rank that hosts it); dropping that waits up to five seconds
/// for the other ranks to drop theirs.
///
/// # Errors
///
/// A [`RendezvousError`] for each cause, at `deadline` at the latest.
pub fn connect(world: &World, deadline: Instant) -> Result<Arc<dyn Store>, RendezvousError> {
    let (host, mut port) = world.store_address();
    let server = match world.store_host {
        StoreHost::Agent => return advertise::meet(world, deadline),
        StoreHost::Mpi => return Err(RendezvousError::OverMpi),
        StoreHost::Elsewhere => None,
        StoreHost::ThisRank => {
            let address = listen_address(host, port, deadline)?;
            let server = StoreServer::start(address, world.credentials())?;
            port = server.address().port();
            Some(server)
        }
    };
    let client = StoreClient::connect(host, port, world.credentials(), deadline)?;
    Ok(match server {
        None => Arc::new(client),
        Some(server) => Arc::new(Hosted::new(client, server)),
    })
}

/// The address to listen on: that of the master's name, never all interfaces.
///
/// # Errors
///
/// [`RendezvousError::NameNotResolved`], or [`RendezvousError::LoopbackMaster`] when the name leads other machines
/// elsewhere than this one.
pub fn listen_address(
    host: &str,
    port: u16,
    deadline: Instant,
) -> Result<SocketAddr, RendezvousError> {
    let start = Instant::now();
    let addresses = resolve(host, port, deadline).map_err(|source| {
        let waited = start.elapsed();
        RendezvousError::NameNotResolved { host: host.to_owned(), waited, source }
    })?;
    let is_literal = host.parse::<IpAddr>().is_ok() || host == "localhost";
    let usable = addresses.iter().find(|address| is_literal || !address.ip().is_loopback());
    match (usable, addresses.first()) {
        (Some(&address), _) => Ok(address),
        (None, first) => Err(RendezvousError::LoopbackMaster {
            host: host.to_owned(),
            address: first.map(|address| address.ip().to_string()).unwrap_or_default(),
        }),
    }
}

/// A store of a server in this process.
#[must_use]
pub fn hosted(client: StoreClient, server: StoreServer) -> Arc<dyn Store> {
    Arc::new(Hosted::new(client, server))
}

/// A store that this process hosts: the server lives exactly as long.
#[derive(Debug)]
pub(super) struct Hosted {
    client: StoreClient,
    server: StoreServer,
    cancelled: AtomicBool,
}

impl Hosted {
    pub(super) fn new(client: StoreClient, server: StoreServer) -> Self {
        Self { client, server, cancelled: AtomicBool::new(false) }
    }
}

impl Drop for Hosted {
    fn drop(&mut self) {
        self.client.close_idle();
        // After a panic or a failure nobody is waited for: some rank may be stopped, or cut off.
        if !std::thread::panicking() && !self.cancelled.load(Ordering::Acquire) {
            self.server.linger(LINGER_MAX);
        }
    }
}

impl Store for Hosted {
    fn set(&self, key: &str, value: &[u8]) -> Result<(), StoreError> {
        self.client.set(key, value)
    }
    fn get(&self, key: &str, deadline: Instant) -> Result<Vec<u8>, StoreError> {
        self.client.get(key, deadline)
    }
    fn add(&self, key: &str, delta: i64) -> Result<i64, StoreError> {
        self.client.add(key, delta)
    }
    fn compare_set(
        &self,
        key: &str,
        expected: Option<&[u8]>,
        desired: &[u8],
    ) -> Result<Option<Vec<u8>>, StoreError> {
        self.client.compare_set(key, expected, desired)
    }
    fn delete(&self, key: &str) -> Result<bool, StoreError> {
        self.client.delete(key)
    }
    fn check(&self, keys: &[&str]) -> Result<bool, StoreError> {
        self.client.check(keys)
    }
    fn list(&self, prefix: &str) -> Result<Vec<String>, StoreError> {
        self.client.list(prefix)
    }
    fn cancel(&self) {
        self.cancelled.store(true, Ordering::Release);
        self.client.cancel();
    }
}

/// Puts `value` down for `rank` under `name` and waits for those of all ranks, which it returns in rank order.
///
/// Costs one `set` and `world_size` reads per rank. `name` must be used once in a store's life.
///
/// While it waits, a line in the log says every ten seconds who is missing: `waiting for ranks 1,3 (joined 2/4)`.
///
/// # Errors
///
/// [`RendezvousError::MissingRanks`] naming the absent at `deadline`; a store error as it comes.
pub fn join(
    store: &dyn Store,
    name: &str,
    rank: usize,
    world_size: usize,
    value: &[u8],
    deadline: Instant,
) -> Result<Vec<Vec<u8>>, RendezvousError> {
    Meeting { what: name, name, rank, world_size }.join(store, value, deadline)
}

/// Where ranks join, with a name for messages beside that of the keys.
#[derive(Debug, Clone, Copy)]
pub struct Meeting<'m> {
    /// Where, as messages have it.
    pub what: &'m str,
    /// Where, in the keys of the store.
    pub name: &'m str,
    /// This rank.
    pub rank: usize,
    /// How many are to come.
    pub world_size: usize,
}

impl Meeting<'_> {
    /// See [`join`].
    ///
    /// # Errors
    ///
    /// As [`join`].
    pub fn join(
        self,
        store: &dyn Store,
        value: &[u8],
        deadline: Instant,
    ) -> Result<Vec<Vec<u8>>, RendezvousError> {
        let start = Instant::now();
        let Self { what, name, rank, world_size } = self;
        let key = |of: usize| format!("{name}/{of:08}");
        store.set(&key(rank), value)?;
        let mut values = Vec::with_capacity(world_size);
        for peer in 0..world_size {
            loop {
                match store.get(&key(peer), deadline.min(Instant::now() + PROGRESS_EVERY)) {
                    Ok(theirs) => {
                        values.push(theirs);
                        break;
                    }
                    Err(StoreError::Timeout { .. }) => {}
                    Err(error) => return Err(error.into()),
                }
                let mut missing = Vec::new();
                for other in peer..world_size {
                    if !store.check(&[&key(other)])? {
                        missing.push(other);
                    }
                }
                let joined = world_size - missing.len();
                if Instant::now() >= deadline && !missing.is_empty() {
                    return Err(RendezvousError::MissingRanks {
                        what: what.to_owned(),
                        missing,
                        joined,
                        expected: world_size,
                        waited: start.elapsed(),
                    });
                }
                if !missing.is_empty() {
                    let missing = list_text(&missing);
                    tracing::warn!(
                        "{what}: waiting for ranks {missing} (joined {joined}/{world_size})"
                    );
                }
            }
        }
        Ok(values)
    }
}
