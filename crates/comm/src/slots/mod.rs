//! Slots for snapshots in memory that the launcher owns: they outlive a rank, and go with the launcher, whichever way it ends.
//!
//! The launcher makes one memfd for all its ranks and names it, and each rank's place in it, in `PHALANX_SNAPSHOT_MEMORY`; a
//! rank opens it through `/proc/<launcher>/fd/<number>`. The file has holes: slots start a TiB apart, and only what is written takes memory.
//!
//! ```text
//! place 0                                    place 1
//! pair 0         pair 1        …             pair 0
//! half 0  half 1 half 0  half 1              half 0 …
//! ```
//!
//! A pair is for one rank's share: the newest snapshot that counts is in one half, the next one is written to the other, and a rank that
//! dies while it writes leaves the former whole. Pair 0 is for the rank's own share, the others for those that it keeps for neighbours.
//!
//! Behind all places is room for *guests*: shares that no rank of this launcher has, while a training goes on from them. Any rank of the launcher
//! reads any slot; each writes to its own place, and one of them for all to the room for guests.
//!
//! Slots are read and written by `pread` and `pwrite`: where memory is used up, that is an error; through a mapping it would be a `SIGBUS`.

mod header;

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt as _;
use std::path::Path;

use rustix::fs::{fallocate, memfd_create, FallocateFlags, MemfdFlags};

pub use header::Stamp;
use header::{decode, encode, HEADER_BYTES, PAGE_BYTES};

/// Address space of a slot, header included.
const SLOT_BYTES: u64 = 1 << 40;
/// Pairs of a place: the rank's own and those of its neighbours.
pub const PAIRS_MAX: usize = 16;
/// Places, which is ranks of one launcher.
const PLACES_MAX: usize = 1 << 12;
/// Behind all places: room for guests.
const GUESTS_AT: u64 = PLACES_MAX as u64 * 2 * PAIRS_MAX as u64 * SLOT_BYTES;
/// As many as a snapshot may have shares.
const GUESTS_MAX: usize = 1 << 17;
/// Behind all guests: the memory's number.
const NUMBER_AT: u64 = GUESTS_AT + GUESTS_MAX as u64 * SLOT_BYTES;

/// Gives memory back.
const HOLE: FallocateFlags = FallocateFlags::PUNCH_HOLE.union(FallocateFlags::KEEP_SIZE);

/// Memory for the slots of all ranks of a launcher, still empty.
///
/// # Errors
///
/// The system has no such memory, or no file descriptors left.
pub fn memory() -> io::Result<File> {
    let memory = File::from(memfd_create("phalanx-snapshots", MemfdFlags::CLOEXEC)?);
    let number = crate::rendezvous::random_bytes::<8>().map_err(io::Error::other)?;
    memory.write_all_at(&number, NUMBER_AT)?;
    Ok(memory)
}

/// One rank's slots.
#[derive(Debug)]
pub struct Slots {
    memory: File,
    place: usize,
}

/// A snapshot that a slot holds, by its header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Kept {
    /// The slot's number in its place.
    pub slot: usize,
    /// Which snapshot it is.
    pub stamp: Stamp,
    /// Its length.
    pub bytes: u64,
}

/// Where a share lies in a launcher's memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Spot {
    /// In a slot of a rank.
    Kept {
        /// The rank's place.
        place: usize,
        /// The slot's number there.
        slot: usize,
    },
    /// Among the guests.
    Guest(usize),
}

impl Spot {
    /// Where it begins in the file.
    fn start(self) -> io::Result<u64> {
        match self {
            Self::Kept { place, slot } if place < PLACES_MAX && slot < 2 * PAIRS_MAX => {
                Ok((place * 2 * PAIRS_MAX + slot) as u64 * SLOT_BYTES)
            }
            Self::Guest(number) if number < GUESTS_MAX => {
                Ok(GUESTS_AT + number as u64 * SLOT_BYTES)
            }
            other => Err(refused(&format!("there is no {other:?}"))),
        }
    }
}

impl Slots {
    /// Those that the launcher has for this process; `None` where it has none, as every launcher but ours.
    ///
    /// # Errors
    ///
    /// What the environment names cannot be opened.
    pub fn from_environment() -> io::Result<Option<Self>> {
        let Some((path, place)) = crate::environment::snapshot_memory() else { return Ok(None) };
        Self::open(&path, place).map(Some)
    }

    /// Those of a place in the memory that `path` names.
    ///
    /// # Errors
    ///
    /// It cannot be opened, or has no such place.
    pub fn open(path: &Path, place: usize) -> io::Result<Self> {
        Self::new(OpenOptions::new().read(true).write(true).open(path)?, place)
    }

    /// Those of a place in [`memory`].
    ///
    /// # Errors
    ///
    /// It has no such place.
    pub fn new(memory: File, place: usize) -> io::Result<Self> {
        if place >= PLACES_MAX {
            return Err(refused(&format!("place {place} of {PLACES_MAX}")));
        }
        Ok(Self { memory, place })
    }

    /// All snapshots that were written to their end.
    ///
    /// # Errors
    ///
    /// The memory cannot be read.
    pub fn kept(&self) -> io::Result<Vec<Kept>> {
        let mut kept = Vec::new();
        for slot in 0..2 * PAIRS_MAX {
            if let Some((stamp, bytes)) = self.header(slot)? {
                kept.push(Kept { slot, stamp, bytes });
            }
        }
        Ok(kept)
    }

