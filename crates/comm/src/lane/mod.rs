//! A lane: the queue of a group's calls whose data another library (MPI, NCCL) moves.
//!
//! A call's header goes over the control plane first, so ranks have compared what they called, and know who is absent,
//! before the library is asked for anything. Then the [`Mover`] starts the call, and is polled until it has ended. The README
//! beside this file says who polls, and what ends badly.

mod checks;
pub(crate) mod patience;
pub(crate) mod runner;
mod unit;

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, AtomicI8, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError, TryLockError};
use std::time::{Duration, Instant};

use smallvec::smallvec;

use self::patience::Patience;
use self::runner::{lock, Runner};
use self::unit::{HeldCalls, Unit};
use crate::call::{Call, CallMemory};
use crate::error::{guarded, Error, Result};
use crate::fingerprint::Op;
use crate::order::core::Core;

pub(crate) use self::unit::{Check, Submitted};

/// Moves the data of a group's calls. Only one thread at a time calls it.
pub(crate) trait Mover: Send + std::fmt::Debug {
    /// Starts to move the data of `call`, in place in `memory` (see [`Call`] for the form), which stays
    /// where it is until [`Mover::poll`] counts the call. Every rank has called the same; `send`
    /// and `receive` alone come without that check. Does not wait for peers.
    fn start(&mut self, call: &Arc<Call>, memory: &mut CallMemory) -> Result<()>;
    /// Starts several calls as one, where the library can; each is reported by itself.
    fn start_together(&mut self, calls: &[Submitted]) -> Result<()> {
        calls.iter().try_for_each(|one| self.start(&one.call, &mut one.call.lock().memory))
    }
    /// Lets data move, and appends which calls have ended: their places, ascending, among those that
    /// were started and not reported, the oldest being 0. Whether anything moved. Does not wait.
    fn poll(&mut self, ended: &mut Vec<usize>) -> Result<bool>;
    /// The group is dead of `cause`: lets go of what is under way, without waiting for peers. The memory of those
    /// calls is never used again, nor given back. Nothing but drop comes after it.
    fn abandon(&mut self, cause: &Error);
    /// The group was closed and nothing is under way. Called on the runner's thread, last.
    fn close(&mut self) {}
    /// The newest message of the library's.
    fn last_words(&self) -> Option<String> {
        None
    }
    /// Whether a message may start before collectives that were called earlier.
    fn lets_messages_overtake(&self) -> bool {
        false
    }
    /// How often the library wants to be polled while nothing of ours is under way.
    fn wants_idle_poll(&self) -> Option<Duration> {
        None
    }
}

/// The longest that a waiting caller sleeps between two looks.
const LOOK: Duration = Duration::from_millis(10);
/// A caller that waits so soon after starting has nothing else to do.
const AT_ONCE: Duration = Duration::from_micros(40);

/// One group's calls on their way through a transport.
#[derive(Debug)]
#[expect(clippy::struct_excessive_bools, reason = "two traits of the library")]
pub(crate) struct Lane {
    pub(crate) backend: &'static str,
    pub(crate) core: Arc<Core>,
    runner: Arc<Runner>,
    /// Whether threads other than the runner may call the transport (one at a time).
    callers_drive: bool,
    /// Whether messages are in no order with collectives.
    messages_overtake: bool,
    idle_poll: Option<Duration>,
    /// Started, not yet seen by whoever holds `state`.
    incoming: Mutex<Vec<Unit>>,
    held: Mutex<HeldCalls>,
    state: Mutex<LaneState>,
    ended: Condvar,
    looks: AtomicU64,
    closing: AtomicBool,
    leaving: AtomicBool,
    closed: AtomicBool,
    /// By the size's order of magnitude: positive when callers wait at once.
    habits: [AtomicI8; 64],
}

#[derive(Debug)]
struct LaneState {
    transport: Box<dyn Mover>,
    checking: VecDeque<Unit>,
    /// Started, in that order.
    moving: Vec<Arc<Call>>,
    /// Messages of those whose other side is not yet known to be called, with their numbers.
    unmet: Vec<(Arc<Call>, u64)>,
    /// Places in `moving` of what has ended.
    ended: Vec<usize>,
    /// When the oldest call's turn came.
    turn: Instant,
    /// Since when a message waits for a peer that has left.
    lonely: Option<Instant>,
    abandoned: bool,
}

