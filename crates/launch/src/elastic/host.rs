//! Node 0's part: a thread that hears the statuses of all nodes, and gives the orders that follow.

use std::net::SocketAddr;
use std::panic::{self, AssertUnwindSafe};
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use phalanx_rendezvous::{
    Credentials, RendezvousError, Store, StoreClient, StoreError, StoreServer,
};

use super::keys;
use crate::error::{system, LaunchError};
use crate::membership::{decode_status, encode_order, Command, Coordinator};
use crate::nodes;

/// The coordinator looks at the time this often.
const TICK: Duration = Duration::from_millis(250);

/// The coordinator's thread.
#[derive(Debug)]
pub(crate) struct Host {
    store: Arc<StoreClient>,
    thread: Option<JoinHandle<()>>,
}

/// What the thread works on.
struct Desk {
    coordinator: Coordinator,
    store: Arc<StoreClient>,
    begun: Instant,
    /// Where each generation's ranks get a store, and what opens it.
    address: SocketAddr,
    credentials: Credentials,
    /// The store of the generation that runs.
    server: Option<StoreServer>,
    /// The newest order that was given.
    given: u64,
    /// The number of the next status.
    next: i64,
    looked: Instant,
}

impl Host {
    /// Starts the coordinator; `store` is a handle of its own. The stores of ranks listen on `address`, on any free port.
    pub(super) fn start(
        coordinator: Coordinator,
        store: StoreClient,
        address: SocketAddr,
        credentials: Credentials,
    ) -> Result<Self, LaunchError> {
        let store = Arc::new(store);
        let now = Instant::now();
        let mut desk = Desk {
            coordinator,
            store: Arc::clone(&store),
            begun: now,
            address,
            credentials,
            server: None,
            given: 0,
            next: 1,
            looked: now,
        };
        desk.publish()?;
        let serve = move || {
            match panic::catch_unwind(AssertUnwindSafe(|| desk.serve())) {
                Ok(Ok(())) => return,
                Ok(Err(error)) => tracing::error!(%error, "node 0 gives no more orders"),
                Err(_) => tracing::error!("node 0 gives no more orders: its thread panicked"),
            }
            // Nobody would ever hear what to do.
            desk.coordinator.resign();
            if let Err(error) = desk.publish() {
                tracing::error!(%error, "the other nodes are not told");
            }
        };
        let thread = thread::Builder::new().name("coordinator of nodes".to_owned());
        let thread = thread.spawn(serve).map_err(system("start a thread"))?;
        Ok(Self { store, thread: Some(thread) })
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        self.store.cancel();
        if let Some(thread) = self.thread.take() {
            if thread.join().is_err() {
                tracing::error!("the coordinator of the nodes panicked");
            }
        }
    }
}

impl Desk {
    /// Serves until the store's handle is cancelled.
    fn serve(&mut self) -> Result<(), LaunchError> {
        loop {
            let key = keys::told(self.next);
            match self.store.get(&key, Instant::now() + TICK) {
                Ok(bytes) => {
                    self.next += 1;
                    self.store.delete(&key)?;
                    if let Some(status) = decode_status(&bytes) {
                        self.coordinator.hear(&status, self.begun.elapsed());
                    }
                }
                Err(StoreError::Timeout { .. }) => self.skip()?,
                Err(StoreError::Cancelled { .. }) => return Ok(()),
                Err(error) => return Err(error.into()),
            }
            if self.looked.elapsed() >= TICK {
                self.looked = Instant::now();
                self.hear_of_gone()?;
                self.coordinator.tick(self.begun.elapsed());
            }
            self.publish()?;
        }
    }

    /// Who was to start the launchers of other nodes says which of them will not come.
    fn hear_of_gone(&mut self) -> Result<(), LaunchError> {
        for node in self.coordinator.awaited() {
            if self.store.check(&[&nodes::meeting_key(node)])? {
                self.coordinator.note_gone(node, self.begun.elapsed());
            }
        }
        Ok(())
    }

    /// A launcher may have died between taking a number and using it. What a slow one says then is lost, and it says it
    /// again at its next beat.
    fn skip(&mut self) -> Result<(), LaunchError> {
        let taken = self.store.add(keys::TOLD_COUNT, 0)?;
        if taken >= self.next && !self.store.check(&[&keys::told(self.next)])? {
            self.next += 1;
        }
        Ok(())
    }

    /// Gives the order that the coordinator wants, if it is a new one.
    fn publish(&mut self) -> Result<(), LaunchError> {
        let order = Arc::clone(self.coordinator.order());
        if order.number == self.given {
            return Ok(());
        }
        // A coordinator may have changed its mind twice: numbers in between are of no account, but must be there.
        for number in self.given + 1..order.number {
            self.store.set(&keys::order(number), encode_order(&order).as_bytes())?;
        }
        if order.command == Command::Run {
            self.open_store(order.generation)?;
        }
        self.store.set(&keys::order(order.number), encode_order(&order).as_bytes())?;
        self.store.set(keys::NEWEST, order.number.to_string().as_bytes())?;
        self.given = order.number;
        Ok(())
    }

    fn open_store(&mut self, generation: u32) -> Result<(), RendezvousError> {
        self.server = None;
        let credentials = Credentials { restart_count: generation, ..self.credentials.clone() };
        let server = StoreServer::start(self.address, credentials)?;
        let port = server.address().port().to_string();
        self.server = Some(server);
        self.store.set(&keys::port(generation), port.as_bytes())?;
        Ok(())
    }
}
