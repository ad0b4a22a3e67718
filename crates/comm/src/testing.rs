//! For tests: ranks as threads of one process, over the full host backend; ports for ranks that are processes.

use std::sync::{mpsc, Arc};
use std::time::{Duration, Instant};

pub use phalanx_rendezvous::testing::{free_port, free_ports};

use crate::environment::{HostLink, World};
use crate::group::{Group, GroupOptions};
use crate::rendezvous::{MemoryStore, Store};

/// How long [`run_ranks`] waits for its ranks.
const DEADLINE: Duration = Duration::from_secs(120);
const TIMEOUT: Duration = Duration::from_secs(30);

/// Runs `rank` once on each of `world_size` threads and returns what they return, by rank.
///
/// # Panics
///
/// When a rank panics or does not end within two minutes.
pub fn run_ranks<T: Send + 'static>(
    world_size: usize,
    rank: impl Fn(Group) -> T + Send + Sync + 'static,
) -> Vec<T> {
    run_ranks_with(
        world_size,
        HostLink::Auto,
        GroupOptions { timeout: TIMEOUT, ..GroupOptions::default() },
        rank,
    )
}

/// As [`run_ranks`], over another link or with other options.
///
/// # Panics
///
/// As [`run_ranks`].
pub fn run_ranks_with<T: Send + 'static>(
    world_size: usize,
    link: HostLink,
    options: GroupOptions,
    rank: impl Fn(Group) -> T + Send + Sync + 'static,
) -> Vec<T> {
    let options = GroupOptions { host_link: Some(link), ..options };
    let worlds = (0..world_size).map(|number| World::threads(number, world_size));
    run_worlds(worlds.collect(), &options, rank)
}

/// As [`run_ranks`], with rank `r` on node `nodes[r]`.
///
/// # Panics
///
/// As [`run_ranks`].
pub fn run_ranks_on<T: Send + 'static>(
    nodes: &[usize],
    rank: impl Fn(Group) -> T + Send + Sync + 'static,
) -> Vec<T> {
    let world = |(number, &node_rank): (usize, &usize)| {
        let mates = |until: usize| nodes[..until].iter().filter(|&&node| node == node_rank).count();
        World {
            local_rank: mates(number),
            local_world_size: mates(nodes.len()),
            node_rank,
            node_count: nodes.iter().max().map_or(1, |last| last + 1),
            ..World::threads(number, nodes.len())
        }
    };
    let worlds = nodes.iter().enumerate().map(world).collect();
    run_worlds(worlds, &GroupOptions { timeout: TIMEOUT, ..GroupOptions::default() }, rank)
}

/// Runs `rank` once in each of the worlds, on a thread for each.
#[expect(clippy::expect_used, reason = "a test that cannot start its ranks has failed")]
fn run_worlds<T: Send + 'static>(
    worlds: Vec<World>,
    options: &GroupOptions,
    rank: impl Fn(Group) -> T + Send + Sync + 'static,
) -> Vec<T> {
    let world_size = worlds.len();
    let store: Arc<dyn Store> = Arc::new(MemoryStore::new());
    let rank = Arc::new(rank);
    let (sender, receiver) = mpsc::channel();
    for (number, world) in worlds.into_iter().enumerate() {
        let (store, rank, sender) = (Arc::clone(&store), Arc::clone(&rank), sender.clone());
        let options = options.clone();
        let body = move || {
            let group = Group::new(world, store, options).expect("the ranks meet");
            let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| rank(group)));
            // The receiver is gone only when the test has failed already.
            drop(sender.send((number, result)));
        };
        let thread = std::thread::Builder::new().name(format!("rank-{number}"));
        drop(thread.spawn(body).expect("a thread starts"));
    }
    drop(sender);
    let deadline = Instant::now() + DEADLINE;
    let mut results: Vec<Option<T>> = (0..world_size).map(|_| None).collect();
    let mut panicked = None;
    for _ in 0..world_size {
        let left = deadline.saturating_duration_since(Instant::now());
        let (number, result) = receiver.recv_timeout(left).unwrap_or_else(|_| {
            let missing: Vec<usize> = (0..world_size).filter(|r| results[*r].is_none()).collect();
            panic!("ranks {missing:?} did not end")
        });
        match result {
            Ok(result) => results[number] = Some(result),
            // The first panic is the cause; the others fail because of it.
            Err(panic) => panicked = panicked.or(Some(panic)),
        }
    }
    if let Some(panic) = panicked {
        std::panic::resume_unwind(panic);
    }
    results.into_iter().flatten().collect()
}
