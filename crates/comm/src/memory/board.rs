//! The board: a page of words, a ring of slots and a staging area that each rank owns and every
//! rank of its machine maps.
//!
//! The owner writes; peers read (and count themselves among the `waiters`). Each collective has the
//! slot `seq mod SLOTS`: its header says what was called and where the data is; small data lies in
//! the slot itself. A slot is written again once every rank of the machine has `consumed` the
//! collective that it held.
//!
//! | offset | what |
//! |---|---|
//! | 0 | `phase`: how far the owner's executor is, as `seq << 24 \| step` |
//! | 128 | `consumed`: collectives the owner has finished, in order |
//! | 256 | `events`: the futex that waiters sleep on |
//! | 384 | `waiters`: how many sleep on it |
//! | 4096 | slots: a line of header, the inline payload, the call's record |
//! | after | staging |
#![expect(unsafe_code, reason = "typed views of shared memory")]

use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use super::mapping::{self, Mapping};
use super::signal::Signal;
use crate::fingerprint::{CallRecord, RECORD_BYTES};

/// Collectives that may be under way before a start has to queue.
pub(crate) const SLOTS: u64 = 16;
/// Data up to this size travels in the slot.
pub(crate) const INLINE_BYTES_MAX: usize = 8192;
/// What a rank stages of an unregistered buffer at a time.
pub(crate) const STAGING_BYTES: usize = 1 << 20;

const LINE: usize = 64;
const PHASE_AT: usize = 0;
const CONSUMED_AT: usize = 128;
const EVENTS_AT: usize = 256;
const WAITERS_AT: usize = 384;
const SLOTS_AT: usize = 4096;
const RECORD_AT: usize = LINE + INLINE_BYTES_MAX;
const SLOT_STRIDE: usize = RECORD_AT + 128;
const STAGING_AT: usize =
    (SLOTS_AT + SLOTS_COUNT * SLOT_STRIDE).next_multiple_of(mapping::PAGE_BYTES);
const BOARD_BYTES: usize = STAGING_AT + STAGING_BYTES;
const SLOTS_COUNT: usize = 16;
const _: () = assert!(SLOTS_COUNT as u64 == SLOTS && RECORD_BYTES <= 128);

/// What a slot's header says beside its sequence number.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct SlotHeader {
    pub(crate) fingerprint: u64,
    pub(crate) payload_bytes: u64,
    /// The region the data is in, or 0 when it has to be staged.
    pub(crate) region: u64,
    /// Where in the region.
    pub(crate) offset: u64,
}

/// One rank's board, mapped here.
#[derive(Debug)]
pub(crate) struct Board {
    mapping: Mapping,
}

impl Board {
    pub(crate) fn create() -> std::io::Result<(OwnedFd, Self)> {
        let (fd, mapping) = mapping::create("phalanx-board", BOARD_BYTES)?;
        Ok((fd, Self { mapping }))
    }

    /// Of a rank with which nobody shares memory.
    pub(crate) fn private() -> std::io::Result<Self> {
        Ok(Self { mapping: mapping::private(BOARD_BYTES)? })
    }

    pub(crate) fn open(fd: BorrowedFd<'_>) -> std::io::Result<Self> {
        Ok(Self { mapping: mapping::open(fd, BOARD_BYTES)? })
    }

    fn at(&self, offset: usize) -> *mut u8 {
        debug_assert!(offset < BOARD_BYTES);
        // SAFETY: every caller's offset is a constant of the layout above, inside the mapping.
        unsafe { self.mapping.base().add(offset) }
    }

    fn word(&self, offset: usize) -> &AtomicU64 {
        // SAFETY: offsets of words are multiples of 8 inside the mapping, which lives as long as
        // self, and all processes access these words atomically only.
        unsafe { AtomicU64::from_ptr(self.at(offset).cast()) }
    }

    fn half_word(&self, offset: usize) -> &AtomicU32 {
        // SAFETY: as for word, with multiples of 4.
        unsafe { AtomicU32::from_ptr(self.at(offset).cast()) }
    }

