//! Building a group's side on this rank: listen, exchange cards, connect, share boards; and
//! registering memory later.

use std::net::TcpStream;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::core::Core;
use super::executor::{Carry, Executor};
use super::exit;
use super::links::Links;
use crate::algorithm::topology::Topology;
use crate::control::card::Card;
use crate::control::connection::Control;
use crate::control::liveness::{self, Liveness};
use crate::control::mesh;
use crate::control::monitor;
use crate::control::peers::{Identity, Peers, Sockets};
use crate::control::reconnect::{Door, Way};
use crate::control::resume::PairKey;
use crate::control::wire::Frame;
use crate::environment::{HostLink, World};
use crate::error::{Error, Result};
use crate::memory::board::Board;
use crate::memory::mapping::{self, Mapping};
use crate::memory::region::RegionMemory;
use crate::recorder::GroupPart;

/// Every rank gives its bytes and gets everybody's, by rank.
pub(crate) type Exchange<'a> = dyn FnMut(&[u8], Instant) -> Result<Vec<Vec<u8>>> + 'a;

/// The parcel number of the board; regions count from 1.
const BOARD_ID: u64 = 0;

/// Numbers the groups of this process, so that regions know theirs.
static GROUPS: AtomicU64 = AtomicU64::new(1);

/// A number that no other group of this process has.
pub(crate) fn group_number() -> u64 {
    GROUPS.fetch_add(1, Ordering::Relaxed)
}

/// How ranks connect.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Terms {
    pub(crate) link: HostLink,
    pub(crate) timeout: Duration,
    pub(crate) liveness: Liveness,
    pub(crate) carry: Carry,
}

/// Connects the ranks of a group.
pub(crate) fn connect(
    world: &mut World,
    terms: Terms,
    part: GroupPart,
    exchange: &mut Exchange<'_>,
) -> Result<Arc<Core>> {
    let Terms { link, timeout, liveness, carry } = terms;
    let deadline = Instant::now() + timeout;
    let rank = world.rank;
    if world.world_size <= 1 {
        return alone(liveness, part, carry);
    }
    let listening = mesh::listen(world, link, deadline)?;
    let cards = cards(rank, &exchange(&listening.card.encode(), deadline)?)?;
    if world.nodes_are_guessed() {
        (world.node_rank, world.node_count) = node(&cards, rank);
    }
    let apart = cards.iter().position(|card| !card.shares_memory_with(&cards[rank]));
    if let (HostLink::Shm, Some(peer)) = (link, apart) {
        let what = format!(
            "shared memory alone was asked for (PHALANX_HOST_LINK=shm), and rank {peer} on host {} shares none with this one: take auto",
            cards[peer].host
        );
        return Err(Error::World { rank, what });
    }
    let pairs = mesh::connect(&listening, rank, &cards, deadline)?;
    let topology = Topology::new(machines(&cards));
    let ways = ways(world, &topology, &cards);
    // Everybody is connected: the listeners, and the names of the unix ones, go; but for the one to
    // which a rank of another machine may have to come back.
    let comes_back = ways.iter().skip(rank + 1).any(Option::is_some);
    let door = Door::new(comes_back.then(|| listening.into_tcp()));
    let system = |call| move |error: std::io::Error| Error::system(rank, call, error);
    let mut controls = Vec::new();
    let mut streams = Vec::new();
    let mut copies = Vec::new();
    for pair in pairs {
        let (control, data) = match pair {
            None => (None, None),
            Some(pair) => {
                if pair.data.is_some() {
                    liveness::watch_connection(&pair.control, liveness.dead_after)
                        .map_err(system("setsockopt"))?;
                }
                let control = Control::new(pair.control, pair.data.is_some());
                let control = control.map_err(system("ioctl"))?;
                (Some(control), pair.data)
            }
        };
        controls.push(control);
        let copy = data.as_ref().map(TcpStream::try_clone).transpose().map_err(system("dup"))?;
        copies.push(copy.map(OwnedFd::from));
        streams.push(data);
    }
    let identities = cards
        .iter()
        .enumerate()
        .map(|(peer, card)| Identity {
            host: card.host.clone(),
            pid: card.pid,
            local: topology.shares_memory(rank, peer),
        })
        .collect();
    let sockets = Sockets { controls, data: copies, ways };
    let peers = Arc::new(Peers::new(rank, identities, sockets, liveness, part)?);
    monitor::spawn(Arc::clone(&peers), door).map_err(system("start a thread"))?;
    let boards = share_boards(&peers, &topology, deadline)?;
    // Both ends of every socket must know: one rank that wants them is enough.
    let checked = cards.iter().any(|card| card.checks);
    let links =
        Links::new(Arc::clone(&peers), streams, checked).map_err(system("set up data sockets"))?;
    let core = Arc::new(Core::new(peers, topology, boards, Executor::new(links, carry)));
    exit::look_after(&core);
    Ok(core)
}

/// What the ranks have published.
fn cards(rank: usize, published: &[Vec<u8>]) -> Result<Vec<Card>> {
    let card = |(peer, bytes): (usize, &Vec<u8>)| {
        let why = if bytes.is_empty() {
            "could not open its sockets: look at its output"
        } else {
            "published no valid address: run the same build of the program on every rank"
        };
        let what = format!("rank {peer} {why}");
        Card::decode(bytes).ok_or(Error::World { rank, what })
    };
    published.iter().enumerate().map(card).collect()
}

