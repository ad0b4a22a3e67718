//! Threads that build batches ahead of their consumer.
//!
//! Threads claim micro-batches in order and put them into a queue in order, so that whoever
//! finishes first delivers nothing early. The queue is bounded in batches and bytes, estimated when
//! a batch is claimed and counted when it is there. The batch that the consumer waits for is always
//! claimed before all others, so a full queue cannot block it. Threads that found it full sleep
//! until half of it is taken: to wake for each batch would cost a paced trainer more than the
//! batches.

use std::any::Any;
use std::collections::VecDeque;
use std::panic::{catch_unwind, AssertUnwindSafe};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::plan::{BatchPlan, Built, MicroBatchJob};
use crate::batches::Batch;
use crate::error::{Error, Result};

/// Threads look whether the loader is gone at least so often, should a wake-up be lost.
const LOOK_AGAIN: Duration = Duration::from_secs(1);

/// A thread in the middle of a read is given so long to finish when the loader is dropped; then it
/// is left to itself.
const CLOSING_MAX: Duration = Duration::from_secs(5);

/// How long a consumer polls before it sleeps: to be woken takes about as long as a batch takes to
/// build. Between two polls it lets other threads run.
const LOOKS_MAX: Duration = Duration::from_micros(100);

/// Bounds of the queue.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Bounds {
    pub(crate) batches: usize,
    pub(crate) bytes: usize,
}

struct PrefetchShared {
    plan: BatchPlan,
    bounds: Bounds,
    queue: Mutex<BatchQueue>,
    /// A batch was finished, or a thread ended.
    filled: Condvar,
    /// A batch was taken, or the loader is gone.
    taken: Condvar,
    /// Whether the batch that is taken next is there: a copy of what the queue says, to be read
    /// without its lock.
    ready: AtomicBool,
}

struct BatchQueue {
    /// What is claimed next.
    next: MicroBatchJob,
    /// Batches claimed and not yet taken, in order.
    slots: VecDeque<QueueSlot>,
    /// How many batches were taken: the ticket of the front slot.
    taken: u64,
    /// Of all slots.
    bytes: usize,
    built: Built,
    threads: usize,
    /// Consumers and threads that sleep: nobody is woken where nobody sleeps.
    consumers_asleep: usize,
    threads_asleep: usize,
    /// How many batches the queue held when a thread found it full.
    full_at: usize,
    closed: bool,
    /// Threads that a panic ended: what they had claimed never comes.
    threads_broken: usize,
}

struct QueueSlot {
    job: MicroBatchJob,
    /// Its size in the queue: estimated, then counted.
    bytes: usize,
    /// `None` while a thread works on it.
    result: Option<Result<Batch>>,
}

/// The threads and their queue.
pub(crate) struct Prefetcher {
    shared: Arc<PrefetchShared>,
    threads: Vec<JoinHandle<()>>,
}

impl Prefetcher {
    /// Starts `threads` threads that build batches from `first` on.
    pub(crate) fn start(
        plan: BatchPlan,
        first: MicroBatchJob,
        threads: usize,
        bounds: Bounds,
    ) -> Result<Self> {
        let queue = BatchQueue {
            next: first,
            slots: VecDeque::with_capacity(bounds.batches),
            taken: 0,
            bytes: 0,
            built: Built::default(),
            threads: 0,
            consumers_asleep: 0,
            threads_asleep: 0,
            full_at: 0,
            closed: false,
            threads_broken: 0,
        };
        let shared = Arc::new(PrefetchShared {
            plan,
            bounds,
            queue: Mutex::new(queue),
            filled: Condvar::new(),
            taken: Condvar::new(),
            ready: AtomicBool::new(false),
        });
        let mut prefetcher = Prefetcher { shared, threads: Vec::with_capacity(threads) };
        for number in 0..threads {
            let worker = Arc::clone(&prefetcher.shared);
            prefetcher.shared.lock().threads += 1;
            let spawned = std::thread::Builder::new()
                .name(format!("data-{number}"))
                .spawn(move || worker.work());
            match spawned {
                Ok(thread) => prefetcher.threads.push(thread),
                Err(error) => {
                    prefetcher.shared.lock().threads -= 1;
                    let reason = format!("thread {number} cannot be started: {error}");
                    return Err(Error::option("threads", threads, reason));
                }
            }
        }
        Ok(prefetcher)
    }

    /// Whether the next so many batches are there, or as many of them as there is room for.
    pub(crate) fn has(&self, batches: usize) -> bool {
        let queue = self.shared.lock();
        let is_full = || queue.threads_asleep == queue.threads;
        queue.is_ready()
            && queue.slots.iter().take(batches).all(|slot| slot.result.is_some())
            && (queue.slots.len() >= batches || is_full())
    }

