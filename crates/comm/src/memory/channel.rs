//! A channel: memory of two ranks of a machine, through which one sends the other messages.
//!
//! A message lies in it in pieces, each in an *area*; the sender copies in, the receiver copies out, and nothing else touches the
//! bytes. Pieces are counted through: `published` are written, `consumed` are read, and no more than [`PIECES`] are between the two.
//! Which area has a piece is the sender's choice, and it takes the one that was freed last: the processor has that one in its caches, and
//! memory that was never needed at once is never touched.
//!
//! | offset | what | written by |
//! |---|---|---|
//! | 0 | `published` | the sender |
//! | 64 | `wanted`: pieces that the sender waits for to be read | the sender |
//! | 128, 192 | what the receiver sleeps on | both |
//! | 256 | `consumed` | the receiver |
//! | 320, 384 | what the sender sleeps on | both |
//! | 4096 | heads of pieces: three words, and the call's record before a message's first piece | the sender |
//! | after | areas | the sender |
#![expect(unsafe_code, reason = "typed views of shared memory")]

use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use super::mapping::{self, Mapping};
use super::signal::Signal;
use crate::fingerprint::{CallRecord, RECORD_BYTES};

/// Pieces that may lie in a channel.
pub(crate) const PIECES: usize = 256;
/// A long message is read while the rest of it is written; a piece takes about 10 µs to copy, many times what it takes to tell of it.
pub(crate) const PIECE_BYTES: usize = 128 << 10;

const PUBLISHED_AT: usize = 0;
const WANTED_AT: usize = 64;
const TOLD_AT: usize = 128;
const CONSUMED_AT: usize = 256;
const FREED_AT: usize = 320;
const LINE: usize = 64;
const HEADS_AT: usize = 4096;
const RECORD_AT: usize = 24;
const HEAD_STRIDE: usize = 128;
const AREAS_AT: usize = (HEADS_AT + PIECES * HEAD_STRIDE).next_multiple_of(mapping::PAGE_BYTES);
pub(crate) const CHANNEL_BYTES: usize = AREAS_AT + PIECES * PIECE_BYTES;
const _: () = assert!(RECORD_AT + RECORD_BYTES <= HEAD_STRIDE);

/// What a piece's head says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Piece {
    /// The message's number among those of this sender to this receiver.
    pub(crate) index: u64,
    /// Where it lies.
    pub(crate) area: usize,
    pub(crate) bytes: usize,
    /// The message's last one.
    pub(crate) is_last: bool,
}

/// A channel, mapped here.
#[derive(Debug)]
pub(crate) struct Channel {
    mapping: Mapping,
}

impl Channel {
    /// The sender's.
    pub(crate) fn create() -> std::io::Result<(OwnedFd, Self)> {
        let (fd, mapping) = mapping::create("phalanx-channel", CHANNEL_BYTES)?;
        Ok((fd, Self { mapping }))
    }

    /// The receiver's.
    pub(crate) fn open(fd: BorrowedFd<'_>) -> std::io::Result<Self> {
        Ok(Self { mapping: mapping::open(fd, CHANNEL_BYTES)? })
    }

    fn at(&self, offset: usize) -> *mut u8 {
        debug_assert!(offset < CHANNEL_BYTES);
        // SAFETY: every caller's offset is one of the layout above, inside the mapping.
        unsafe { self.mapping.base().add(offset) }
    }

    fn word(&self, offset: usize) -> &AtomicU64 {
        // SAFETY: offsets of words are multiples of 8 inside the mapping, which lives as long as
        // self, and both processes access these words atomically only.
        unsafe { AtomicU64::from_ptr(self.at(offset).cast()) }
    }

