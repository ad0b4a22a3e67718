//! Starting, waiting for and finishing collectives.
//!
//! A start publishes the call's header in this rank's slot, with the data when it is small; nothing
//! waits. Small collectives of one machine are finished by whoever waits for them: no other thread
//! is involved. All others go through a queue, in order. One thread at a time, holding the
//! [`Executor`], works on it: the progress thread, or a caller that waits and finds nobody at work.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, AtomicI8, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::executor::Executor;
use crate::algorithm::topology::Topology;
use crate::call::{Call, CallMemory};
use crate::control::peers::Peers;
use crate::error::{guarded, Error, Result};
use crate::fingerprint::CallRecord;
use crate::memory::board::{Board, SlotHeader, SLOTS};
use crate::memory::mapping::copy;
use crate::memory::patience;

/// A caller that waits so soon after starting has nothing else to do.
const AT_ONCE: Duration = Duration::from_micros(40);
/// How long the progress thread stays light asleep after work.
const DOZE: Duration = Duration::from_millis(100);

#[derive(Debug, Default)]
struct Queue {
    calls: VecDeque<Arc<Call>>,
    progress: Progress,
    /// Callers that sleep until a call ends: without them nothing has to be woken.
    waiting: usize,
}

/// What the progress thread does.
#[derive(Debug, Default, PartialEq, Eq)]
enum Progress {
    /// It is not running.
    #[default]
    Absent,
    /// It works, or looks soon by itself.
    Awake,
    /// It sleeps for long and has to be woken.
    Asleep,
}

/// One rank's side of a group.
#[derive(Debug)]
pub(crate) struct Core {
    pub(crate) peers: Arc<Peers>,
    pub(crate) rank: usize,
    pub(crate) topology: Topology,
    /// The ranks of this machine, in order, this one included.
    pub(crate) locals: Vec<usize>,
    /// The boards of those, by rank.
    boards: Vec<Option<Arc<Board>>>,
    /// How long to watch a word before sleeping.
    pub(crate) patience: Duration,
    /// Looks at it before looking at the clock; 0 where cores are few: there every look yields.
    pub(crate) spins: u32,
    executor: Mutex<Executor>,
    queue: Mutex<Queue>,
    work_came: Condvar,
    work_done: Condvar,
    /// The next collective to publish.
    to_publish: AtomicU64,
    /// Collectives that every rank of this machine is known to have consumed: a lower bound, so
    /// that a start looks at the others' boards once in [`SLOTS`] times.
    consumed_by_all: AtomicU64,
    closing: AtomicBool,
    /// By the size's order of magnitude: positive when callers wait at once.
    habits: [AtomicI8; 64],
}

impl Core {
    pub(crate) fn new(
        peers: Arc<Peers>,
        topology: Topology,
        boards: Vec<Option<Arc<Board>>>,
        executor: Executor,
    ) -> Self {
        let rank = peers.rank;
        let locals = topology.locals(rank);
        let crowded = peers.is_crowded;
        let patience = patience::patience(crowded);
        let spins = patience::spins(crowded);
        Self {
            peers,
            rank,
            topology,
            locals,
            boards,
            patience,
            spins,
            executor: Mutex::new(executor),
            queue: Mutex::default(),
            work_came: Condvar::new(),
            work_done: Condvar::new(),
            to_publish: AtomicU64::new(0),
            consumed_by_all: AtomicU64::new(0),
            closing: AtomicBool::new(false),
            habits: std::array::from_fn(|class| AtomicI8::new(if class < 18 { 2 } else { -2 })),
        }
    }

    pub(crate) fn world_size(&self) -> usize {
        self.peers.world_size()
    }

    /// The board of a rank of this machine.
    #[expect(clippy::expect_used, reason = "only ranks of this machine are asked for")]
    pub(crate) fn board(&self, rank: usize) -> &Board {
        self.boards[rank].as_ref().expect("a rank of this machine has a board here")
    }

    fn queue(&self) -> MutexGuard<'_, Queue> {
        // The queue is valid after every statement.
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Starts a call. `input` is the caller's buffer in in-place form, where the call has no memory
    /// of its own; it is read before this returns.
    pub(crate) fn start(self: &Arc<Self>, call: Call, input: Option<&[u8]>) -> Result<Arc<Call>> {
        if let Some(error) = self.peers.failure() {
            return Err(error);
        }
        let seq = call.seq();
        let published = self.to_publish.load(Ordering::Acquire) == seq && self.slot_is_free(seq);
        let header = published.then(|| self.fill_slot(&call, input));
        if let (Some(input), false) = (input, published && self.finishes_in_place(&call)) {
            call.lock().memory = CallMemory::Private(input.to_vec());
        }
        if !(published && self.finishes_in_place(&call)) {
            call.set_queued();
        }
        let call = Arc::new(call);
        {
            let mut journal = self.peers.journal();
            journal.next_seq = seq + 1;
            journal.open.push_back(Arc::clone(&call));
        }
        if let Some(header) = header {
            self.show_slot(seq, &header);
        }
        if call.is_queued() {
            self.enqueue(&call)?;
        }
        Ok(call)
    }

