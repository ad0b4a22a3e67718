//! The flight recorder: the last operations of this process, in memory that outlives it.
//!
//! Our launcher makes the memory (a memfd that it keeps) and names it in `PHALANX_FLIGHT_RECORDER`, so
//! that it can be read after `kill -9`. The variable may also name a folder, where each process then
//! keeps `flight-<host>-<pid>`; without it the record lives in the process, for
//! [`Group::flight_record`](crate::Group::flight_record).
//!
//! Cost: a start is a fetch-add, a coarse clock and two cache lines; an end is one word, and the clock
//! for operations that are not small.
//!
//! | file | what |
//! |---|---|
//! | `ring` | the memory, written with plain atomic stores |
//! | `record` | pure: reading it |
//! | `lineup` | pure: several ranks' records side by side |
//! | `together` | errors that all ranks have at once |
//! | `vitals` | the words by which a rank and its launcher know of each other while the rank runs |

mod advice;
mod lineup;
mod record;
mod ring;
mod together;
mod vitals;

use std::fs::{File, OpenOptions};
use std::os::fd::{AsFd, OwnedFd};
use std::panic::Location;
use std::path::Path;
use std::sync::OnceLock;

pub use lineup::{lineup, summary};
pub use record::{FlightRecord, Operation, OperationState, RecordedFailure};
pub use together::{fail_together, take_shared_error, tell_shared_error};
pub use vitals::{
    ask_to_stop, call_back, committing, has_lost_another, is_called_back, is_committing, progress,
    renew, role, should_stop, Committing, Vitals,
};

use rustix::fs::{Mode, OFlags};

use crate::error::Error;
use crate::fingerprint::RECORD_BYTES;
use ring::Ring;

/// The group of all ranks, in [`Operation::group`].
pub const WORLD: u64 = 0;

static RING: OnceLock<Option<Ring>> = OnceLock::new();

/// Memory for a process's record, as the launcher makes it: the process opens it through
/// `/proc/<launcher>/fd/<number>`.
///
/// # Errors
///
/// The system has no memory or no file descriptors left.
pub fn memory() -> std::io::Result<File> {
    match crate::memory::mapping::create("phalanx-flight", record::BYTES) {
        Ok((fd, _)) => Ok(File::from(fd)),
        // A sandbox may refuse memory without a name: a file without one does as well.
        Err(error) => nameless_file(&std::env::temp_dir()).map_err(|_also| error),
    }
}

fn nameless_file(folder: &Path) -> std::io::Result<File> {
    let flags = OFlags::RDWR | OFlags::CLOEXEC | OFlags::TMPFILE;
    let fd = rustix::fs::open(folder, flags, Mode::RUSR | Mode::WUSR)?;
    rustix::fs::ftruncate(&fd, record::BYTES as u64)?;
    Ok(File::from(fd))
}

/// Opens this process's record, once. A record that cannot be kept where it was asked for is kept in
/// the process: no job ends over that.
fn ring() -> Option<&'static Ring> {
    let open = || {
        let place = crate::environment::flight_recorder();
        let kept = place.as_deref().map(|place| {
            Ring::open(file(place)?, true).inspect_err(|error| {
                tracing::warn!(place = %place.display(), %error, "operations are recorded in this process only");
            })
        });
        if let Some(Ok(ring)) = kept {
            return Some(ring);
        }
        let ring = memory().and_then(|file| Ring::open(OwnedFd::from(file), false));
        ring.inspect_err(|error| tracing::warn!(%error, "operations are not recorded")).ok()
    };
    RING.get_or_init(open).as_ref()
}

/// The file that `place` names: itself, or a new one in that folder.
fn file(place: &Path) -> std::io::Result<OwnedFd> {
    if !place.is_dir() {
        return Ok(OpenOptions::new().read(true).write(true).open(place)?.into());
    }
    // Machines may share the folder, and process ids are each machine's own.
    let host = rustix::system::uname().nodename().to_string_lossy().into_owned();
    let path = place.join(format!("flight-{host}-{}", std::process::id()));
    let file = OpenOptions::new().read(true).write(true).create(true).truncate(true).open(path)?;
    // Allocated now: a full disk would be a SIGBUS later.
    let flags = rustix::fs::FallocateFlags::empty();
    rustix::fs::fallocate(&file, flags, 0, record::BYTES as u64)?;
    Ok(file.into())
}

