//! The NCCL backend: collectives on the memory of NVIDIA GPUs.
//!
//! | file | what |
//! |---|---|
//! | `library` | finds and loads libnccl; versions; error texts |
//! | `config` | a communicator's settings, by version |
//! | `communicator` | NCCL's calls, checked, with deadlines; abort of all |
//! | `transport` | a group's calls on its stream |
//!
//! Memory of the host goes over the host backend, which is the group's control plane anyway: what the
//! ranks called is compared there before NCCL is asked for anything, so a kernel is only launched when
//! all ranks launch the same one.

mod alive;
pub(crate) mod communicator;
mod config;
pub(crate) mod library;
pub(crate) mod transport;

use std::collections::VecDeque;
use std::ffi::{c_char, c_int};
use std::sync::Arc;
use std::time::Instant;

use cudarc::nccl::sys::ncclUniqueId;

use self::communicator::{Communicator, NcclError};
use self::library::Nccl;
use self::transport::NcclTransport;
use super::gpu::cuda::{Device, OwnStream};
use super::gpu::{self, cuda_error, Gpu, NcclSide};
use super::host::core::Core;
use super::lane::Lane;
use super::runner::Runner;
use super::Backend;
use crate::error::{Error, Result};

/// Every rank gives its bytes and gets everybody's, by rank.
type Gather<'a> = dyn FnMut(&[u8]) -> Result<Vec<Vec<u8>>> + 'a;

fn unavailable(what: impl Into<String>) -> Error {
    Error::NoBackend { backend: "nccl", what: what.into() }
}

/// This rank's card, for the choice of a backend: with `trouble`, if the caller knows of any.
pub(crate) fn card(core: &Core, library: Option<&str>, trouble: Option<String>) -> Vec<u8> {
    let mine = trouble.map_or_else(|| prepare(core, library), |what| Err(unavailable(what)));
    Card::of(mine.as_ref()).encode()
}

/// Why ranks with these cards cannot use NCCL together; `None`: they can.
pub(crate) fn obstacle(cards: &[Vec<u8>]) -> Option<String> {
    let cards: Vec<Card> = cards.iter().map(|bytes| Card::decode(bytes)).collect();
    let troubled = cards.iter().position(|card| !card.trouble.is_empty());
    if let Some(rank) = troubled {
        return Some(cannot_use(rank, &cards[rank].trouble));
    }
    check_cards(&cards).err().map(said)
}

fn cannot_use(rank: usize, trouble: &str) -> String {
    format!("rank {rank} cannot use NCCL: {trouble}")
}

fn said(error: Error) -> String {
    match error {
        Error::NoBackend { what, .. } => what,
        other => other.to_string(),
    }
}

/// The library and this rank's GPU, with its UUID.
fn prepare(core: &Core, library: Option<&str>) -> Result<(&'static Nccl, Arc<Device>, [u8; 16])> {
    let device = gpu::device_of(core, "nccl")?;
    let nccl = Nccl::get(library).map_err(unavailable)?;
    if let Some(what) = crate::environment::nccl_lacks(nccl.version_number()) {
        return Err(unavailable(what));
    }
    let uuid = device.uuid().map_err(|error| cuda_error(core.rank, error))?;
    Ok((nccl, device, uuid))
}

/// Connects the ranks of a group over NCCL. Collective: `gather` goes over the control plane.
pub(crate) fn open(
    core: &Arc<Core>,
    (library, trouble): (Option<&str>, Option<String>),
    gather: &mut Gather<'_>,
    deadline: Instant,
) -> Result<(Arc<Lane>, Arc<Gpu>)> {
    let (rank, world_size) = (core.rank, core.world_size());
    let mine = trouble.map_or_else(|| prepare(core, library), |what| Err(unavailable(what)));
    // Those who have no NCCL say so to the others, instead of letting them wait.
    let card = Card::of(mine.as_ref());
    let cards: Vec<Card> =
        gather(&card.encode())?.iter().map(|bytes| Card::decode(bytes)).collect();
    let (nccl, device, _) = mine?;
    check_cards(&cards)?;
    let id = if rank == 0 {
        nccl.unique_id().map_err(unavailable)?.internal.to_vec()
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

/// A lane for `core`'s calls on a communicator.
fn carried(core: &Arc<Core>, device: Arc<Device>, nccl: NcclSide) -> Result<(Arc<Lane>, Arc<Gpu>)> {
    let (rank, world_size) = (core.rank, core.world_size());
    let stream = OwnStream::new(&device).map_err(|error| cuda_error(rank, error))?;
    let transport = NcclTransport {
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
    let lane = Lane::new(Backend::Nccl, Arc::clone(core), &runner, false, Box::new(transport));
    Ok((lane, Arc::new(Gpu { device, nccl: Some(nccl) })))
}

/// Divides the communicator `nccl`, on which nothing is under way: `part` is this rank's part of the
/// group, with its color's number. Collective for the undivided group.
pub(crate) fn divide(
    undivided: &Core,
    (device, nccl): (&Arc<Device>, &NcclSide),
    part: Option<(&Arc<Core>, c_int)>,
    deadline: Instant,
) -> Result<Option<(Arc<Lane>, Arc<Gpu>)>> {
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
            Err(Error::NoBackend { what, .. }) => Self { trouble: what.clone(), ..Self::default() },
            Err(error) => Self { trouble: error.to_string(), ..Self::default() },
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
            return Err(unavailable(cannot_use(rank, &card.trouble)));
        }
        if card.version != cards[0].version {
            return Err(unavailable(format!(
                "rank 0 has version code {}, rank {rank} has {}: install one version of NCCL on all machines",
                cards[0].version, card.version
            )));
        }
        let same = |other: &Card| other.uuid == card.uuid && other.host_id == card.host_id;
        if let Some(other) = cards[..rank].iter().position(same) {
            return Err(unavailable(format!(
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
