//! A started collective, without types: what was called, on which memory, and how it ended.
//!
//! Every operation works on one buffer in *in-place form*, `segment` bytes for each part:
//!
//! | operation | before | after |
//! |---|---|---|
//! | `all_reduce`, `reduce`, `broadcast` | the whole buffer | the same place |
//! | `reduce_scatter` | `world_size` segments | segment `rank` |
//! | `all_gather` | segment `rank` of `world_size` | all of them |
//! | `gather` | the root: segment `rank` of `world_size`; others: one segment | the root: all |
//! | `scatter` | the root: `world_size` segments; others: one segment | segment 0 (the root: segment `rank`) |
//! | `all_to_all` | segment r is for rank r | segment r is from rank r |

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::dtype::DType;
use crate::error::Result;
use crate::fingerprint::{CallRecord, Op, RECORD_BYTES};
use crate::gpu::on_device::OnDevice;
use crate::memory::region::RegionMemory;
use crate::recorder::RecorderEntry;
use crate::reduce_op::Reduction;

/// Where the buffer is.
#[derive(Debug)]
pub(crate) enum CallMemory {
    /// No data at all.
    Nothing,
    /// In a region, from this byte on.
    Region { region: Arc<RegionMemory>, offset: usize },
    /// Copied from the caller's slice.
    Private(Vec<u8>),
    /// On a GPU, at this address.
    Device {
        at: u64,
        /// Where the input of an operation with two buffers is.
        from: Option<u64>,
        /// What keeps the memory, where it is a region's.
        #[cfg_attr(not(feature = "mpi"), expect(dead_code, reason = "held, not read"))]
        keep: Vec<Arc<RegionMemory>>,
    },
}

impl CallMemory {
    pub(crate) fn base(&mut self) -> *mut u8 {
        match self {
            Self::Nothing => std::ptr::null_mut(),
            // wrapping_add: the range was checked against the region when its handle was made.
            Self::Region { region, offset } => region.base().wrapping_add(*offset),
            Self::Private(bytes) => bytes.as_mut_ptr(),
            // The host does not work on it.
            Self::Device { .. } => std::ptr::null_mut(),
        }
    }
}

impl CallMemory {
    /// Whether this and another, of so many bytes each, are in part the same memory of a region of the host.
    pub(crate) fn meets(&self, bytes: usize, other: &Self, of_other: usize) -> bool {
        let Self::Region { region, offset } = self else { return false };
        let Self::Region { region: its, offset: at } = other else { return false };
        Arc::ptr_eq(region, its) && *offset < at + of_other && *at < offset + bytes
    }
}

impl CallMemory {
    /// Whether this and another, of at most so many bytes a buffer, are in part the same memory of a GPU.
    pub(crate) fn shares_device(&self, bytes: usize, other: &Self, of_other: usize) -> bool {
        let Self::Device { at, from, .. } = self else { return false };
        let Self::Device { at: its, from: its_input, .. } = other else { return false };
        let meet = |a: u64, b: u64| a < b + of_other as u64 && b < a + bytes as u64;
        let ours = [Some(*at), *from];
        let theirs = [Some(*its), *its_input];
        ours.iter().flatten().any(|a| theirs.iter().flatten().any(|b| meet(*a, *b)))
    }
}

#[derive(Debug)]
pub(crate) struct CallState {
    pub(crate) memory: CallMemory,
    pub(crate) result: Option<Result<()>>,
}

/// A started collective.
#[derive(Debug)]
pub(crate) struct Call {
    pub(crate) record: CallRecord,
    /// The record as it travels.
    pub(crate) encoded: [u8; RECORD_BYTES],
    /// Its line in the flight recorder.
    pub(crate) entry: RecorderEntry,
    pub(crate) fingerprint: u64,
    pub(crate) dtype: DType,
    pub(crate) reduction: Option<Reduction>,
    pub(crate) root: usize,
    /// Bytes of a segment (of the whole buffer where there are no segments).
    pub(crate) segment: usize,
    /// How many segments the in-place form has on the rank that has them all.
    pub(crate) segments: usize,
    /// Small enough to travel in the slots.
    pub(crate) inline: bool,
    pub(crate) timeout: Duration,
    /// When; not known of inline ones, which would take as long to look at the clock.
    pub(crate) started: Option<Instant>,
    /// Where it stands between streams, when its memory is a GPU's.
    pub(crate) on_device: Option<OnDevice>,
    pub(crate) state: Mutex<CallState>,
    done: AtomicBool,
    /// In the queue: only the holder of the executor works on it.
    queued: AtomicBool,
    /// How often the log has said that it waits.
    reminders: AtomicU32,
}