    /// The next batch, in order. Waits at most `timeout`.
    pub(crate) fn next(&self, timeout: Duration) -> Result<Batch> {
        let looking = Instant::now();
        let limit = LOOKS_MAX.min(timeout);
        while !self.shared.ready.load(Ordering::Acquire) && looking.elapsed() < limit {
            std::thread::yield_now();
        }
        let mut queue = self.shared.lock();
        if !queue.is_ready() {
            queue.consumers_asleep += 1;
            let rest = left(looking, timeout);
            let is_waiting = |now: &mut BatchQueue| !now.is_ready() && now.threads_broken == 0;
            let waited = self.shared.filled.wait_timeout_while(queue, rest, is_waiting);
            queue = waited.unwrap_or_else(PoisonError::into_inner).0;
            queue.consumers_asleep -= 1;
        }
        let done = match queue.slots.front_mut() {
            Some(slot) => slot.result.take().map(|result| (slot.bytes, result)),
            None => None,
        };
        let Some((bytes, result)) = done else {
            let job = queue.slots.front().map_or(queue.next, |slot| slot.job);
            let (epoch, position) = (job.start.epoch, job.start.next_global_sample);
            if queue.threads_broken > 0 {
                let message = "it ended between two batches; what it said is on standard error";
                return Err(Error::WorkerPanicked { epoch, position, message: message.to_owned() });
            }
            return Err(Error::Timeout { timeout, epoch, position });
        };
        queue.slots.pop_front();
        queue.taken += 1;
        queue.bytes -= bytes;
        self.shared.ready.store(queue.is_ready(), Ordering::Release);
        let wakes = queue.threads_asleep > 0 && queue.slots.len() <= queue.full_at / 2;
        drop(queue);
        if wakes {
            self.shared.taken.notify_all();
        }
        result
    }
}

impl BatchQueue {
    /// Whether the batch that is taken next is there.
    fn is_ready(&self) -> bool {
        self.slots.front().is_some_and(|slot| slot.result.is_some())
    }

    /// Puts a batch into its slot. Gives whether it takes so much less than was estimated that
    /// another one may fit.
    fn fill(&mut self, slot: usize, result: Result<Batch>) -> bool {
        let Some(slot) = self.slots.get_mut(slot) else { return false };
        let thought = slot.bytes;
        if let Ok(batch) = &result {
            slot.bytes = batch.bytes();
            self.built.add(batch);
        }
        self.bytes = self.bytes - thought + slot.bytes;
        slot.result = Some(result);
        // Sleeping threads found no room under the estimate: a batch that is only a little smaller
        // makes none either.
        slot.bytes < thought / 2
    }
}

impl Drop for Prefetcher {
    fn drop(&mut self) {
        let mut queue = self.shared.lock();
        queue.closed = true;
        self.shared.taken.notify_all();
        let (queue, _) = self
            .shared
            .filled
            .wait_timeout_while(queue, CLOSING_MAX, |queue| queue.threads > 0)
            .unwrap_or_else(PoisonError::into_inner);
        let all_ended = queue.threads == 0;
        drop(queue);
        if all_ended {
            for thread in self.threads.drain(..) {
                // A thread catches its panics; what it had to say went through the queue.
                drop(thread.join());
            }
        }
    }
}

impl PrefetchShared {
    fn lock(&self) -> MutexGuard<'_, BatchQueue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn work(&self) {
        let _ending = WorkerExit(self);
        let mut builder = self.plan.builder();
        while let Some((ticket, job)) = self.claim() {
            let built = catch_unwind(AssertUnwindSafe(|| self.plan.build(job, &mut builder)));
            let result = built.unwrap_or_else(|payload| Err(panicked(job, payload.as_ref())));
            let mut queue = self.lock();
            let index = ticket - queue.taken;
            let has_room = queue.fill(crate::cast::to_usize(index), result);
            let (consumers, threads) = (queue.consumers_asleep, queue.threads_asleep);
            if index == 0 {
                self.ready.store(true, Ordering::Release);
            }
            drop(queue);
            if index == 0 && consumers > 0 {
                self.filled.notify_all();
            }
            if has_room && threads > 0 {
                self.taken.notify_all();
            }
        }
    }

    /// The next batch to build, when there is room for it; `None` when the loader is gone, or at
    /// the end of the data.
    fn claim(&self) -> Option<(u64, MicroBatchJob)> {
        let mut queue = self.lock();
        loop {
            if queue.closed {
                return None;
            }
            let job = queue.next;
            if self.plan.is_end(job.start) {
                return None;
            }
            let bytes = self.plan.bytes(job, queue.built);
            let fits = queue.slots.len() < self.bounds.batches
                && queue.bytes.saturating_add(bytes) <= self.bounds.bytes;
            if fits || queue.slots.is_empty() {
                queue.next = self.plan.after(job);
                queue.bytes += bytes;
                queue.slots.push_back(QueueSlot { job, bytes, result: None });
                return Some((queue.taken + crate::cast::to_u64(queue.slots.len()) - 1, job));
            }
            queue.threads_asleep += 1;
            queue.full_at = queue.slots.len();
            let waited = self.taken.wait_timeout(queue, LOOK_AGAIN);
            queue = waited.unwrap_or_else(PoisonError::into_inner).0;
            queue.threads_asleep -= 1;
        }
    }
}

/// Says that a thread is over, in whatever way it ends.
struct WorkerExit<'a>(&'a PrefetchShared);

impl Drop for WorkerExit<'_> {
    fn drop(&mut self) {
        let mut queue = self.0.lock();
        queue.threads -= 1;
        queue.threads_broken += usize::from(std::thread::panicking());
        drop(queue);
        self.0.filled.notify_all();
    }
}

/// A panic as an error.
pub(crate) fn panicked(job: MicroBatchJob, payload: &(dyn Any + Send)) -> Error {
    let message = payload
        .downcast_ref::<&str>()
        .map(ToString::to_string)
        .or_else(|| payload.downcast_ref::<String>().cloned())
        .unwrap_or_else(|| "a panic without a message".to_owned());
    let (epoch, position) = (job.start.epoch, job.start.next_global_sample);
    Error::WorkerPanicked { epoch, position, message }
}

/// What is left of `timeout`, counted from `started`.
pub(crate) fn left(started: Instant, timeout: Duration) -> Duration {
    timeout.saturating_sub(started.elapsed())
}