/// Whether this process's record can be read when the process has ended.
pub(crate) fn is_kept() -> bool {
    RING.get().and_then(Option::as_ref).is_some_and(Ring::outlives_process)
}

/// A group as the recorder knows it.
#[derive(Debug, Clone)]
pub(crate) struct GroupPart {
    /// The group, in a word that its ranks agree on.
    pub(crate) group: u64,
    /// Its ranks, in its order, by their numbers in the group of all ranks.
    pub(crate) ranks: Vec<usize>,
}

impl GroupPart {
    /// The group of all ranks.
    pub(crate) fn whole(world_size: usize) -> Self {
        Self { group: WORLD, ranks: (0..world_size).collect() }
    }

    /// What an error of this group says to readers who know the ranks by their numbers in the group of all.
    fn quote(&self, error: &Error) -> String {
        if self.ranks.iter().copied().eq(0..self.ranks.len()) {
            return error.to_string();
        }
        let ranks = lineup::ranks_text(&self.ranks);
        format!("in the group of {ranks}, where they are numbered from 0: {error}")
    }
}

/// Says which rank this process is.
pub(crate) fn begin(rank: usize, world_size: usize) {
    if let Some(ring) = ring() {
        ring.identify(rank, world_size);
    }
}

/// An operation that was recorded; nothing when it was not.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct RecorderEntry(Option<u64>);

impl RecorderEntry {
    /// Records that `rank` starts an operation of `group`.
    #[inline]
    pub(crate) fn start(
        record: &[u8; RECORD_BYTES],
        group: u64,
        rank: usize,
        site: &'static Location<'static>,
    ) -> Self {
        let ring = RING.get().and_then(Option::as_ref);
        Self(ring.map(|ring| ring.start(record, group, rank, site)))
    }

    /// Records its end and when that was.
    pub(crate) fn end(self, well: bool) {
        self.end_at(well, ring::now_ns());
    }

    /// As [`RecorderEntry::end`] without a look at the clock, for operations that take hardly longer.
    #[inline]
    pub(crate) fn end_soon(self, well: bool) {
        self.end_at(well, 0);
    }

    #[inline]
    fn end_at(self, well: bool, at_ns: u64) {
        if let (Some(index), Some(Some(ring))) = (self.0, RING.get()) {
            ring.end(index, well, at_ns);
        }
    }
}

/// Records the first failure of a group, with ranks as they are numbered in the group of all.
pub(crate) fn failed(error: &Error, part: &GroupPart) {
    if let Some(Some(ring)) = RING.get() {
        let blamed = error.blamed().and_then(|rank| part.ranks.get(rank).copied());
        ring.fail(&part.quote(error), part.group, blamed);
    }
}

/// What this process has recorded.
pub(crate) fn own() -> Option<FlightRecord> {
    FlightRecord::decode(&ring()?.bytes())
}

impl FlightRecord {
    /// Reads the record that [`memory`] or a folder's file holds. `None`: nothing was recorded.
    ///
    /// # Errors
    ///
    /// The file cannot be read.
    pub fn read(file: impl AsFd) -> std::io::Result<Option<Self>> {
        let mut bytes = vec![0; record::BYTES];
        let mut have = 0;
        while have < bytes.len() {
            match rustix::io::pread(&file, &mut bytes[have..], have as u64)? {
                0 => return Ok(None),
                count => have += count,
            }
        }
        Ok(Self::decode(&bytes))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_of_a_part_says_whose_numbers_it_has() {
        let error = Error::Aborted { rank: 1, reason: "enough".to_owned() };
        let quoted = |ranks: &[usize]| GroupPart { group: 7, ranks: ranks.to_vec() }.quote(&error);
        assert_eq!(quoted(&[0, 1, 2]), error.to_string());
        let expected =
            format!("in the group of ranks 0,2, where they are numbered from 0: {error}");
        assert_eq!(quoted(&[0, 2]), expected);
    }
}
