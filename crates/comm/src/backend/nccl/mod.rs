//! The NCCL backend: collectives on the memory of NVIDIA GPUs.
//!
//! | file | what |
//! |---|---|
//! | `library` | finds and loads libnccl; versions; error texts |
//! | `config` | a communicator's settings, by version |
//! | `communicator` | NCCL's calls, checked, with deadlines; abort of all |
//! | `allocator` | memory from NCCL, registered |
//! | `mover` | a group's calls on its stream |
//!
//! Memory of the host goes over the host backend, which is the group's control plane anyway: what the
//! ranks called is compared there before NCCL is asked for anything, so a kernel is only launched when
//! all ranks launch the same one.

mod alive;
mod allocator;
mod communicator;
mod config;
mod library;
mod mover;

use std::collections::VecDeque;
use std::ffi::{c_char, c_int};
use std::sync::Arc;
use std::time::{Duration, Instant};

use cudarc::nccl::sys::ncclUniqueId;

use self::allocator::NcclSide;
use self::communicator::{Communicator, NcclError};
use self::library::Nccl;
use self::mover::NcclMover;
use super::{device_of, trouble, unavailable, Connected, Gather, Transport};
use crate::error::{Error, Result};
use crate::gpu::cuda::{Device, OwnStream};
use crate::gpu::{cuda_error, Gpu};
use crate::lane::runner::Runner;
use crate::lane::Lane;
use crate::order::core::Core;

/// How long a dropped group may take to end its communicator.
const LEAVE: Duration = Duration::from_secs(6);

/// A group's GPU side.
#[derive(Debug)]
struct NcclTransport {
    lane: Arc<Lane>,
    gpu: Arc<Gpu>,
    nccl: NcclSide,
}

impl Transport for NcclTransport {
    fn lane(&self, on_device: bool) -> Option<&Arc<Lane>> {
        on_device.then_some(&self.lane)
    }

    fn gpu(&self) -> Option<&Arc<Gpu>> {
        Some(&self.gpu)
    }

    fn is_in_stream_order(&self) -> bool {
        true
    }

    fn close(&self, _core: &Core) {
        self.lane.close();
        if !std::thread::panicking() {
            // A process that ends with its last group would cut NCCL off in the middle.
            self.lane.wait_closed(LEAVE);
        }
    }

    fn divide(
        &self,
        undivided: &Core,
        part: Option<(&Arc<Core>, usize)>,
        deadline: Instant,
    ) -> Result<Option<Connected>> {
        let number = |color| c_int::try_from(color).unwrap_or(c_int::MAX);
        let part = part.map(|(core, color)| (core, number(color)));
        divide(undivided, (&self.gpu.device, &self.nccl), part, deadline)
    }
}

/// Why these ranks cannot use NCCL together; `None`: they can. Collective.
pub(super) fn obstacle(
    core: &Core,
    trouble: Option<String>,
    gather: &mut Gather<'_>,
) -> Result<Option<String>> {
    let cards = gather(&Card::of(prepared(core, trouble).as_ref()).encode())?;
    let cards: Vec<Card> = cards.iter().map(|bytes| Card::decode(bytes)).collect();
    let troubled = cards.iter().position(|card| !card.trouble.is_empty());
    if let Some(rank) = troubled {
        return Ok(Some(cannot_use(rank, &cards[rank].trouble)));
    }
    Ok(check_cards(&cards).err().map(|error| super::trouble(&error)))
}

fn cannot_use(rank: usize, trouble: &str) -> String {
    format!("rank {rank} cannot use NCCL: {trouble}")
}

/// The library and this rank's GPU, with its UUID; or the `trouble` that the caller knows of.
fn prepared(
    core: &Core,
    trouble: Option<String>,
) -> Result<(&'static Nccl, Arc<Device>, [u8; 16])> {
    if let Some(what) = trouble {
        return Err(unavailable("nccl", what));
    }
    let device = device_of(core, "nccl")?;
    let library = crate::environment::nccl_library();
    let nccl = Nccl::get(library.as_deref()).map_err(|what| unavailable("nccl", what))?;
    if let Some(what) = crate::environment::nccl_lacks(nccl.version_number()) {
        return Err(unavailable("nccl", what));
    }
    let uuid = device.uuid().map_err(|error| cuda_error(core.rank, error))?;
    Ok((nccl, device, uuid))
}

