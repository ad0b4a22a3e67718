//! What a rank and its launcher tell each other through the record's memory while the rank runs: how far it is, whether
//! it is at something that should not be cut off, and whether it should stop.
//!
//! Each is one word, so a death in the middle of a store leaves the old value or the new one. Without a launcher of ours
//! the words are the process's own: nobody reads them, and nobody asks it to stop.

use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt as _;

use super::record::{
    BYTES, COMMITTING_AT, ENTRIES_AT, FAILED_AT, HEEDS_AT, MAGIC_AT, NEXT_AT, PID_AT, PROGRESS_AT,
    ROLE_AT, ROLE_LEN_AT, STOP_AT, VITALS_BYTES,
};

/// What the word at `STOP_AT` asks for: the end.
pub(super) const END: u64 = 1;
/// To come back for another generation.
pub(super) const COME_BACK: u64 = 2;

/// Says that this rank is at `step`: the launcher counts attempts that come no further as a crash loop, and names the
/// step when it starts the ranks again. One relaxed store.
///
/// # Example
///
/// ```
/// for step in 0..3 {
///     phalanx_comm::recorder::progress(step);
///     // forward, backward, update
/// }
/// ```
pub fn progress(step: u64) {
    if let Some(ring) = super::ring() {
        ring.progress(step);
    }
}

/// Says what this rank is in its job, its place on a mesh say: reports of a failure have it behind the rank's number. Up to 128 bytes.
///
/// # Example
///
/// ```
/// phalanx_comm::recorder::role("pp 1, tp 0"); // a report: rank 2 (pp 1, tp 0) on host … died
/// ```
pub fn role(text: &str) {
    if let Some(ring) = super::ring() {
        ring.role(text);
    }
}

/// Whether the launcher has asked this rank to stop at the next boundary between steps: nodes come or go, or the job is
/// to end. A rank that asks is not sent SIGTERM for that. One relaxed load and one store.
///
/// Ranks may see it at different steps: let one decide for all (the maximum over ranks) before a collective is left out.
#[must_use]
pub fn should_stop() -> bool {
    super::ring().is_some_and(super::Ring::is_asked_to_stop)
}

/// Whether the launcher has asked this rank to stop in order to begin again in the next generation: nodes come or go.
#[must_use]
pub fn is_called_back() -> bool {
    super::ring().is_some_and(|ring| ring.asked() == COME_BACK)
}

/// Whether this rank is at something that should not be cut off: see [`committing`].
#[must_use]
pub fn is_committing() -> bool {
    super::ring().is_some_and(super::Ring::is_committing)
}

/// Whether a group of this process has failed because of another rank.
#[must_use]
pub fn has_lost_another() -> bool {
    super::ring().is_some_and(super::Ring::has_lost_another)
}

/// Until it is dropped the launcher, when it is about to start the ranks again, gives this one the time to finish:
/// `--grace` at most.
#[must_use = "it is over when this is dropped"]
pub fn committing() -> Committing {
    if let Some(ring) = super::ring() {
        ring.commit(false);
    }
    Committing(())
}

/// A checkpoint is being committed: see [`committing`].
#[derive(Debug)]
pub struct Committing(());

impl Drop for Committing {
    fn drop(&mut self) {
        if let Some(ring) = super::ring() {
            ring.commit(true);
        }
    }
}

/// What the memory of a rank says of it, alive or dead.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
#[expect(clippy::struct_excessive_bools, reason = "independent facts, each a word of the memory")]
pub struct Vitals {
    /// The last step that it told.
    pub progress: Option<u64>,
    /// It has started an operation.
    pub has_started: bool,
    /// It was at something that should not be cut off.
    pub is_committing: bool,
    /// A group of it has failed.
    pub has_failed: bool,
    /// It looks now and then whether it should stop.
    pub heeds_stop: bool,
}

impl Vitals {
    /// Reads them from the [`memory`](super::memory) that the rank was given: one system call.
    ///
    /// # Errors
    ///
    /// The memory cannot be read.
    pub fn read(memory: impl AsFd) -> std::io::Result<Self> {
        let mut bytes = [0; VITALS_BYTES];
        rustix::io::pread(&memory, &mut bytes, 0)?;
        let word = |at: usize| {
            let word = bytes[at * 8..].first_chunk::<8>().copied();
            word.map_or(0, u64::from_le_bytes)
        };
        Ok(Self {
            progress: word(PROGRESS_AT).checked_sub(1),
            has_started: word(NEXT_AT) != 0,
            is_committing: word(COMMITTING_AT) != 0,
            has_failed: word(FAILED_AT) != 0,
            heeds_stop: word(HEEDS_AT) != 0,
        })
    }
}