impl LaneState {
    /// A library's error, with the oldest call that is under way.
    fn placed(&self, error: Error) -> Error {
        let waiting = || self.checking.iter().flat_map(|unit| &unit.calls).map(|one| &one.call);
        let oldest = self.moving.first().or_else(|| waiting().next());
        match (error, oldest) {
            (Error::Backend { rank, backend, call, what }, Some(oldest)) => {
                let what = format!("{what}; during {}", oldest.record);
                Error::Backend { rank, backend, call, what }
            }
            (error, _) => error,
        }
    }

    fn is_open(&self) -> bool {
        !self.checking.is_empty() || !self.moving.is_empty()
    }
}

/// What a look at a lane found.
#[derive(Debug, Clone, Copy)]
#[expect(clippy::struct_excessive_bools, reason = "they have nothing to do with each other")]
struct Look {
    /// Something moved.
    moved: bool,
    /// Something is under way that the runner has to look after.
    busy: bool,
}

fn is_message(call: &Call) -> bool {
    matches!(call.op(), Op::Send | Op::Receive)
}

impl Lane {
    /// A lane on `runner`. With `callers_drive` waiting callers call the transport too.
    pub(crate) fn new(
        backend: &'static str,
        core: Arc<Core>,
        runner: &Arc<Runner>,
        callers_drive: bool,
        transport: Box<dyn Mover>,
    ) -> Arc<Self> {
        let (messages_overtake, idle_poll) =
            (transport.lets_messages_overtake(), transport.wants_idle_poll());
        let state = LaneState {
            transport,
            checking: VecDeque::new(),
            moving: Vec::new(),
            unmet: Vec::new(),
            ended: Vec::new(),
            turn: Instant::now(),
            lonely: None,
            abandoned: false,
        };
        let lane = Arc::new(Self {
            backend,
            core,
            runner: Arc::clone(runner),
            callers_drive,
            messages_overtake,
            idle_poll,
            incoming: Mutex::default(),
            held: Mutex::default(),
            state: Mutex::new(state),
            ended: Condvar::new(),
            looks: AtomicU64::new(0),
            closing: AtomicBool::new(false),
            leaving: AtomicBool::new(false),
            closed: AtomicBool::new(false),
            habits: std::array::from_fn(|class| AtomicI8::new(if class < 19 { 2 } else { -2 })),
        });
        runner.adopt(Arc::clone(&lane));
        lane
    }

    /// Takes a started call. `check` is its header's call on the control plane.
    pub(crate) fn submit(&self, call: Arc<Call>, check: Check) {
        let caller_comes = self.callers_drive && self.habit(&call).load(Ordering::Relaxed) > 0;
        let submitted = Submitted { call, check };
        let mut held = lock(&self.held);
        if held.depth > 0 {
            return held.calls.push(submitted);
        }
        drop(held);
        lock(&self.incoming).push(Unit { calls: smallvec![submitted], checked: 0 });
        if caller_comes {
            self.runner.wake_from_sleep();
        } else {
            self.runner.wake();
        }
    }

    /// Keeps the calls that come until [`Lane::release`], to start them together.
    pub(crate) fn hold(&self) {
        lock(&self.held).depth += 1;
    }

    pub(crate) fn release(&self) {
        let depth = {
            let mut held = lock(&self.held);
            held.depth = held.depth.saturating_sub(1);
            held.depth
        };
        if depth == 0 {
            self.flush();
        }
    }

    /// Lets the calls go that are held so far: somebody waits for one of them.
    pub(crate) fn flush(&self) {
        let calls = std::mem::take(&mut lock(&self.held).calls);
        if !calls.is_empty() {
            lock(&self.incoming).push(Unit { calls, checked: 0 });
            self.runner.wake();
        }
    }

    /// The habit of callers with calls of this size.
    fn habit(&self, call: &Call) -> &AtomicI8 {
        let bytes = call.segment * call.segments;
        &self.habits[(usize::BITS - bytes.leading_zeros()).min(63) as usize]
    }