/// Connects the ranks of a group over NCCL. Collective: `gather` goes over the control plane.
pub(super) fn open(
    core: &Arc<Core>,
    trouble: Option<String>,
    gather: &mut Gather<'_>,
    deadline: Instant,
) -> Result<Connected> {
    let (rank, world_size) = (core.rank, core.world_size());
    let mine = prepared(core, trouble);
    // Those who have no NCCL say so to the others, instead of letting them wait.
    let card = Card::of(mine.as_ref());
    let cards: Vec<Card> =
        gather(&card.encode())?.iter().map(|bytes| Card::decode(bytes)).collect();
    let (nccl, device, _) = mine?;
    check_cards(&cards)?;
    let id = if rank == 0 {
        nccl.unique_id().map_err(|what| unavailable("nccl", what))?.internal.to_vec()
    } else {
        Vec::new()
    };
    let id: Vec<u8> = id.into_iter().map(c_char::cast_unsigned).collect();
    let id =
        gather(&id)?.first().and_then(|bytes| decode_id(bytes)).ok_or_else(|| Error::World {
            rank,
            what: "rank 0 sent no NCCL id: run the same build of the program on every rank"
                .to_owned(),
        })?;
    let current = device.current().map_err(|error| cuda_error(rank, error))?;
    let gives_up = || core.peers.failure().is_some();
    let joined = Communicator::join(nccl, id, rank, world_size, deadline, &gives_up);
    // Who gave up because of a peer says what became of the peer.
    let told = |error: NcclError| {
        let what = error.what;
        let own = Error::Backend { rank, backend: "nccl", call: error.call.to_owned(), what };
        core.peers.failure().unwrap_or(own)
    };
    let communicator = Arc::new(joined.map_err(told)?);
    drop(current);
    // Whoever is ready may fail its first call, which must not end the joining of those who are not:
    // they wait here for each other.
    if let Err(error) = gather(&[]) {
        tracing::debug!(rank, %error, "the group failed while it was set up");
    }
    tracing::info!(rank, nccl = nccl.version(), gpu = device.name(), "an NCCL group is ready");
    carried(core, device, NcclSide { library: nccl, communicator })
}

/// A transport for `core`'s calls on a communicator.
fn carried(core: &Arc<Core>, device: Arc<Device>, nccl: NcclSide) -> Result<Connected> {
    let (rank, world_size) = (core.rank, core.world_size());
    let stream = OwnStream::new(&device).map_err(|error| cuda_error(rank, error))?;
    let transport = NcclMover {
        core: Arc::clone(core),
        rank,
        world_size,
        nccl: nccl.library,
        device: Arc::clone(&device),
        communicator: Arc::clone(&nccl.communicator),
        stream,
        moving: VecDeque::new(),
        scaled: Vec::new(),
    };
    let runner = Runner::spawn(format!("phalanx-nccl-{rank}"), true, || ())
        .map_err(|error| Error::system(rank, "start a thread", error))?;
    // Callers who wait never enter NCCL or wait for a device: only the runner does. Those who allocate or divide do, with
    // deadlines.
    let lane = Lane::new("nccl", Arc::clone(core), &runner, false, Box::new(transport));
    let gpu = Arc::new(Gpu { device, allocator: Some(Arc::new(nccl.clone())) });
    Ok(Arc::new(NcclTransport { lane, gpu, nccl }))
}

/// Divides the communicator `nccl`, on which nothing is under way: `part` is this rank's part of the
/// group, with its color's number. Collective for the undivided group.
fn divide(
    undivided: &Core,
    (device, nccl): (&Arc<Device>, &NcclSide),
    part: Option<(&Arc<Core>, c_int)>,
    deadline: Instant,
) -> Result<Option<Connected>> {
    let rank = undivided.rank;
    let current = device.current().map_err(|error| cuda_error(rank, error))?;
    let gives_up = || undivided.peers.failure().is_some();
    let key = part.map_or(0, |(core, _)| c_int::try_from(core.rank).unwrap_or(c_int::MAX));
    let divided = nccl.communicator.split(part.map(|(_, color)| color), key, deadline, &gives_up);
    let communicator = divided.map_err(|error| {
        communicator::abort_all(nccl.library, &error.what);
        let what = error.what;
        let own = Error::Backend { rank, backend: "nccl", call: error.call.to_owned(), what };
        undivided.peers.failure().unwrap_or(own)
    })?;
    drop(current);
    let (Some((core, _)), Some(communicator)) = (part, communicator) else { return Ok(None) };
    let communicator = Arc::new(communicator);
    let nccl = NcclSide { library: nccl.library, communicator };
    carried(core, Arc::clone(device), nccl).map(Some)
}