/// A group of one: no sockets, no threads.
fn alone(liveness: Liveness, part: GroupPart, carry: Carry) -> Result<Arc<Core>> {
    let host = rustix::system::uname().nodename().to_string_lossy().into_owned();
    let identity = Identity { host, pid: std::process::id(), local: true };
    let sockets = Sockets { controls: vec![None], data: vec![None], ways: vec![None] };
    let peers = Arc::new(Peers::new(0, vec![identity], sockets, liveness, part)?);
    let board = Board::private().map_err(|error| Error::system(0, "mmap", error))?;
    let links = Links::new(Arc::clone(&peers), vec![None], false)
        .map_err(|error| Error::system(0, "set up data sockets", error))?;
    let topology = Topology::new(vec![0]);
    Ok(Arc::new(Core::new(
        peers,
        topology,
        vec![Some(Arc::new(board))],
        Executor::new(links, carry),
    )))
}

/// How lost control connections come back, by peer.
fn ways(world: &World, topology: &Topology, cards: &[Card]) -> Vec<Option<Way>> {
    let rank = world.rank;
    let way = |(peer, card): (usize, &Card)| {
        let (acceptor, connector) = (&cards[rank.min(peer)], &cards[rank.max(peer)]);
        let key = PairKey::new(world, acceptor, connector);
        let is_remote = !topology.shares_memory(rank, peer);
        is_remote.then_some(Way { address: card.address, key })
    };
    cards.iter().enumerate().map(way).collect()
}

/// The number of a rank's node, by the first rank on each, and how many there are.
fn node(cards: &[Card], rank: usize) -> (usize, usize) {
    let mut nodes = Vec::new();
    for card in cards {
        if !nodes.contains(&card.node()) {
            nodes.push(card.node());
        }
    }
    let own = cards[rank].node();
    (nodes.iter().position(|node| *node == own).unwrap_or(0), nodes.len())
}

/// Numbers the machines by the first rank on each.
fn machines(cards: &[Card]) -> Vec<usize> {
    let first = |(rank, card): (usize, &Card)| {
        cards.iter().position(|other| card.shares_memory_with(other)).unwrap_or(rank)
    };
    cards.iter().enumerate().map(first).collect()
}

fn share_boards(
    peers: &Peers,
    topology: &Topology,
    deadline: Instant,
) -> Result<Vec<Option<Arc<Board>>>> {
    let rank = peers.rank;
    let system = |call| move |error: std::io::Error| Error::system(rank, call, error);
    let mut boards: Vec<Option<Arc<Board>>> = (0..peers.world_size()).map(|_| None).collect();
    let locals = topology.locals(rank);
    let others = || locals.iter().copied().filter(|local| *local != rank);
    if others().next().is_none() {
        let own = Arc::new(Board::private().map_err(system("mmap"))?);
        peers.show_board(&own);
        boards[rank] = Some(own);
        return Ok(boards);
    }
    let (fd, own) = Board::create().map_err(system("memfd_create"))?;
    for peer in others() {
        peers.send(peer, &Frame::Region { id: BOARD_ID, bytes: 0 }, Some(fd.as_fd()))?;
    }
    for peer in others() {
        let Some((theirs, _)) = peers.take_parcel(peer, BOARD_ID, deadline)? else {
            return Err(missing_parcel(peers, peer));
        };
        boards[peer] = Some(Arc::new(Board::open(theirs.as_fd()).map_err(system("mmap"))?));
    }
    let own = Arc::new(own);
    peers.show_board(&own);
    boards[rank] = Some(own);
    Ok(boards)
}

fn missing_parcel(peers: &Peers, peer: usize) -> Error {
    let Identity { pid, .. } = peers.identities[peer].clone();
    Error::Connect {
        rank: peers.rank,
        peer,
        address: format!("pid {pid}"),
        what: "it did not send its shared memory in time; look at that rank's output".to_owned(),
    }
}

/// Makes this rank's part of region `id` and maps those of this machine. All ranks have agreed on
/// `bytes` already.
pub(crate) fn share_region(
    core: &Core,
    group: u64,
    id: u64,
    bytes: usize,
    deadline: Instant,
) -> Result<RegionMemory> {
    let rank = core.rank;
    let peers = &core.peers;
    let system = |call| move |error: std::io::Error| Error::system(rank, call, error);
    if core.locals.iter().all(|local| *local == rank) {
        return own_region(core, group, id, bytes);
    }
    let (fd, own) = mapping::create("phalanx-region", bytes).map_err(system("memfd_create"))?;
    let mut parts: Vec<Option<Mapping>> = (0..core.world_size()).map(|_| None).collect();
    let others = || core.locals.iter().copied().filter(|local| *local != rank);
    for peer in others() {
        let frame = Frame::Region { id, bytes: bytes as u64 };
        peers.send(peer, &frame, Some(fd.as_fd()))?;
    }
    for peer in others() {
        let Some((theirs, _)) = peers.take_parcel(peer, id, deadline)? else {
            return Err(missing_parcel(peers, peer));
        };
        parts[peer] = Some(mapping::open(theirs.as_fd(), bytes).map_err(system("mmap"))?);
    }
    parts[rank] = Some(own);
    Ok(RegionMemory { id, group, rank, parts, device: None })
}

/// Memory of this rank for region `id`, which no peer maps: another library moves its data, or sockets.
pub(crate) fn own_region(core: &Core, group: u64, id: u64, bytes: usize) -> Result<RegionMemory> {
    let rank = core.rank;
    let own = mapping::private(bytes).map_err(|error| Error::system(rank, "mmap", error))?;
    let mut parts: Vec<Option<Mapping>> = (0..core.world_size()).map(|_| None).collect();
    parts[rank] = Some(own);
    Ok(RegionMemory { id, group, rank, parts, device: None })
}
