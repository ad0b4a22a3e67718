//! The memory of a record, mapped: words that are stored atomically, so that a reader in another
//! process sees whole words at any time, and after any death.
#![expect(unsafe_code, reason = "a view of mapped memory as atomic words")]

use std::os::fd::AsFd;
use std::panic::Location;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use rustix::time::{clock_gettime, ClockId};

use super::record::{
    BLAMED_AT, BYTES, CALL, COMMITTING_AT, ENDED, ENDED_BADLY, ENDED_WELL, ENTRIES, ENTRIES_AT,
    ENTRY_WORDS, FAILED_AT, FAILED_GROUP_AT, GROUP, HEEDS_AT, MAGIC, MAGIC_AT, NEXT_AT, PID_AT,
    PLACE, PROGRESS_AT, RANK_AT, ROLE_AT, ROLE_BYTES_MAX, ROLE_LEN_AT, SITES, SITES_AT,
    SITE_BYTES_MAX, SITE_WORDS, STAMP, STARTED, STOP_AT, TEXT_AT, TEXT_BYTES_MAX, TEXT_LEN_AT,
    WORDS, WORLD_SIZE_AT,
};
use crate::fingerprint::RECORD_BYTES;
use crate::memory::mapping::{self, Mapping};

/// Sites that collide look at so many places.
const PROBES: usize = 8;

/// A record that is being written.
#[derive(Debug)]
pub(super) struct Ring {
    mapping: Mapping,
    outlives_process: bool,
    /// The addresses of the sites that the memory has; those are constants of the program.
    sites: Box<[AtomicUsize; SITES]>,
}

/// The machine's clock, to a few milliseconds: a precise one would take as long as the rest.
pub(super) fn now_ns() -> u64 {
    let time = clock_gettime(ClockId::MonotonicCoarse);
    let seconds = u64::try_from(time.tv_sec).unwrap_or(0);
    seconds.wrapping_mul(1_000_000_000).wrapping_add(u64::try_from(time.tv_nsec).unwrap_or(0))
}

impl Ring {
    /// Maps the memory of `fd`, which somebody else holds as well if it `outlives_process`.
    pub(super) fn open(fd: impl AsFd, outlives_process: bool) -> std::io::Result<Self> {
        let mapping = mapping::open(fd.as_fd(), BYTES)?;
        let sites = Box::new([const { AtomicUsize::new(0) }; SITES]);
        let ring = Self { mapping, outlives_process, sites };
        // Every page is there before the first operation needs it.
        for page in ring.words().chunks(512) {
            page[0].fetch_add(0, Ordering::Relaxed);
        }
        ring.words()[PID_AT].store(std::process::id().into(), Ordering::Relaxed);
        Ok(ring)
    }

    pub(super) const fn outlives_process(&self) -> bool {
        self.outlives_process
    }

    fn words(&self) -> &[AtomicU64] {
        let base = self.mapping.base().cast_const().cast();
        // SAFETY: the mapping has BYTES bytes, begins at a page, and lives as long as self; all
        // processes access its words atomically or through the kernel.
        unsafe { std::slice::from_raw_parts(base, WORDS) }
    }

    pub(super) fn bytes(&self) -> Vec<u8> {
        self.words().iter().flat_map(|word| word.load(Ordering::Acquire).to_le_bytes()).collect()
    }

    pub(super) fn identify(&self, rank: usize, world_size: usize) {
        let words = self.words();
        words[RANK_AT].store(rank as u64, Ordering::Relaxed);
        words[WORLD_SIZE_AT].store(world_size as u64, Ordering::Relaxed);
        words[MAGIC_AT].store(MAGIC, Ordering::Release);
    }

    pub(super) fn start(
        &self,
        record: &[u8; RECORD_BYTES],
        group: u64,
        rank: usize,
        site: &'static Location<'static>,
    ) -> u64 {
        let words = self.words();
        let index = words[NEXT_AT].fetch_add(1, Ordering::Relaxed);
        let entry = entry(words, index);
        entry[STAMP].store(0, Ordering::Relaxed);
        entry[STARTED].store(now_ns(), Ordering::Relaxed);
        entry[ENDED].store(0, Ordering::Relaxed);
        let place = (rank as u64) << 32 | self.site(site);
        entry[PLACE].store(place, Ordering::Relaxed);
        entry[GROUP].store(group, Ordering::Relaxed);
        for (word, bytes) in entry[CALL..].iter().zip(record.as_chunks::<8>().0) {
            word.store(u64::from_le_bytes(*bytes), Ordering::Relaxed);
        }
        entry[STAMP].store(index + 1, Ordering::Release);
        index
    }