    /// Whether the caller's wait does all the work.
    pub(crate) fn finishes_in_place(&self, call: &Call) -> bool {
        call.inline && self.topology.is_one_machine() && !call.is_queued()
    }

    fn slot_is_free(&self, seq: u64) -> bool {
        let Some(needed) = (seq + 1).checked_sub(SLOTS) else { return true };
        if self.consumed_by_all.load(Ordering::Relaxed) >= needed {
            return true;
        }
        let consumed = |local: &usize| self.board(*local).consumed().load(Ordering::Acquire);
        let by_all = self.locals.iter().map(consumed).min().unwrap_or(0);
        self.consumed_by_all.store(by_all, Ordering::Relaxed);
        by_all >= needed
    }

    /// Fills this rank's slot but for the header, which [`Core::show_slot`] writes.
    fn fill_slot(&self, call: &Call, input: Option<&[u8]>) -> SlotHeader {
        let (at, bytes) = if call.inline { call.contribution(self.rank) } else { (0, 0) };
        let board = self.board(self.rank);
        let mut state = call.lock();
        if bytes > 0 {
            let from = match input {
                Some(input) => input[at..at + bytes].as_ptr(),
                None => state.memory.base().wrapping_add(at).cast_const(),
            };
            copy(from, board.payload(call.seq()), bytes);
        }
        board.write_record(call.seq(), &call.encoded);
        let (region, offset) = match &state.memory {
            CallMemory::Region { region, offset } => (region.id, *offset as u64),
            CallMemory::Nothing | CallMemory::Private(_) | CallMemory::Device { .. } => (0, 0),
        };
        SlotHeader { fingerprint: call.fingerprint, payload_bytes: bytes as u64, region, offset }
    }

    fn show_slot(&self, seq: u64, header: &SlotHeader) {
        self.board(self.rank).publish(seq, header);
        self.to_publish.store(seq + 1, Ordering::Release);
    }

    /// Publishes a call that had to queue, once its slot is free.
    pub(crate) fn publish_late(&self, call: &Arc<Call>, deadline: Instant) -> Result<()> {
        let seq = call.seq();
        if self.to_publish.load(Ordering::Acquire) > seq {
            return Ok(());
        }
        if let Some(needed) = (seq + 1).checked_sub(SLOTS) {
            // Our own older calls first: nobody may ever wait for them.
            loop {
                let oldest = self.peers.journal().open.front().cloned();
                match oldest {
                    Some(oldest) if oldest.seq() < needed => {
                        self.finish_inline(&oldest, None)?;
                    }
                    _ => break,
                }
            }
            for local in &self.locals {
                let board = self.board(*local);
                self.wait_word(call, Some(deadline), *local, board.consumed(), needed)?;
            }
        }
        let header = self.fill_slot(call, None);
        self.show_slot(seq, &header);
        Ok(())
    }

    /// Waits until every rank of this machine has published this collective, and compares. Without
    /// a deadline the call's time-out runs from here.
    pub(crate) fn meet_locals(&self, call: &Call, deadline: Option<Instant>) -> Result<()> {
        let seq = call.seq();
        for local in &self.locals {
            let board = self.board(*local);
            self.wait_word(call, deadline, *local, board.published(seq), seq + 1)?;
            let header = board.header(seq);
            if header.fingerprint != call.fingerprint {
                let theirs = board.record(seq);
                return Err(self.out_of_step(call, *local, theirs));
            }
        }
        Ok(())
    }

    /// Whether all ranks have shown the header of a call, and the same one: for calls whose data a
    /// lane moves. `None`: not yet.
    pub(crate) fn poll_check(&self, check: &Arc<Call>) -> Option<Result<()>> {
        if self.finishes_in_place(check) && !check.is_done() && !self.inline_is_ready(check) {
            return None;
        }
        if self.finishes_in_place(check) {
            return Some(self.finish_inline(check, None).map(|_| ()));
        }
        check.is_done().then(|| check.lock().result.clone().unwrap_or(Ok(())))
    }

    pub(crate) fn out_of_step(
        &self,
        call: &Call,
        peer: usize,
        theirs: Option<CallRecord>,
    ) -> Error {
        Error::OutOfStep {
            seq: call.seq(),
            rank: self.rank,
            ours: Box::new(call.record.travelled()),
            peer,
            theirs: Box::new(theirs.unwrap_or_else(|| call.record.travelled())),
        }
    }

    /// Marks a call as ended well and lets its slot be used again.
    pub(crate) fn completed(&self) {
        let completed = {
            let mut journal = self.peers.journal();
            while journal.open.front().is_some_and(|call| call.is_done()) {
                journal.open.pop_front();
            }
            journal.completed()
        };
        let board = self.board(self.rank);
        if board.consumed().load(Ordering::Relaxed) < completed {
            board.announce_lazily(board.consumed(), completed);
        }
    }