/// Makes [`should_stop`] true in the rank that was given this memory.
///
/// # Errors
///
/// The memory cannot be written.
pub fn ask_to_stop(memory: &File) -> std::io::Result<()> {
    write(memory, STOP_AT, &END.to_le_bytes())
}

/// As [`ask_to_stop`], in order to begin again: [`is_called_back`] is true as well.
///
/// # Errors
///
/// The memory cannot be written.
pub fn call_back(memory: &File) -> std::io::Result<()> {
    write(memory, STOP_AT, &COME_BACK.to_le_bytes())
}

/// Forgets what a process has recorded that waits for its next generation: all but its number, the call sites, what it is
/// committing, and that it looks whether it should stop.
///
/// # Errors
///
/// The memory cannot be written.
pub fn renew(memory: &File) -> std::io::Result<()> {
    for words in
        [MAGIC_AT..PID_AT, FAILED_AT..COMMITTING_AT, STOP_AT..HEEDS_AT, ROLE_LEN_AT..ROLE_AT]
    {
        write(memory, words.start, &vec![0; words.len() * 8])?;
    }
    write(memory, ENTRIES_AT, &vec![0; BYTES - ENTRIES_AT * 8])
}

fn write(memory: &File, word: usize, bytes: &[u8]) -> std::io::Result<()> {
    memory.write_all_at(bytes, word as u64 * 8)
}

#[cfg(test)]
mod tests {
    use super::super::{memory, Ring};
    use super::*;

    #[test]
    fn what_one_side_says_the_other_side_reads() {
        let file = memory().expect("memory");
        assert_eq!(Vitals::read(&file).expect("read"), Vitals::default());
        let ring = Ring::open(&file, true).expect("mapped");
        ring.progress(0);
        ring.commit(false);
        let early = Vitals { progress: Some(0), is_committing: true, ..Vitals::default() };
        assert_eq!(Vitals::read(&file).expect("read"), early);
        ring.commit(true);
        ring.progress(120);
        ring.fail("rank 1 died", 0, Some(1));
        let late = Vitals { progress: Some(120), has_failed: true, ..Vitals::default() };
        assert_eq!(Vitals::read(&file).expect("read"), late);
        assert!(!ring.is_asked_to_stop());
        assert!(Vitals::read(&file).expect("read").heeds_stop);
        ask_to_stop(&file).expect("written");
        assert!(ring.is_asked_to_stop());
        assert_eq!(ring.asked(), END);
        call_back(&file).expect("written");
        assert!(ring.is_asked_to_stop());
        assert_eq!(ring.asked(), COME_BACK);
    }

    #[test]
    fn what_is_renewed_remembers_nothing_but_what_goes_on() {
        let file = memory().expect("memory");
        let ring = Ring::open(&file, true).expect("mapped");
        ring.identify(2, 4);
        ring.role("pp 1, tp 0");
        let told = super::super::FlightRecord::read(&file).expect("read").expect("a record").role;
        assert_eq!(told.as_deref(), Some("pp 1, tp 0"));
        assert!(!ring.has_lost_another());
        ring.fail("rank 1 died", 0, Some(1));
        assert!(ring.has_lost_another());
        ring.progress(120);
        ring.commit(false);
        call_back(&file).expect("written");
        assert!(ring.is_asked_to_stop());
        renew(&file).expect("written");
        let vitals = Vitals { is_committing: true, heeds_stop: true, ..Vitals::default() };
        assert_eq!(Vitals::read(&file).expect("read"), vitals);
        assert!(!ring.has_lost_another() && !ring.is_asked_to_stop());
        assert_eq!(super::super::FlightRecord::read(&file).expect("read"), None);
        ring.identify(1, 3);
        ring.fail("rank 1 has lost its way", 0, Some(1));
        assert!(!ring.has_lost_another(), "that is itself");
        let record = super::super::FlightRecord::read(&file).expect("read").expect("a record");
        assert_eq!((record.rank, record.started, record.pid), (1, 0, std::process::id()));
        assert_eq!(record.role, None);
    }

    #[test]
    fn a_process_without_a_launcher_is_never_asked_to_stop() {
        progress(7);
        drop(committing());
        assert!(!should_stop());
    }
}
