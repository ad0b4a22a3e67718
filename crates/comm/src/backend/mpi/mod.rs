//! The MPI backend: the site's MPI library moves the data.
//!
//! | file | what |
//! |---|---|
//! | `ffi` | MPI's calls, checked |
//! | `library` | initialised once, finalised once; who may call it |
//! | `cut` | pure: who reduces which part, in which pieces |
//! | `exchange`, `fold` | reductions: messages, and the kernels of the host backend in rank order |
//! | `staged`, `legs` | memory of a GPU: copies to the host and back, or MPI's own way where it has one |
//! | `mover` | a group's calls; what only moves goes through MPI's non-blocking collectives |
//! | `bootstrap`, `address` | ranks that meet over MPI; where rank 0 can be reached |
//!
//! Reductions have the bits of the host backend, whatever library is used: MPI moves bytes, and the
//! arithmetic is ours. Every group has a communicator of its own.

mod address;
mod bootstrap;
mod cut;
mod exchange;
mod ffi;
mod fold;
mod legs;
mod library;
mod mover;
mod staged;

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::{Duration, Instant};

pub(crate) use self::bootstrap::meet_over_mpi;
use self::library::Library;
use self::mover::MpiMover;
use self::staged::Staged;
use super::{device_of, trouble, unavailable, Connected, Gather, Transport};
use crate::error::Result;
use crate::gpu::Gpu;
use crate::lane::{Lane, Mover};
use crate::order::core::Core;
use crate::order::exit;

/// A group's side of MPI.
#[derive(Debug)]
struct MpiTransport {
    lane: Arc<Lane>,
    gpu: Option<Arc<Gpu>>,
}

impl Transport for MpiTransport {
    fn lane(&self, _on_device: bool) -> Option<&Arc<Lane>> {
        Some(&self.lane)
    }

    fn gpu(&self) -> Option<&Arc<Gpu>> {
        self.gpu.as_ref()
    }

    fn shares_regions(&self) -> bool {
        false
    }

    fn close(&self, _core: &Core) {
        self.lane.close();
    }
}

/// Numbers the communicators that this process leads.
static LED: AtomicU64 = AtomicU64::new(0);
/// Tags of communicators being made; every library has these.
const TAGS: u64 = 32_768;

/// The lanes of this process.
static LANES: Mutex<Vec<Weak<Lane>>> = Mutex::new(Vec::new());

/// Connects the ranks of a group over MPI, with this rank's GPU where its memory is to travel. Collective:
/// `gather` goes over the control plane.
pub(super) fn open(
    core: &Arc<Core>,
    gpu_memory: bool,
    gather: &mut Gather<'_>,
    deadline: Instant,
) -> Result<Connected> {
    let rank = core.rank;
    let mine = library::get(deadline).and_then(|library| {
        let device = gpu_memory.then(|| device_of(core, "mpi")).transpose()?;
        let cuda_aware = device.is_some() && library::is_cuda_aware()?;
        Ok((library, device, cuda_aware))
    });
    // Those who have no MPI say so to the others, instead of letting them wait.
    let card = match &mine {
        Ok((library, device, _)) => Card {
            gpu_memory: device.is_some(),
            rank: library.rank as u64,
            size: library.size as u64,
            tag: LED.fetch_add(1, Ordering::Relaxed) * 31 + library.rank as u64,
            trouble: String::new(),
        },
        Err(error) => Card { trouble: trouble(error), ..Card::default() },
    };
    let cards: Vec<Card> =
        gather(&card.encode())?.iter().map(|bytes| Card::decode(bytes)).collect();
    let (library, device, cuda_aware) = mine?;
    let members = members(&cards)?;
    let ranks = members.len();
    let tag = usize::try_from(cards[0].tag % TAGS).unwrap_or(0);
    let world = library.world;
    let communicator = if ranks == 1 {
        world
    } else {
        let peers = Arc::clone(&core.peers);
        let gives_up = move || peers.failure();
        let part = library.set_up(rank, deadline, gives_up, move || world.part(&members, tag))?;
        // Whoever has it may fail its first call, which must not end the set-up of those who have not:
        // they wait here for each other. A failure while they do is such a call's, of one who has
        // heard from all already, and is the answer to this rank's first call.
        if let Err(error) = gather(&[]) {
            tracing::debug!(rank, %error, "the group failed while it was set up");
        }
        part
    };
    let transport = MpiMover::new(library, core, communicator);
    let Some(device) = device else {
        let lane = lane(library, core, library.multiple, Box::new(transport));
        return Ok(Arc::new(MpiTransport { lane, gpu: None }));
    };
    tracing::info!(rank, gpu = device.name(), cuda_aware, "MPI moves the GPU's memory");
    let staged = Staged::new(transport, rank, &device, cuda_aware)?;
    // Callers do not drive it: only the runner asks the driver for anything.
    let lane = lane(library, core, false, Box::new(staged));
    let gpu = Some(Arc::new(Gpu { device, allocator: None }));
    Ok(Arc::new(MpiTransport { lane, gpu }))
}