    /// This rank's place.
    #[must_use]
    pub fn place(&self) -> usize {
        self.place
    }

    /// The memory's number: ranks that see the same one have the same memory.
    ///
    /// # Errors
    ///
    /// The memory cannot be read.
    pub fn number(&self) -> io::Result<u64> {
        let mut number = [0; 8];
        self.memory.read_exact_at(&mut number, NUMBER_AT)?;
        Ok(u64::from_le_bytes(number))
    }

    /// Reads from a share, of whichever rank of this memory, from `offset` on; `out` must lie within it.
    ///
    /// # Errors
    ///
    /// The memory cannot be read.
    pub fn read(&self, spot: Spot, offset: u64, out: &mut [u8]) -> io::Result<()> {
        self.memory.read_exact_at(out, spot.start()? + PAGE_BYTES + offset)
    }

    /// Writes a part of a guest.
    ///
    /// # Errors
    ///
    /// There is no memory left, or no room for so many guests.
    pub fn admit(&self, guest: usize, offset: u64, bytes: &[u8]) -> io::Result<()> {
        let start = Spot::Guest(guest).start()? + PAGE_BYTES + offset;
        self.memory.write_all_at(bytes, start)
    }

    /// Gives back the memory of all guests; nobody may read them any more.
    ///
    /// # Errors
    ///
    /// The memory cannot be written.
    pub fn see_guests_out(&self) -> io::Result<()> {
        Ok(fallocate(&self.memory, HOLE, GUESTS_AT, NUMBER_AT - GUESTS_AT)?)
    }

    /// Begins to write a snapshot to the half of `pair` that does not hold `keep`; what that half held is lost.
    ///
    /// # Errors
    ///
    /// There is no such pair; the memory cannot be written.
    pub fn begin(&self, pair: usize, stamp: Stamp, keep: Option<Stamp>) -> io::Result<Writing<'_>> {
        if pair >= PAIRS_MAX {
            return Err(refused(&format!("pair {pair} of {PAIRS_MAX}")));
        }
        let first = self.header(2 * pair)?.map(|(in_first, _)| in_first);
        let holds_it = keep.is_some() && first == keep;
        let slot = 2 * pair + usize::from(holds_it);
        self.memory.write_all_at(&[0; HEADER_BYTES], self.start(slot))?;
        Ok(Writing { slots: self, slot, stamp, bytes: 0 })
    }

    fn header(&self, slot: usize) -> io::Result<Option<(Stamp, u64)>> {
        let mut header = [0; HEADER_BYTES];
        match self.memory.read_exact_at(&mut header, self.start(slot)) {
            Ok(()) => Ok(decode(&header)),
            // Behind everything that was ever written.
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Where a slot begins in the file.
    fn start(&self, slot: usize) -> u64 {
        (self.place * 2 * PAIRS_MAX + slot) as u64 * SLOT_BYTES
    }
}

/// For tests: what becomes of memory.
#[cfg(any(test, feature = "testing"))]
impl Slots {
    /// Loses everything, as a machine does that is switched off.
    ///
    /// # Errors
    ///
    /// The memory cannot be written.
    pub fn lose(&self) -> io::Result<()> {
        let bytes = 2 * PAIRS_MAX as u64 * SLOT_BYTES;
        Ok(fallocate(&self.memory, HOLE, self.start(0), bytes)?)
    }

    /// Changes a byte of a snapshot, at `offset`.
    ///
    /// # Errors
    ///
    /// The memory cannot be written.
    pub fn damage(&self, kept: &Kept, offset: u64) -> io::Result<()> {
        let mut byte = [0];
        let at = self.start(kept.slot) + PAGE_BYTES + offset;
        self.memory.read_exact_at(&mut byte, at)?;
        self.memory.write_all_at(&[!byte[0]], at)
    }
}

/// A snapshot on its way into its slot. Dropped before [`Writing::finish`], it was never there.
#[derive(Debug)]
#[must_use = "a snapshot that is not finished does not count"]
pub struct Writing<'a> {
    slots: &'a Slots,
    slot: usize,
    stamp: Stamp,
    bytes: u64,
}

impl Writing<'_> {
    /// Appends to it.
    ///
    /// # Errors
    ///
    /// There is no memory left; the slot is full.
    pub fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        let end = self.bytes + bytes.len() as u64;
        if end > SLOT_BYTES - PAGE_BYTES {
            return Err(refused(&format!("{end} bytes in a slot of {SLOT_BYTES}")));
        }
        let start = self.slots.start(self.slot) + PAGE_BYTES;
        self.slots.memory.write_all_at(bytes, start + self.bytes)?;
        self.bytes = end;
        Ok(())
    }

    /// It is whole.
    ///
    /// # Errors
    ///
    /// The memory cannot be written.
    pub fn finish(self) -> io::Result<()> {
        let Self { slots, slot, stamp, bytes } = self;
        let (start, used) = (slots.start(slot), PAGE_BYTES + bytes);
        // What a longer one has left behind it; where that is not possible, it stays until the next long one.
        fallocate(&slots.memory, HOLE, start + used, SLOT_BYTES - used).ok();
        slots.memory.write_all_at(&encode(stamp, bytes), start)
    }
}

fn refused(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, format!("memory for snapshots: {what}"))
}

#[cfg(test)]
mod tests;