    pub(crate) fn phase(&self) -> &AtomicU64 {
        self.word(PHASE_AT)
    }

    pub(crate) fn consumed(&self) -> &AtomicU64 {
        self.word(CONSUMED_AT)
    }

    fn slot(seq: u64) -> usize {
        let index = usize::try_from(seq % SLOTS).unwrap_or(0);
        SLOTS_AT + index * SLOT_STRIDE
    }

    /// The word that becomes `seq + 1` when the owner has published collective `seq`.
    pub(crate) fn published(&self, seq: u64) -> &AtomicU64 {
        self.word(Self::slot(seq))
    }

    pub(crate) fn header(&self, seq: u64) -> SlotHeader {
        let slot = Self::slot(seq);
        let word = |index: usize| self.word(slot + index * 8).load(Ordering::Relaxed);
        SlotHeader {
            fingerprint: word(1),
            payload_bytes: word(2),
            region: word(3),
            offset: word(4),
        }
    }

    /// Writes the header and, last, the published word: at once, because peers that watch the word
    /// take the line away between two writes.
    pub(crate) fn publish(&self, seq: u64, header: &SlotHeader) {
        let slot = Self::slot(seq);
        let words = [header.fingerprint, header.payload_bytes, header.region, header.offset];
        for (index, word) in words.into_iter().enumerate() {
            self.word(slot + (index + 1) * 8).store(word, Ordering::Relaxed);
        }
        self.announce_lazily(self.published(seq), seq + 1);
    }

    /// Writes the call's record into its slot, before it is published.
    pub(crate) fn write_record(&self, seq: u64, record: &[u8; RECORD_BYTES]) {
        let to = self.at(Self::slot(seq) + RECORD_AT);
        // SAFETY: the record area of a slot has 128 bytes, of which RECORD_BYTES are written; only
        // the owner writes it, and peers read it after the published word.
        unsafe { std::ptr::copy_nonoverlapping(record.as_ptr(), to, RECORD_BYTES) };
    }

    pub(crate) fn record(&self, seq: u64) -> Option<CallRecord> {
        let mut bytes = [0; RECORD_BYTES];
        let from = self.at(Self::slot(seq) + RECORD_AT);
        // SAFETY: the record area lies inside the mapping. A torn read (a peer that is already
        // further) gives bytes that decode checks.
        unsafe { std::ptr::copy_nonoverlapping(from, bytes.as_mut_ptr(), RECORD_BYTES) };
        CallRecord::decode(&bytes)
    }

    /// The newest collective that the owner has published.
    pub(crate) fn last_record(&self) -> Option<CallRecord> {
        let newest = (0..SLOTS).map(|slot| self.published(slot).load(Ordering::Acquire)).max()?;
        self.record(newest.checked_sub(1)?)
    }

    /// Where the inline data of collective `seq` lies: `INLINE_BYTES_MAX` bytes.
    pub(crate) fn payload(&self, seq: u64) -> *mut u8 {
        self.at(Self::slot(seq) + LINE)
    }

    /// The staging area: `STAGING_BYTES` bytes.
    pub(crate) fn staging(&self) -> *mut u8 {
        self.at(STAGING_AT)
    }

    fn signal(&self) -> Signal<'_> {
        Signal { events: self.half_word(EVENTS_AT), waiters: self.half_word(WAITERS_AT) }
    }

    /// As [`Signal::announce_lazily`]. Owner only.
    pub(crate) fn announce_lazily(&self, word: &AtomicU64, value: u64) {
        self.signal().announce_lazily(word, value);
    }

    /// Stores `value` and wakes those who sleep on this board. Owner only.
    pub(crate) fn announce(&self, word: &AtomicU64, value: u64) {
        self.signal().announce(word, value);
    }

    /// Sleeps until the owner announces something, at most `limit`, unless `word` has reached
    /// `at_least` already. May return early.
    pub(crate) fn sleep(&self, word: &AtomicU64, at_least: u64, limit: std::time::Duration) {
        self.signal().sleep(word, at_least, limit);
    }
}