    fn enqueue(self: &Arc<Self>, call: &Arc<Call>) -> Result<()> {
        let eager = self.habit(call).load(Ordering::Relaxed) < 0;
        let mut queue = self.queue();
        queue.calls.push_back(Arc::clone(call));
        if queue.progress == Progress::Absent {
            queue.progress = Progress::Awake;
            let core = Arc::clone(self);
            let thread = std::thread::Builder::new().name(format!("phalanx-work-{}", self.rank));
            // Not joined: it ends when the group is closed and the queue is empty.
            let started = thread.spawn(move || core.progress());
            drop(started.map_err(|error| Error::system(self.rank, "start a thread", error))?);
        } else if eager || queue.progress == Progress::Asleep {
            self.work_came.notify_one();
        }
        Ok(())
    }

    /// The habit of callers with calls of this size.
    fn habit(&self, call: &Call) -> &AtomicI8 {
        let bytes = call.segment * call.segments;
        &self.habits[(usize::BITS - bytes.leading_zeros()).min(63) as usize]
    }

    fn learn(&self, call: &Call) {
        let habit = self.habit(call);
        let Some(started) = call.started else { return };
        let step = if started.elapsed() < AT_ONCE { 1 } else { -1 };
        let value = habit.load(Ordering::Relaxed).saturating_add(step).clamp(-2, 2);
        habit.store(value, Ordering::Relaxed);
    }

    /// The progress thread.
    fn progress(&self) {
        let mut last_work = Instant::now();
        loop {
            {
                let mut queue = self.queue();
                while queue.calls.is_empty() {
                    if self.closing.load(Ordering::Acquire) {
                        queue.progress = Progress::Absent;
                        drop(queue);
                        self.peers.close();
                        return;
                    }
                    let doze = last_work.elapsed() < DOZE;
                    queue.progress = if doze { Progress::Awake } else { Progress::Asleep };
                    let limit = if doze { patience::SLEEP_MAX } else { Duration::from_secs(1) };
                    let (guard, _) = self
                        .work_came
                        .wait_timeout(queue, limit)
                        .unwrap_or_else(PoisonError::into_inner);
                    queue = guard;
                }
                queue.progress = Progress::Awake;
            }
            let mut executor = self.executor.lock().unwrap_or_else(PoisonError::into_inner);
            while self.run_next(&mut executor) {}
            last_work = Instant::now();
        }
    }

    /// Runs the oldest queued call; false when there is none.
    fn run_next(&self, executor: &mut Executor) -> bool {
        let Some(call) = self.queue().calls.pop_front() else { return false };
        let result = match self.peers.failure() {
            Some(error) => Err(error),
            None => self.run_guarded(executor, &call).map_err(|error| self.peers.fail(error)),
        };
        let ended_well = result.is_ok();
        call.finish(result);
        if ended_well {
            self.completed();
        }
        // The lock orders this after a waiter's last look and before its sleep.
        let waiting = self.queue().waiting;
        if waiting > 0 {
            self.work_done.notify_all();
        }
        true
    }

    /// Runs a call; a panic (a bug of ours) ends the group instead of leaving callers waiting.
    fn run_guarded(&self, executor: &mut Executor, call: &Arc<Call>) -> Result<()> {
        guarded(self.rank, &call.record, || executor.run(self, call))
    }

    /// Waits until a queued call has ended, working on the queue where nobody else does.
    pub(crate) fn drive(&self, call: &Arc<Call>) {
        self.learn(call);
        while !call.is_done() {
            let executor = match self.executor.try_lock() {
                Ok(executor) => Some(executor),
                Err(std::sync::TryLockError::Poisoned(error)) => Some(error.into_inner()),
                Err(std::sync::TryLockError::WouldBlock) => None,
            };
            if let Some(mut executor) = executor {
                while !call.is_done() && self.run_next(&mut executor) {}
                continue;
            }
            let mut queue = self.queue();
            if !call.is_done() {
                queue.waiting += 1;
                let (mut queue, _) = self
                    .work_done
                    .wait_timeout(queue, patience::SLEEP_MAX)
                    .unwrap_or_else(PoisonError::into_inner);
                queue.waiting -= 1;
            }
        }
    }

    /// Ends the group on this rank: at once when nothing is queued, else after the queue.
    pub(crate) fn close(&self) {
        self.closing.store(true, Ordering::Release);
        let queue = self.queue();
        let idle = queue.calls.is_empty() && queue.progress == Progress::Absent;
        drop(queue);
        self.work_came.notify_all();
        if idle || (self.peers.journal().open.is_empty() && self.queue().calls.is_empty()) {
            self.peers.close();
        }
    }
}

impl Drop for Core {
    fn drop(&mut self) {
        self.peers.close();
    }
}
