//! Snapshots in the launcher's memory: each rank's share in its own slot, and a copy with a rank of the next node.
//!
//! A snapshot counts when all ranks have said that their part of it is kept; before that the halves of the one that counts are not
//! written to (see [`phalanx_comm::slots`]). What is found of it after a restart is [`finder`]'s.
//!
//! Cost, on the training thread: a copy of this rank's share to the process and one to its slot, one message of that length to another
//! node and one from there, and two small collectives.

use std::io;
use std::sync::Arc;

use phalanx_checkpoint::{Checkpoint, Saver, Snapshot};
use phalanx_comm::slots::{Slots, Stamp, Writing, PAIRS_MAX};
use phalanx_comm::Group;

use super::finder;
use super::neighbours::Neighbours;
use super::ranks::OverGroup;
use crate::{Error, Result};

/// Messages between ranks: long enough for any link, and what memory they take for a moment is little.
pub(super) const CHUNK_BYTES: usize = 16 << 20;

/// One rank's part of keeping snapshots.
#[derive(Debug)]
pub(super) struct Keeper {
    slots: Arc<Slots>,
    neighbours: Neighbours,
    /// The snapshot that counts: kept by all, or gone on from.
    newest: Option<Stamp>,
}

/// The first rank with trouble, and what that is.
#[derive(Debug)]
pub(super) struct NotKept {
    pub(super) rank: usize,
    pub(super) reason: String,
}

impl Keeper {
    /// Keeps snapshots in `slots`. Collective: an error on all ranks where one has none.
    pub(super) fn new(group: &mut Group, slots: Option<Slots>) -> Result<Self> {
        let node = i64::try_from(group.node_rank()).unwrap_or(i64::MAX);
        let mut told = vec![0; group.world_size()];
        let mine = if slots.is_some() { node } else { -1 };
        group.tagged("memory for snapshots").all_gather(&[mine], &mut told[..])?.wait()?;
        let lacks = told.iter().position(|&one| one < 0);
        let (Some(slots), None) = (slots, lacks) else {
            return Err(refused(lacks.unwrap_or_default(), "only phalanx's launcher gives it; start the ranks with it, or leave memory_every_steps at 0"));
        };
        let nodes: Vec<usize> =
            told.into_iter().map(|one| usize::try_from(one).unwrap_or(0)).collect();
        let is_overloaded = |&rank: &usize| Neighbours::of(rank, &nodes).wards.len() >= PAIRS_MAX;
        if let Some(rank) = (0..nodes.len()).find(is_overloaded) {
            return Err(refused(rank, "too many neighbours' shares would come to it; start about as many ranks on each node"));
        }
        let neighbours = Neighbours::of(group.rank(), &nodes);
        Ok(Self { slots: Arc::new(slots), neighbours, newest: None })
    }

    /// The step of the snapshot that counts.
    pub(super) fn step(&self) -> Option<u64> {
        self.newest.map(|stamp| stamp.step)
    }