fn decode_id(bytes: &[u8]) -> Option<ncclUniqueId> {
    let bytes: [u8; 128] = bytes.try_into().ok()?;
    Some(ncclUniqueId { internal: bytes.map(u8::cast_signed) })
}

/// What a rank tells the others before NCCL starts.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
struct Card {
    version: i32,
    uuid: [u8; 16],
    /// `NCCL_HOSTID`: ranks whose ids differ are on different machines, as far as NCCL knows.
    host_id: String,
    /// Why this rank has no NCCL; empty when it has.
    trouble: String,
}

impl Card {
    fn of(mine: std::result::Result<&(&'static Nccl, Arc<Device>, [u8; 16]), &Error>) -> Self {
        match mine {
            Ok((nccl, _, uuid)) => Self {
                version: nccl.version_number(),
                uuid: *uuid,
                host_id: crate::environment::nccl_host_id().unwrap_or_default(),
                trouble: String::new(),
            },
            Err(error) => Self { trouble: trouble(error), ..Self::default() },
        }
    }

    fn encode(&self) -> Vec<u8> {
        let mut bytes = self.version.to_le_bytes().to_vec();
        bytes.extend_from_slice(&self.uuid);
        bytes.extend_from_slice(&u16::try_from(self.host_id.len()).unwrap_or(0).to_le_bytes());
        bytes.extend_from_slice(self.host_id.as_bytes());
        bytes.extend_from_slice(self.trouble.as_bytes());
        bytes
    }

    fn decode(bytes: &[u8]) -> Self {
        let part = |from: usize, to: usize| bytes.get(from..to).unwrap_or_default();
        let text = |utf8: &[u8]| String::from_utf8_lossy(utf8).into_owned();
        let length = part(20, 22).try_into().map_or(0, u16::from_le_bytes);
        let end = 22 + usize::from(length);
        Self {
            version: part(0, 4).try_into().map_or(0, i32::from_le_bytes),
            uuid: part(4, 20).try_into().unwrap_or_default(),
            host_id: text(part(22, end)),
            trouble: text(part(end, bytes.len())),
        }
    }
}

/// Every rank has NCCL, the same one, and a GPU of its own.
fn check_cards(cards: &[Card]) -> Result<()> {
    for (rank, card) in cards.iter().enumerate() {
        if !card.trouble.is_empty() {
            return Err(unavailable("nccl", cannot_use(rank, &card.trouble)));
        }
        if card.version != cards[0].version {
            return Err(unavailable("nccl", format!(
                "rank 0 has version code {}, rank {rank} has {}: install one version of NCCL on all machines",
                cards[0].version, card.version
            )));
        }
        let same = |other: &Card| other.uuid == card.uuid && other.host_id == card.host_id;
        if let Some(other) = cards[..rank].iter().position(same) {
            return Err(unavailable("nccl", format!(
                "ranks {other} and {rank} are on the same GPU: start at most one rank for each GPU, and \
                 check CUDA_VISIBLE_DEVICES (emulated nodes that share a GPU are set up by the launcher: \
                 --nnodes without --node-rank)"
            )));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn card(gpu: u8) -> Card {
        Card { version: 22_809, uuid: [gpu; 16], ..Card::default() }
    }

    #[test]
    fn cards_survive_their_way() {
        for card in [
            card(3),
            Card { host_id: "rank1".to_owned(), ..card(4) },
            Card { trouble: "no driver".to_owned(), ..Card::default() },
        ] {
            assert_eq!(Card::decode(&card.encode()), card);
        }
        assert_eq!(Card::decode(&[]), Card::default());
    }

    #[test]
    fn two_ranks_on_one_gpu_are_both_named() {
        let error = check_cards(&[card(1), card(2), card(1)]).unwrap_err().to_string();
        assert!(error.contains("ranks 0 and 2 are on the same GPU"), "{error}");
        let apart = |id: &str| Card { host_id: id.to_owned(), ..card(1) };
        assert!(check_cards(&[apart("rank0"), apart("rank1")]).is_ok(), "set up by the launcher");
    }

    #[test]
    fn a_rank_without_nccl_or_with_another_version_is_named() {
        let without = Card { trouble: "no driver".to_owned(), ..Card::default() };
        let error = check_cards(&[card(1), without]).unwrap_err().to_string();
        assert!(error.contains("rank 1 cannot use NCCL: no driver"), "{error}");
        let other = Card { version: 22_700, ..card(2) };
        let mixed = check_cards(&[card(1), other]).unwrap_err().to_string();
        assert!(mixed.contains("rank 1 has 22700"), "{mixed}");
    }
}
