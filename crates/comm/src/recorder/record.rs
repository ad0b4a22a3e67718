//! Reading a record. Pure: bytes in, operations out; a process may have died in the middle of any store.
//!
//! The memory is made of little-endian 64-bit words:
//!
//! | words | what |
//! |---|---|
//! | 0 … 511 | the head: see the constants |
//! | 512 … 4607 | 256 call sites: line and length, 120 bytes of the file's name |
//! | 4608 … | 2048 operations of 16 words, written round and round |

use crate::fingerprint::{CallRecord, RECORD_BYTES};

pub(super) const MAGIC: u64 = u64::from_le_bytes(*b"phxflt\x01\0");
pub(super) const MAGIC_AT: usize = 0;
/// Operations ever started.
pub(super) const NEXT_AT: usize = 1;
pub(super) const RANK_AT: usize = 2;
pub(super) const WORLD_SIZE_AT: usize = 3;
pub(super) const PID_AT: usize = 4;
/// When the group failed, in nanoseconds of the monotonic clock; 0 for never.
pub(super) const FAILED_AT: usize = 5;
/// The rank that the failure blames, plus one.
pub(super) const BLAMED_AT: usize = 6;
pub(super) const TEXT_LEN_AT: usize = 7;
pub(super) const TEXT_AT: usize = 8;
pub(super) const TEXT_BYTES_MAX: usize = 2048;
/// The group that failed.
pub(super) const FAILED_GROUP_AT: usize = TEXT_AT + TEXT_BYTES_MAX / 8;
/// The last step that was told, plus one.
pub(super) const PROGRESS_AT: usize = FAILED_GROUP_AT + 1;
/// How many threads are at something that should not be cut off.
pub(super) const COMMITTING_AT: usize = FAILED_GROUP_AT + 2;
/// Not zero: whoever holds the memory asks the process to stop. The one word that the process does not write.
pub(super) const STOP_AT: usize = FAILED_GROUP_AT + 3;
/// Not zero: the process looks at that word now and then.
pub(super) const HEEDS_AT: usize = FAILED_GROUP_AT + 4;
/// What [`Vitals`](super::Vitals) are read from.
pub(super) const VITALS_BYTES: usize = (HEEDS_AT + 1) * 8;

/// What the rank is in its job: a length, and the text.
pub(super) const ROLE_LEN_AT: usize = HEEDS_AT + 1;
pub(super) const ROLE_AT: usize = ROLE_LEN_AT + 1;
pub(super) const ROLE_BYTES_MAX: usize = 128;

pub(super) const SITES_AT: usize = 512;
pub(super) const SITES: usize = 256;
pub(super) const SITE_WORDS: usize = 16;
pub(super) const SITE_BYTES_MAX: usize = 120;

pub(super) const ENTRIES_AT: usize = SITES_AT + SITES * SITE_WORDS;
pub(super) const ENTRIES: usize = 2048;
pub(super) const ENTRY_WORDS: usize = 16;
/// Within an entry: its index plus one, written last; when it started; when it ended, with the
/// outcome in the lowest two bits; site and rank; group; the call's record.
pub(super) const STAMP: usize = 0;
pub(super) const STARTED: usize = 1;
pub(super) const ENDED: usize = 2;
pub(super) const PLACE: usize = 3;
pub(super) const GROUP: usize = 4;
pub(super) const CALL: usize = 5;
pub(super) const ENDED_WELL: u64 = 1;
pub(super) const ENDED_BADLY: u64 = 2;
const _: () = assert!(CALL + RECORD_BYTES / 8 <= ENTRY_WORDS && RECORD_BYTES.is_multiple_of(8));
const _: () = assert!(ROLE_AT + ROLE_BYTES_MAX / 8 <= SITES_AT);

pub(super) const WORDS: usize = ENTRIES_AT + ENTRIES * ENTRY_WORDS;
pub(super) const BYTES: usize = WORDS * 8;

/// What a process has recorded.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct FlightRecord {
    /// Its rank.
    pub rank: usize,
    /// How many there are.
    pub world_size: usize,
    /// Its process.
    pub pid: u32,
    /// What it is in its job, if it has told ([`role`](super::role)).
    pub role: Option<String>,
    /// How many operations it has started; the record holds the last 2 048.
    pub started: u64,
    /// The last step that it has told ([`progress`](super::progress)).
    pub progress: Option<u64>,
    /// The first failure that a group of it had.
    pub failure: Option<RecordedFailure>,
    /// The operations, oldest first.
    pub operations: Vec<Operation>,
}

/// How a group failed, as the process saw it.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct RecordedFailure {
    /// When: nanoseconds of the machine's monotonic clock.
    pub at_ns: u64,
    /// The group that failed, as in [`Operation::group`].
    pub group: u64,
    /// The error's text.
    pub text: String,
    /// The rank that it names as the cause, by its number in the group of all ranks.
    pub blamed: Option<usize>,
}