    pub(super) fn end(&self, index: u64, well: bool, at_ns: u64) {
        let entry = entry(self.words(), index);
        // An entry that another operation has taken meanwhile is not ours to change.
        if entry[STAMP].load(Ordering::Relaxed) == index + 1 {
            let outcome = if well { ENDED_WELL } else { ENDED_BADLY };
            entry[ENDED].store(at_ns & !3 | outcome, Ordering::Relaxed);
        }
    }

    pub(super) fn fail(&self, text: &str, group: u64, blamed: Option<usize>) {
        let words = self.words();
        let now = now_ns().max(1);
        if words[FAILED_AT].load(Ordering::Relaxed) != 0 {
            return;
        }
        let length = text.floor_char_boundary(TEXT_BYTES_MAX);
        store_bytes(&words[TEXT_AT..], &text.as_bytes()[..length]);
        words[TEXT_LEN_AT].store(length as u64, Ordering::Relaxed);
        words[FAILED_GROUP_AT].store(group, Ordering::Relaxed);
        words[BLAMED_AT].store(blamed.map_or(0, |rank| rank as u64 + 1), Ordering::Relaxed);
        words[FAILED_AT].store(now, Ordering::Release);
    }

    pub(super) fn progress(&self, step: u64) {
        self.words()[PROGRESS_AT].store(step.saturating_add(1), Ordering::Relaxed);
    }

    pub(super) fn role(&self, text: &str) {
        let words = self.words();
        let length = text.floor_char_boundary(ROLE_BYTES_MAX);
        words[ROLE_LEN_AT].store(0, Ordering::Relaxed);
        store_bytes(&words[ROLE_AT..], &text.as_bytes()[..length]);
        words[ROLE_LEN_AT].store(length as u64, Ordering::Release);
    }

    /// One thread more (or, if it `ends`, less) that should not be cut off.
    pub(super) fn commit(&self, ends: bool) {
        let word = &self.words()[COMMITTING_AT];
        if ends {
            word.fetch_sub(1, Ordering::Release);
        } else {
            word.fetch_add(1, Ordering::Release);
        }
    }

    pub(super) fn is_committing(&self) -> bool {
        self.words()[COMMITTING_AT].load(Ordering::Acquire) != 0
    }

    pub(super) fn is_asked_to_stop(&self) -> bool {
        let words = self.words();
        words[HEEDS_AT].store(1, Ordering::Relaxed);
        words[STOP_AT].load(Ordering::Relaxed) != 0
    }

    /// What the launcher asks for.
    pub(super) fn asked(&self) -> u64 {
        self.words()[STOP_AT].load(Ordering::Relaxed)
    }

    pub(super) fn has_lost_another(&self) -> bool {
        let words = self.words();
        let has_failed = words[FAILED_AT].load(Ordering::Acquire) != 0;
        let blamed = words[BLAMED_AT].load(Ordering::Relaxed).checked_sub(1);
        let is_another = |rank| rank != words[RANK_AT].load(Ordering::Relaxed);
        has_failed && blamed.is_some_and(is_another)
    }

    /// The number of a call site, from 1; 0 when there is no room for another.
    fn site(&self, site: &'static Location<'static>) -> u64 {
        let address = std::ptr::from_ref(site).addr();
        let first = (address >> 3) % SITES;
        for probe in 0..PROBES {
            let at = (first + probe) % SITES;
            let known = self.sites[at].load(Ordering::Relaxed);
            if known == address {
                return at as u64 + 1;
            }
            if known == 0 {
                let taken = self.sites[at].compare_exchange(
                    0,
                    address,
                    Ordering::Relaxed,
                    Ordering::Relaxed,
                );
                match taken {
                    Ok(_) => return self.write_site(at, site),
                    Err(theirs) if theirs == address => return at as u64 + 1,
                    Err(_) => {}
                }
            }
        }
        0
    }

