//! How the ranks of a job find each other. It knows nothing of collectives.
//!
//! [`environment`] says who this process is; a [`Store`] is where ranks leave addresses and small facts for each other.
//!
//! ```
//! use std::time::{Duration, Instant};
//! use phalanx_rendezvous::{connect, environment::World, join};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! # let world = World { master_port: 0, ..World::single() }; // doctests have no launcher
//! # #[cfg(any())]
//! let world = World::from_env()?;
//! let deadline = Instant::now() + Duration::from_secs(60);
//! let store = connect(&world, deadline)?;
//! let mine = format!("rank {}", world.rank);
//! let all = join(&*store, "who", world.rank, world.world_size, mine.as_bytes(), deadline)?;
//! assert_eq!(all, [b"rank 0"]); // with more ranks: one of each, in rank order
//! # Ok(())
//! # }
//! ```

pub mod environment;
mod store;
#[cfg(any(test, feature = "testing"))]
pub mod testing;

pub use store::{
    connect, hosted, join, listen_address, random_bytes, resolve, Credentials, Meeting,
    MemoryStore, RendezvousError, Store, StoreClient, StoreError, StoreServer, TcpStoreClient,
};