/// One operation.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Operation {
    /// The rank that started it, by its number in the group of all ranks.
    pub rank: usize,
    /// The group: [`WORLD`](super::WORLD), or a number that its members agree on.
    pub group: u64,
    /// What was called.
    pub call: CallRecord,
    /// The line of the program that called it.
    pub site: String,
    /// When it started: nanoseconds of the machine's monotonic clock, to a few milliseconds.
    pub started_ns: u64,
    /// How far it is.
    pub state: OperationState,
}

/// How far an operation is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OperationState {
    /// Started, not ended.
    Started,
    /// Ended well, at this time; 0 where that was not noted, of small operations.
    Finished(u64),
    /// Failed, at this time; 0 likewise.
    Failed(u64),
}

impl FlightRecord {
    /// What the bytes of a record's memory or file say; `None`: they hold no record.
    #[must_use]
    pub fn decode(bytes: &[u8]) -> Option<Self> {
        let mut words = Vec::with_capacity(WORDS);
        for chunk in bytes.get(..BYTES)?.chunks_exact(8) {
            words.push(u64::from_le_bytes(chunk.try_into().ok()?));
        }
        if words[MAGIC_AT] != MAGIC {
            return None;
        }
        let mut numbered: Vec<(u64, Operation)> = words[ENTRIES_AT..]
            .chunks_exact(ENTRY_WORDS)
            .filter_map(|entry| Some((entry[STAMP], operation(entry, &words)?)))
            .collect();
        numbered.sort_unstable_by_key(|(stamp, _)| *stamp);
        let failure = (words[FAILED_AT] != 0).then(|| RecordedFailure {
            at_ns: words[FAILED_AT],
            group: words[FAILED_GROUP_AT],
            text: text(&words, TEXT_AT, words[TEXT_LEN_AT], TEXT_BYTES_MAX),
            blamed: usize::try_from(words[BLAMED_AT]).ok().and_then(|rank| rank.checked_sub(1)),
        });
        Some(Self {
            rank: usize::try_from(words[RANK_AT]).ok()?,
            world_size: usize::try_from(words[WORLD_SIZE_AT]).ok()?,
            pid: u32::try_from(words[PID_AT]).ok()?,
            role: (words[ROLE_LEN_AT] != 0)
                .then(|| text(&words, ROLE_AT, words[ROLE_LEN_AT], ROLE_BYTES_MAX)),
            started: words[NEXT_AT],
            progress: words[PROGRESS_AT].checked_sub(1),
            failure,
            operations: numbered.into_iter().map(|(_, operation)| operation).collect(),
        })
    }
}

/// `None` for an entry that was never written, or not to its end.
fn operation(entry: &[u64], words: &[u64]) -> Option<Operation> {
    if entry[STAMP] == 0 {
        return None;
    }
    let mut call = [0; RECORD_BYTES];
    for (bytes, word) in call.chunks_exact_mut(8).zip(&entry[CALL..]) {
        bytes.copy_from_slice(&word.to_le_bytes());
    }
    let (site, rank) = (entry[PLACE] & 0xffff_ffff, entry[PLACE] >> 32);
    let at = entry[ENDED] & !3;
    Some(Operation {
        rank: usize::try_from(rank).ok()?,
        group: entry[GROUP],
        call: CallRecord::decode(&call)?,
        site: site_text(words, usize::try_from(site).ok()?),
        started_ns: entry[STARTED],
        state: match entry[ENDED] & 3 {
            ENDED_WELL => OperationState::Finished(at),
            ENDED_BADLY => OperationState::Failed(at),
            _ => OperationState::Started,
        },
    })
}

/// Sites count from 1.
fn site_text(words: &[u64], site: usize) -> String {
    let Some(index) = site.checked_sub(1).filter(|index| *index < SITES) else {
        return "?".to_owned();
    };
    let at = SITES_AT + index * SITE_WORDS;
    let (line, length) = (words[at] >> 32, words[at] & 0xffff_ffff);
    format!("{}:{line}", text(words, at + 1, length, SITE_BYTES_MAX))
}

fn text(words: &[u64], at: usize, length: u64, max: usize) -> String {
    let length = usize::try_from(length).unwrap_or(max).min(max);
    let bytes: Vec<u8> =
        words[at..at + max.div_ceil(8)].iter().flat_map(|word| word.to_le_bytes()).collect();
    String::from_utf8_lossy(&bytes[..length]).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_without_a_record_has_none() {
        assert_eq!(FlightRecord::decode(&[]), None);
        assert_eq!(FlightRecord::decode(&[0; BYTES]), None);
        assert_eq!(FlightRecord::decode(&[0xff; BYTES]), None);
    }

    #[test]
    fn garbage_behind_the_magic_is_survived() {
        let mut state = 1_u64;
        let mut next = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(99);
            state
        };
        for _ in 0..20 {
            let mut bytes: Vec<u8> = (0..WORDS).flat_map(|_| next().to_le_bytes()).collect();
            bytes[..8].copy_from_slice(&MAGIC.to_le_bytes());
            bytes[RANK_AT * 8..PID_AT * 8 + 8].fill(0);
            assert!(FlightRecord::decode(&bytes).is_some());
        }
    }
}