    /// Keeps a snapshot. Collective. Inside: why it does not count, the same on all ranks; the former still does.
    pub(super) fn keep(
        &mut self,
        group: &mut Group,
        saver: &mut Saver,
        (step, snapshot): (u64, &Snapshot<'_>),
    ) -> Result<Result<(), NotKept>> {
        let mut bytes = Vec::new();
        let share = saver.capture(&mut OverGroup(group), step, snapshot, &mut bytes)?;
        let stamp = Stamp { step, nonce: share.nonce };
        let own = self.store(stamp, &bytes);
        let theirs = self.exchange(group, stamp, &bytes)?;
        let trouble = own.and(theirs).err().map(|error| error.to_string()).unwrap_or_default();
        Ok(match first_said(group, "snapshot kept", &trouble)? {
            Some(not_kept) => Err(not_kept),
            None => {
                self.newest = Some(stamp);
                Ok(())
            }
        })
    }

    fn store(&self, stamp: Stamp, share: &[u8]) -> io::Result<()> {
        let mut writing = self.slots.begin(0, stamp, self.newest)?;
        writing.write(share)?;
        writing.finish()
    }

    /// Sends this rank's share to its keeper, and keeps those of its wards. Collective; inside: what became of those.
    fn exchange(&self, group: &mut Group, stamp: Stamp, share: &[u8]) -> Result<io::Result<()>> {
        let Some(keeper) = self.neighbours.keeper else { return Ok(Ok(())) };
        let mut lengths = vec![0_i64; group.world_size()];
        let length = i64::try_from(share.len()).unwrap_or(i64::MAX);
        group.tagged("lengths of snapshots").all_gather(&[length], &mut lengths[..])?.wait()?;
        let length_of = |rank: usize| usize::try_from(lengths[rank]).unwrap_or(0);
        let wards = self.neighbours.wards.iter().enumerate();
        let mut incoming: Vec<Incoming<'_>> = wards
            .map(|(at, &from)| Incoming {
                from,
                bytes: length_of(from),
                writing: self.slots.begin(1 + at, stamp, self.newest),
            })
            .collect();
        let longest = (0..lengths.len()).map(length_of).max().unwrap_or(0);
        let mut buffer = Vec::new();
        // All ranks send and receive the same chunk before the next one: no rank waits for one that waits for it.
        for start in (0..longest).step_by(CHUNK_BYTES) {
            let chunk = share.get(start..).filter(|rest| !rest.is_empty());
            let chunk = chunk.map(|rest| &rest[..rest.len().min(CHUNK_BYTES)]);
            let sent = chunk.map(|chunk| group.send(chunk, keeper)).transpose()?;
            for one in &mut incoming {
                one.receive(group, start, &mut buffer)?;
            }
            sent.map_or(Ok(()), phalanx_comm::Work::wait)?;
        }
        Ok(incoming.into_iter().try_for_each(|one| one.writing?.finish()))
    }

    /// The newest whole snapshot of the ranks' memory, if it is newer than `step`. Collective, and the same on all ranks. It is read where
    /// it lies, until [`Keeper::let_go`].
    pub(super) fn find(
        &mut self,
        group: &mut Group,
        newer_than: Option<u64>,
    ) -> Result<Option<Checkpoint>> {
        let found = finder::find(group, &self.slots, newer_than)?;
        Ok(found.map(|(stamp, checkpoint)| {
            self.newest = Some(stamp);
            checkpoint
        }))
    }

    /// No rank reads any more of what was found.
    pub(super) fn let_go(&self) {
        finder::let_go(&self.slots);
    }
}

/// A ward's share on its way. After an error of the memory the rest is received all the same: the ranks stay in step.
struct Incoming<'a> {
    from: usize,
    bytes: usize,
    writing: io::Result<Writing<'a>>,
}

impl Incoming<'_> {
    fn receive(&mut self, group: &mut Group, start: usize, buffer: &mut Vec<u8>) -> Result<()> {
        let length = self.bytes.saturating_sub(start).min(CHUNK_BYTES);
        if length == 0 {
            return Ok(());
        }
        buffer.resize(length, 0);
        group.receive(&mut buffer[..], self.from)?.wait()?;
        let written = self.writing.as_mut().ok().map(|writing| writing.write(buffer));
        if let Some(Err(error)) = written {
            self.writing = Err(error);
        }
        Ok(())
    }
}

/// The first rank that has something to say. Collective.
pub(super) fn first_said(group: &mut Group, tag: &str, mine: &str) -> Result<Option<NotKept>> {
    let told = group.tagged(tag).all_gather_bytes(mine.as_bytes())?;
    let rank = told.iter().position(|text| !text.is_empty());
    Ok(rank.map(|rank| NotKept { rank, reason: String::from_utf8_lossy(&told[rank]).into_owned() }))
}

fn refused(rank: usize, reason: &'static str) -> Error {
    Error::NoSnapshotMemory { rank, reason }
}