    #[cold]
    fn write_site(&self, at: usize, site: &'static Location<'static>) -> u64 {
        let words = &self.words()[SITES_AT + at * SITE_WORDS..][..SITE_WORDS];
        // The end of a path says more than its beginning.
        let file = site.file();
        let file = &file[file.ceil_char_boundary(file.len().saturating_sub(SITE_BYTES_MAX))..];
        store_bytes(&words[1..], file.as_bytes());
        let head = u64::from(site.line()) << 32 | file.len() as u64;
        words[0].store(head, Ordering::Release);
        at as u64 + 1
    }
}

fn entry(words: &[AtomicU64], index: u64) -> &[AtomicU64] {
    let at = usize::try_from(index % ENTRIES as u64).unwrap_or(0);
    &words[ENTRIES_AT + at * ENTRY_WORDS..][..ENTRY_WORDS]
}

/// Stores bytes as little-endian words, the last one filled up with zeros.
fn store_bytes(words: &[AtomicU64], bytes: &[u8]) {
    for (word, chunk) in words.iter().zip(bytes.chunks(8)) {
        let mut whole = [0; 8];
        whole[..chunk.len()].copy_from_slice(chunk);
        word.store(u64::from_le_bytes(whole), Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dtype::DType;
    use crate::fingerprint::{CallRecord, Op};
    use crate::recorder::{FlightRecord, OperationState};

    fn record(seq: u64) -> CallRecord {
        CallRecord {
            op: Op::AllReduce,
            seq,
            dtype: Some(DType::F32),
            len: 256,
            reduction: "avg",
            root: None,
            tag: "bucket 3".to_owned(),
        }
    }

    fn ring() -> Ring {
        let ring = Ring::open(crate::recorder::memory().unwrap(), true).unwrap();
        ring.identify(2, 4);
        ring
    }

    fn read(ring: &Ring) -> FlightRecord {
        FlightRecord::decode(&ring.bytes()).unwrap()
    }

    #[test]
    fn operations_are_read_back_with_their_call_sites() {
        let ring = ring();
        let here = Location::caller();
        let first = ring.start(&record(0).encode(), 7, 2, here);
        ring.start(&record(1).encode(), 7, 2, here);
        let third = ring.start(&record(2).encode(), 7, 2, here);
        ring.end(first, true, now_ns());
        ring.end(third, false, 0);
        let back = read(&ring);
        assert_eq!((back.rank, back.world_size, back.started), (2, 4, 3));
        assert_eq!(back.pid, std::process::id());
        let calls: Vec<_> = back.operations.iter().map(|op| op.call.clone()).collect();
        assert_eq!(calls, [record(0), record(1), record(2)]);
        assert!(matches!(back.operations[0].state, OperationState::Finished(at) if at > 0));
        assert_eq!(back.operations[1].state, OperationState::Started);
        assert!(matches!(back.operations[2].state, OperationState::Failed(0)));
        let site = &back.operations[0].site;
        assert_eq!(*site, format!("{}:{}", here.file(), here.line()));
        assert!(back.operations.iter().all(|op| (op.rank, op.group) == (2, 7)));
    }

    #[test]
    fn the_last_2048_operations_are_kept_and_old_ends_change_nothing() {
        let ring = ring();
        let early = ring.start(&record(0).encode(), 0, 2, Location::caller());
        for seq in 1..5000 {
            ring.start(&record(seq).encode(), 0, 2, Location::caller());
        }
        ring.end(early, true, 0);
        let back = read(&ring);
        assert_eq!(back.started, 5000);
        let seqs: Vec<u64> = back.operations.iter().map(|op| op.call.seq).collect();
        assert!(seqs.into_iter().eq(5000 - ENTRIES as u64..5000));
        assert!(back.operations.iter().all(|op| op.state == OperationState::Started));
    }

    #[test]
    fn the_first_failure_is_kept() {
        let ring = ring();
        assert_eq!(read(&ring).failure, None);
        ring.fail("rank 1 died", 7, Some(1));
        ring.fail("rank 3 died", 0, Some(3));
        let failure = read(&ring).failure.unwrap();
        assert_eq!((&failure.text[..], failure.group), ("rank 1 died", 7));
        assert_eq!(failure.blamed, Some(1));
        let long = self::ring();
        long.fail(&"é".repeat(3000), 0, None);
        assert_eq!(read(&long).failure.unwrap().text.len(), TEXT_BYTES_MAX);
    }
}
