//! What is left in the launchers' memory after a restart: the newest whole snapshot, as a [`Checkpoint`].
//!
//! Ranks tell each other which shares they have. A share that some rank of a machine has is read in its slot by all ranks there; one
//! that no rank of a machine has is broadcast, and the first rank of such a machine puts it among the guests of its launcher's memory. So
//! a machine has at most one copy of a snapshot more than before, however many ranks it has.

use std::io;
use std::sync::Arc;

use phalanx_checkpoint::fs::Source;
use phalanx_checkpoint::{Checkpoint, SnapshotShare};
use phalanx_comm::slots::{Kept, Slots, Spot, Stamp};
use phalanx_comm::Group;
use serde::{Deserialize, Serialize};

use super::inventory::{self, Entry, Route, Whole};
use super::keeper::{first_said, NotKept, CHUNK_BYTES};
use crate::Result;

/// What a rank has.
#[derive(Debug, Default, Serialize, Deserialize)]
struct Told {
    /// Which memory: ranks of one launcher have the same.
    memory: u64,
    place: usize,
    entries: Vec<Entry>,
}

/// A share in the memory of this machine's launcher.
#[derive(Debug)]
struct Share {
    slots: Arc<Slots>,
    spot: Spot,
    bytes: u64,
}

impl Source for Share {
    fn bytes(&self) -> io::Result<u64> {
        Ok(self.bytes)
    }

    fn read_at(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        self.slots.read(self.spot, offset, out)
    }
}

/// The newest whole snapshot that is newer than a step. Collective, and the same on all ranks.
pub(super) fn find(
    group: &mut Group,
    slots: &Arc<Slots>,
    newer_than: Option<u64>,
) -> Result<Option<(Stamp, Checkpoint)>> {
    let told = tell(group, slots)?;
    let entries: Vec<Vec<Entry>> = told.iter().map(|one| one.entries.clone()).collect();
    let whole = inventory::newest_whole(&entries);
    if whole.is_none() && group.rank() == 0 {
        for line in inventory::incomplete(&entries) {
            tracing::warn!("ignored a snapshot in memory: {line}");
        }
    }
    let is_newer = |found: &Whole| newer_than.is_none_or(|step| found.step > step);
    let Some(whole) = whole.filter(is_newer) else { return Ok(None) };
    let opened = Checkpoint::from_snapshots(bring(group, slots, &told, &whole)?);
    let trouble = opened.as_ref().err().map(ToString::to_string).unwrap_or_default();
    let said = first_said(group, "snapshot brought", &trouble)?;
    match (said, opened) {
        (None, Ok(checkpoint)) => {
            Ok(Some((Stamp { step: whole.step, nonce: whole.nonce }, checkpoint)))
        }
        (said, _) => {
            let NotKept { rank, reason } = said.unwrap_or(NotKept { rank: 0, reason: trouble });
            tracing::warn!(
                "the snapshot of step {} is not used: rank {rank}: {reason}",
                whole.step
            );
            let_go(slots);
            Ok(None)
        }
    }
}

/// Gives back the memory of shares that were brought to this machine.
pub(super) fn let_go(slots: &Slots) {
    if let Err(error) = slots.see_guests_out() {
        tracing::warn!(%error, "memory for snapshots is not given back");
    }
}

/// What all ranks have.
fn tell(group: &mut Group, slots: &Arc<Slots>) -> Result<Vec<Told>> {
    let mine = serde_json::to_vec(&inventory_of(slots)).unwrap_or_default();
    let told = group.tagged("snapshots in memory").all_gather_bytes(&mine)?;
    let parse = |text: &Vec<u8>| serde_json::from_slice(text).unwrap_or_default();
    Ok(told.iter().map(parse).collect())
}

/// Reads everything that this rank has; what is damaged is as if it were not there.
fn inventory_of(slots: &Arc<Slots>) -> Told {
    let (memory, kept) = match (slots.number(), slots.kept()) {
        (Ok(number), Ok(kept)) => (number, kept),
        (Err(error), _) | (_, Err(error)) => {
            tracing::warn!(%error, "the memory for snapshots cannot be read");
            (0, Vec::new())
        }
    };
    let entries = kept.iter().filter_map(|kept| verified(slots, kept)).collect();
    Told { memory, place: slots.place(), entries }
}

fn verified(slots: &Arc<Slots>, kept: &Kept) -> Option<Entry> {
    let &Kept { slot, stamp, bytes } = kept;
    let spot = Spot::Kept { place: slots.place(), slot };
    match SnapshotShare::verify(Arc::new(Share { slots: Arc::clone(slots), spot, bytes })) {
        Ok(SnapshotShare { step, nonce, rank, world_size }) => {
            Some(Entry { step, nonce, of_rank: rank, world_size, slot, bytes })
        }
        Err(error) => {
            tracing::warn!(slot, step = stamp.step, %error, "ignored a share in memory");
            None
        }
    }
}

/// All shares of a snapshot, by rank of its world, each in the memory of this machine. Collective.
fn bring(
    group: &mut Group,
    slots: &Arc<Slots>,
    told: &[Told],
    whole: &Whole,
) -> Result<Vec<Arc<dyn Source>>> {
    let memories: Vec<u64> = told.iter().map(|one| one.memory).collect();
    let mut shares: Vec<Arc<dyn Source>> = Vec::with_capacity(whole.shares.len());
    for (of_rank, holders) in whole.shares.iter().enumerate() {
        let route = inventory::route(holders, &memories);
        if !route.receivers.is_empty() {
            pass(group, slots, of_rank, &route)?;
        }
        let near = holders.iter().find(|(holder, _)| memories[*holder] == memories[group.rank()]);
        let spot = match near {
            Some((holder, entry)) => Spot::Kept { place: told[*holder].place, slot: entry.slot },
            None => Spot::Guest(of_rank),
        };
        shares.push(Arc::new(Share { slots: Arc::clone(slots), spot, bytes: route.entry.bytes }));
    }
    // Others of this machine read what this rank has written.
    group.tagged("snapshot brought").barrier()?.wait()?;
    Ok(shares)
}

/// Brings a share to the machines that lack it. Collective. What cannot be read or written is missing there, which its checksums tell.
fn pass(group: &mut Group, slots: &Slots, of_rank: usize, route: &Route) -> Result<()> {
    let Route { sender, receivers, entry } = route;
    let rank = group.rank();
    let spot = Spot::Kept { place: slots.place(), slot: entry.slot };
    let mut buffer = Vec::new();
    let mut trouble = Ok(());
    for start in (0..entry.bytes).step_by(CHUNK_BYTES) {
        let length = usize::try_from(entry.bytes - start).unwrap_or(CHUNK_BYTES);
        buffer.resize(length.min(CHUNK_BYTES), 0);
        if rank == *sender {
            trouble = trouble.and(slots.read(spot, start, &mut buffer));
        }
        group.tagged("share of a snapshot").broadcast(&mut buffer[..], *sender)?.wait()?;
        if receivers.contains(&rank) {
            trouble = trouble.and(slots.admit(of_rank, start, &buffer));
        }
    }
    if let Err(error) = trouble {
        tracing::warn!(%error, of_rank, "a share of a snapshot cannot be brought");
    }
    Ok(())
}