    fn learn(&self, call: &Call) {
        let (habit, Some(started)) = (self.habit(call), call.started) else { return };
        let step = if started.elapsed() < AT_ONCE { 1 } else { -1 };
        let value = habit.load(Ordering::Relaxed).saturating_add(step).clamp(-2, 2);
        habit.store(value, Ordering::Relaxed);
    }

    /// How long a caller goes on waiting for `call`.
    pub(crate) fn patience<'a>(&'a self, call: &'a Call) -> Patience<'a> {
        Patience::new(self, call)
    }

    /// Blocks until `call` has ended, well or not: its time limit makes it end.
    ///
    /// # Errors
    ///
    /// It has not ended, and the thread that would end it is stuck in the library.
    pub(crate) fn wait(&self, call: &Call) -> Result<()> {
        if self.callers_drive {
            self.learn(call);
        }
        let mut patience = self.patience(call);
        while !call.is_done() {
            if self.callers_drive {
                match self.state.try_lock() {
                    Ok(mut state) => {
                        while !call.is_done() {
                            if !self.step(&mut state) {
                                std::thread::yield_now();
                            }
                        }
                        if state.is_open() {
                            drop(state);
                            self.runner.wake(); // nobody else looks after the others
                        }
                        continue;
                    }
                    Err(TryLockError::Poisoned(poisoned)) => drop(poisoned.into_inner()),
                    Err(TryLockError::WouldBlock) => {}
                }
            }
            let incoming = lock(&self.incoming);
            if !call.is_done() {
                drop(
                    self.ended.wait_timeout(incoming, LOOK).unwrap_or_else(PoisonError::into_inner),
                );
                patience.check()?;
            }
        }
        Ok(())
    }

    /// Waits until nothing is under way; whether it came to that before the deadline.
    pub(crate) fn wait_idle(&self, deadline: Instant) -> bool {
        loop {
            // In this order: what is taken from the first is in the second. Held for long only where something
            // is under way.
            let busy = !lock(&self.held).calls.is_empty()
                || !lock(&self.incoming).is_empty()
                || self.state.try_lock().map_or(true, |state| state.is_open());
            if !busy || Instant::now() >= deadline {
                return !busy;
            }
            std::thread::park_timeout(AT_ONCE);
        }
    }

    /// No more calls come. The group is closed once those under way have ended.
    pub(crate) fn close(&self) {
        self.closing.store(true, Ordering::Release);
        self.runner.wake();
    }