fn lane(
    library: &'static Library,
    core: &Arc<Core>,
    callers_drive: bool,
    transport: Box<dyn Mover>,
) -> Arc<Lane> {
    let core = Arc::clone(core);
    let lane = Lane::new("mpi", core, &library.runner, callers_drive, transport);
    exit::before(close_lanes);
    let mut lanes = LANES.lock().unwrap_or_else(PoisonError::into_inner);
    lanes.retain(|other| other.strong_count() > 0);
    lanes.push(Arc::downgrade(&lane));
    lane
}

/// The process exits: closes what is open, and waits until everything that was started has ended.
fn close_lanes(limit: Duration) {
    let lanes = std::mem::take(&mut *LANES.lock().unwrap_or_else(PoisonError::into_inner));
    for lane in lanes.iter().filter_map(Weak::upgrade) {
        lane.close();
    }
    if let Some(library) = library::started() {
        library.await_lanes(limit);
    }
}

/// What a rank tells the others before they make a communicator.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
struct Card {
    /// Its rank in `MPI_COMM_WORLD`, and how many there are.
    rank: u64,
    size: u64,
    /// For the communicator, if this rank leads it.
    tag: u64,
    /// Whether its memory is a GPU's.
    gpu_memory: bool,
    /// Why this rank has no MPI; empty when it has.
    trouble: String,
}

impl Card {
    fn encode(&self) -> Vec<u8> {
        let gpu = u64::from(self.gpu_memory);
        let numbers = [self.rank, self.size, self.tag, gpu].map(u64::to_le_bytes).concat();
        [&numbers[..], self.trouble.as_bytes()].concat()
    }

    fn decode(bytes: &[u8]) -> Self {
        let number = |at: usize| {
            let bytes = bytes.get(at..at + 8).and_then(|bytes| bytes.try_into().ok());
            bytes.map_or(0, u64::from_le_bytes)
        };
        let trouble = String::from_utf8_lossy(bytes.get(32..).unwrap_or_default()).into_owned();
        let gpu_memory = number(24) == 1;
        Self { rank: number(0), size: number(8), tag: number(16), gpu_memory, trouble }
    }
}

/// The group's ranks in `MPI_COMM_WORLD`: one process of one MPI job each.
fn members(cards: &[Card]) -> Result<Vec<usize>> {
    for (rank, card) in cards.iter().enumerate() {
        if !card.trouble.is_empty() {
            return Err(unavailable("mpi", format!("rank {rank} has none: {}", card.trouble)));
        }
        if card.size != cards[0].size {
            return Err(unavailable("mpi", format!(
                "rank 0 is in an MPI job of {} processes, rank {rank} in one of {}: start all ranks \
                 with one mpirun",
                cards[0].size, card.size
            )));
        }
        if card.gpu_memory != cards[0].gpu_memory {
            let (with, without) = if card.gpu_memory { (rank, 0) } else { (0, rank) };
            return Err(unavailable("mpi", format!(
                "rank {with} brings memory of a GPU and rank {without} does not: let all ranks have one that \
                 libtorch can use, or none (GroupOptions::gpu_memory)"
            )));
        }
        if let Some(other) = cards[..rank].iter().position(|other| other.rank == card.rank) {
            return Err(unavailable("mpi", format!(
                "ranks {other} and {rank} are both MPI's rank {}: each rank must be a process of its \
                 own, all started by one mpirun",
                card.rank
            )));
        }
    }
    Ok(cards.iter().map(|card| usize::try_from(card.rank).unwrap_or(usize::MAX)).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn card(rank: u64) -> Card {
        Card { rank, size: 3, tag: 7, gpu_memory: false, trouble: String::new() }
    }

    #[test]
    fn cards_survive_their_way() {
        for card in [card(2), Card { trouble: "no mpirun".to_owned(), ..Card::default() }] {
            assert_eq!(Card::decode(&card.encode()), card);
        }
        assert_eq!(Card::decode(&[]), Card::default());
    }

    #[test]
    fn ranks_that_cannot_talk_are_named() {
        assert_eq!(members(&[card(2), card(0), card(1)]).unwrap(), [2, 0, 1]);
        let error = |cards: &[Card]| members(cards).unwrap_err().to_string();
        let without = Card { trouble: "no mpirun".to_owned(), ..Card::default() };
        assert!(error(&[card(0), without]).contains("rank 1 has none: no mpirun"));
        assert!(error(&[card(0), card(1), card(0)]).contains("ranks 0 and 2 are both MPI's rank 0"));
        let mixed = Card { gpu_memory: true, ..card(1) };
        assert!(
            error(&[card(0), mixed]).contains("rank 1 brings memory of a GPU and rank 0 does not")
        );
        let elsewhere = Card { size: 1, ..card(0) };
        assert!(error(&[card(1), elsewhere]).contains("one mpirun"));
    }
}