impl Call {
    #[expect(clippy::too_many_arguments, reason = "the fields of the struct, named by the caller")]
    pub(crate) fn new(
        record: CallRecord,
        dtype: DType,
        reduction: Option<Reduction>,
        segment: usize,
        segments: usize,
        inline: bool,
        timeout: Duration,
        memory: CallMemory,
    ) -> Self {
        Self {
            encoded: record.encode(),
            fingerprint: record.fingerprint(reduction.map_or(0, Reduction::code)),
            root: record.root.unwrap_or(0),
            dtype,
            reduction,
            segment,
            segments,
            inline,
            timeout,
            started: (!inline).then(Instant::now),
            on_device: None,
            state: Mutex::new(CallState { memory, result: None }),
            done: AtomicBool::new(false),
            queued: AtomicBool::new(false),
            reminders: AtomicU32::new(0),
            entry: RecorderEntry::default(),
            record,
        }
    }

    pub(crate) fn on_device(self, on_device: Option<OnDevice>) -> Self {
        Self { on_device, ..self }
    }

    pub(crate) fn seq(&self) -> u64 {
        self.record.seq
    }

    pub(crate) fn op(&self) -> Op {
        self.record.op
    }

    /// Bytes of the in-place form on `rank`.
    pub(crate) fn bytes_on(&self, rank: usize) -> usize {
        match self.op() {
            Op::Gather | Op::Scatter if rank != self.root => self.segment,
            _ => self.segment * self.segments,
        }
    }

    /// The part of `rank`'s in-place form that others need: offset and length.
    pub(crate) fn contribution(&self, rank: usize) -> (usize, usize) {
        match self.op() {
            Op::AllGather => (rank * self.segment, self.segment),
            Op::Gather if rank == self.root => (rank * self.segment, self.segment),
            Op::Broadcast | Op::Scatter if rank != self.root => (0, 0),
            _ => (0, self.bytes_on(rank)),
        }
    }

    /// The longest contribution of any rank.
    pub(crate) fn contribution_max(op: Op, segment: usize, segments: usize) -> usize {
        match op {
            Op::AllGather | Op::Gather => segment,
            _ => segment * segments,
        }
    }

    pub(crate) fn lock(&self) -> MutexGuard<'_, CallState> {
        // The state is replaced whole; a panic of another thread leaves it valid.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn finish(&self, result: Result<()>) {
        if self.inline {
            self.entry.end_soon(result.is_ok());
        } else {
            self.entry.end(result.is_ok());
        }
        let mut state = self.lock();
        if state.result.is_none() {
            state.result = Some(result);
        }
        self.done.store(true, Ordering::Release);
    }

    /// Whether the log is to say that it has waited so long: no reminder is given twice, whoever waits.
    pub(crate) fn reminds(&self, waited: Duration, first: Duration) -> bool {
        if waited < first {
            return false;
        }
        let due = due(waited, first);
        self.reminders.fetch_max(due, Ordering::Relaxed) < due
    }

    /// How many reminders there were.
    #[cfg(test)]
    pub(crate) fn reminded(&self) -> u32 {
        self.reminders.load(Ordering::Relaxed)
    }

    pub(crate) fn set_queued(&self) {
        self.queued.store(true, Ordering::Release);
    }

    pub(crate) fn is_queued(&self) -> bool {
        self.queued.load(Ordering::Acquire)
    }

    pub(crate) fn is_done(&self) -> bool {
        self.done.load(Ordering::Acquire)
    }
}

/// How many reminders are due after such a wait: at `first`, at twice `first`, at four times…
fn due(waited: Duration, first: Duration) -> u32 {
    (0..31).take_while(|said| waited >= first.saturating_mul(1 << said)).map(|_| 1).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    #[test]
    fn reminders_are_due_at_the_first_wait_and_each_time_it_has_doubled() {
        let count = |seconds: u32| due(SECOND * seconds, SECOND * 30);
        assert_eq!([0, 29, 30, 59, 60, 119, 120, 1800].map(count), [0, 0, 1, 1, 2, 2, 3, 6]);
        assert_eq!(due(Duration::MAX, Duration::from_nanos(1)), 31);
    }
}