    /// Waits, until `limit` is over, until the group is closed.
    pub(crate) fn wait_closed(&self, limit: Duration) {
        let deadline = Instant::now() + limit;
        let mut incoming = lock(&self.incoming);
        while !self.closed.load(Ordering::Acquire) && Instant::now() < deadline {
            let waited = self.ended.wait_timeout(incoming, LOOK);
            incoming = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// The runner's look.
    fn look(&self, idle: bool) -> Look {
        if self.leaving.load(Ordering::Acquire) {
            return Look { moved: false, busy: false };
        }
        let mut state = match self.state.try_lock() {
            Ok(state) => state,
            Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
            // A caller looks after everything.
            Err(TryLockError::WouldBlock) => return Look { moved: false, busy: false },
        };
        let moved = self.step(&mut state);
        if idle && !state.is_open() && !state.abandoned {
            // What it says of calls that have ended long ago is of no interest.
            let LaneState { transport, ended, .. } = &mut *state;
            let polled = guarded(self.core.rank, &self.backend, || transport.poll(ended));
            if let Err(error) = polled {
                tracing::debug!(%error, "an idle poll failed");
            }
            ended.clear();
        }
        Look { moved, busy: state.is_open() || !lock(&self.incoming).is_empty() }
    }

    /// How many looks at its calls it has had: a number that stands still tells that somebody is stuck in the
    /// library.
    fn looks(&self) -> u64 {
        self.looks.load(Ordering::Relaxed)
    }

    /// One look at everything; whether anything changed.
    fn step(&self, state: &mut LaneState) -> bool {
        self.looks.fetch_add(1, Ordering::Relaxed);
        let before = (state.checking.len(), state.moving.len());
        state.checking.extend(lock(&self.incoming).drain(..));
        if before == (0, 0) {
            state.turn = Instant::now();
        }
        let result = match self.core.peers.failure() {
            Some(error) => Err(error),
            None => guarded(self.core.rank, &self.backend, || self.advance(state)),
        };
        let moved = result.unwrap_or_else(|error| {
            // A library that has lost a peer says so without naming it; the control plane names it.
            let named = matches!(error, Error::Backend { .. }).then(|| self.core.peers.verdict());
            let error = named.flatten().unwrap_or_else(|| state.placed(error));
            let error = self.core.peers.fail(error);
            self.abandon(state, &error);
            true
        });
        moved || before != (state.checking.len(), state.moving.len())
    }

    fn advance(&self, state: &mut LaneState) -> Result<bool> {
        self.start_messages(state)?;
        while let Some(unit) = state.checking.front_mut() {
            if !self.is_checked(unit)? || self.comes_after(unit, &state.moving) {
                break;
            }
            let Some(Unit { calls, .. }) = state.checking.pop_front() else { break };
            // Before they start: a start that fails may have begun.
            for Submitted { call, check } in &calls {
                state.moving.push(Arc::clone(call));
                if let Check::Message(index) = check {
                    state.unmet.push((Arc::clone(call), *index));
                }
            }
            match &calls[..] {
                [one] => state.transport.start(&one.call, &mut one.call.lock().memory)?,
                several => state.transport.start_together(several)?,
            }
        }
        self.check_unmet(state)?;
        if state.moving.is_empty() {
            return self.check_time(state).map(|()| false);
        }
        let moved = state.transport.poll(&mut state.ended)?;
        if state.ended.is_empty() {
            return if moved { Ok(true) } else { self.check_time(state).map(|()| false) };
        }
        for place in std::mem::take(&mut state.ended).into_iter().rev() {
            let call = state.moving.remove(place);
            if !(self.messages_overtake && is_message(&call)) {
                state.turn = Instant::now();
            }
            call.finish(Ok(()));
        }
        drop(lock(&self.incoming));
        self.ended.notify_all();
        Ok(true)
    }

    fn abandon(&self, state: &mut LaneState, error: &Error) {
        state.ended.clear();
        state.unmet.clear();
        for call in state.moving.drain(..) {
            // The library may still write there.
            let memory = std::mem::replace(&mut call.lock().memory, CallMemory::Nothing);
            _ = std::mem::ManuallyDrop::new(memory);
            call.finish(Err(error.clone()));
        }
        for Submitted { call, .. } in state.checking.drain(..).flat_map(|unit| unit.calls) {
            call.finish(Err(error.clone()));
        }
        drop(lock(&self.incoming));
        self.ended.notify_all();
        // Last: an abort may wait for the device, and those who wait for the calls must not.
        if !std::mem::replace(&mut state.abandoned, true) {
            let abandoned = guarded(self.core.rank, &self.backend, || {
                state.transport.abandon(error);
                Ok(())
            });
            if let Err(panic) = abandoned {
                tracing::error!(%panic, "a group that has failed could not be let go");
            }
        }
    }

    /// Lets go of the group when it was closed and nothing is under way; whether that is done.
    fn end_if_closed(self: &Arc<Self>) -> bool {
        if self.closed.load(Ordering::Acquire) {
            return true;
        }
        if self.leaving.load(Ordering::Acquire)
            || !self.closing.load(Ordering::Acquire)
            || !lock(&self.incoming).is_empty()
        {
            return false;
        }
        let mut state = match self.state.try_lock() {
            Ok(state) => state,
            Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
            Err(TryLockError::WouldBlock) => return false,
        };
        if state.is_open() {
            return false;
        }
        if !state.abandoned {
            let closed = guarded(self.core.rank, &self.backend, || {
                state.transport.close();
                Ok(())
            });
            if let Err(panic) = closed {
                tracing::error!(%panic, "a group did not end in good order");
            }
        }
        drop(state);
        self.leaving.store(true, Ordering::Release);
        // Elsewhere: a goodbye waits for other machines, and other groups' calls must not.
        let ours = Arc::clone(self);
        let named = std::thread::Builder::new().name("phalanx-leave".to_owned());
        if named.spawn(move || ours.leave()).is_err() {
            self.leave();
        }
        self.closed.load(Ordering::Acquire)
    }

    fn leave(&self) {
        self.core.close();
        self.closed.store(true, Ordering::Release);
        self.ended.notify_all();
        self.runner.wake();
    }
}