    fn signal(&self, offset: usize) -> Signal<'_> {
        // SAFETY: as for word, with multiples of 4.
        let half_word = |at| unsafe { AtomicU32::from_ptr(self.at(at).cast()) };
        Signal { events: half_word(offset), waiters: half_word(offset + LINE) }
    }

    /// Pieces that are written.
    pub(crate) fn published(&self) -> &AtomicU64 {
        self.word(PUBLISHED_AT)
    }

    /// Pieces that are read.
    pub(crate) fn consumed(&self) -> &AtomicU64 {
        self.word(CONSUMED_AT)
    }

    /// Pieces that the sender waits for to be read.
    pub(crate) fn wanted(&self) -> &AtomicU64 {
        self.word(WANTED_AT)
    }

    /// What is announced when pieces are written.
    pub(crate) fn told(&self) -> Signal<'_> {
        self.signal(TOLD_AT)
    }

    /// What is announced when pieces are read.
    pub(crate) fn freed(&self) -> Signal<'_> {
        self.signal(FREED_AT)
    }

    fn head_at(number: u64) -> usize {
        let place = usize::try_from(number % PIECES as u64).unwrap_or(0);
        HEADS_AT + place * HEAD_STRIDE
    }

    /// Writes piece `number`; before the message's first one its record. Sender only, and not before piece `number - PIECES` and the
    /// one that was in this area are read.
    pub(crate) fn write(
        &self,
        number: u64,
        piece: &Piece,
        record: Option<&[u8; RECORD_BYTES]>,
        bytes: &[u8],
    ) {
        assert!(piece.area < PIECES && bytes.len() <= PIECE_BYTES && bytes.len() == piece.bytes);
        let head = Self::head_at(number);
        mapping::copy(bytes.as_ptr(), self.area(piece.area), bytes.len());
        if let Some(record) = record {
            mapping::copy(record.as_ptr(), self.at(head + RECORD_AT), RECORD_BYTES);
        }
        let place =
            (piece.area as u64) << 32 | (piece.bytes as u64) << 1 | u64::from(piece.is_last);
        self.word(head).store(piece.index, Ordering::Relaxed);
        self.word(head + 8).store(place, Ordering::Relaxed);
        self.told().announce(self.published(), number + 1);
    }

    /// Piece `number`, which is published. `None` for what no sender writes.
    pub(crate) fn piece(&self, number: u64) -> Option<Piece> {
        let head = Self::head_at(number);
        let place = self.word(head + 8).load(Ordering::Relaxed);
        let piece = Piece {
            index: self.word(head).load(Ordering::Relaxed),
            area: usize::try_from(place >> 32).ok()?,
            bytes: usize::try_from((place & u64::from(u32::MAX)) >> 1).ok()?,
            is_last: place & 1 == 1,
        };
        (piece.area < PIECES && piece.bytes <= PIECE_BYTES).then_some(piece)
    }

    /// The record before piece `number`, its message's first one.
    pub(crate) fn record(&self, number: u64) -> Option<CallRecord> {
        let mut bytes = [0; RECORD_BYTES];
        let from = self.at(Self::head_at(number) + RECORD_AT);
        mapping::copy(from, bytes.as_mut_ptr(), RECORD_BYTES);
        CallRecord::decode(&bytes)
    }

    /// Copies a piece out. Receiver only.
    pub(crate) fn read(&self, piece: &Piece, into: &mut [u8]) {
        assert!(piece.area < PIECES && into.len() <= PIECE_BYTES && into.len() == piece.bytes);
        mapping::copy(self.area(piece.area), into.as_mut_ptr(), into.len());
    }

    fn area(&self, area: usize) -> *mut u8 {
        self.at(AREAS_AT + area * PIECE_BYTES)
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use super::*;
    use crate::dtype::DType;
    use crate::fingerprint::Op;

    #[test]
    fn what_is_written_on_one_side_is_read_on_the_other() {
        let (fd, ours) = Channel::create().unwrap();
        let theirs = Channel::open(fd.as_fd()).unwrap();
        let record = CallRecord {
            op: Op::Send,
            seq: 7,
            dtype: Some(DType::U8),
            len: 3,
            reduction: "",
            root: Some(1),
            tag: "x".to_owned(),
        };
        // Round the heads twice, with whole pieces and short ones in turns; the last area's last byte too.
        let fills = (0..=250_u8).cycle();
        for (at, fill) in (0..2 * PIECES).zip(fills) {
            let (is_first, number, area) = (at % 2 == 0, at as u64, PIECES - 1 - at % PIECES);
            let bytes = if is_first { PIECE_BYTES } else { at % 5 };
            let piece = Piece { index: number / 2, area, bytes, is_last: !is_first };
            let first = is_first.then(|| record.encode());
            ours.write(number, &piece, first.as_ref(), &vec![fill; bytes]);
            assert_eq!(theirs.published().load(Ordering::Acquire), number + 1);
            assert_eq!(theirs.piece(number), Some(piece));
            let mut into = vec![0; bytes];
            theirs.read(&piece, &mut into);
            assert!(into.iter().all(|byte| *byte == fill));
            if is_first {
                assert_eq!(theirs.record(number), Some(record.clone()));
            }
        }
    }

    #[test]
    fn garbage_is_no_piece() {
        let (_fd, channel) = Channel::create().unwrap();
        for place in [u64::MAX, (PIECES as u64) << 32, (PIECE_BYTES as u64 + 1) << 1] {
            channel.word(HEADS_AT + 8).store(place, Ordering::Relaxed);
            assert_eq!(channel.piece(0), None);
        }
    }
}
