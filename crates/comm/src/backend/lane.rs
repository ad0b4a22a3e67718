//! A lane: where a group's calls go whose data another library (MPI, NCCL) moves.
//!
//! The host backend stays the group's control plane. A call's header goes over it first, so ranks have
//! compared what they called, and know who is absent, before the library is asked for anything. Then
//! the [`Transport`] starts; calls end in the order of their start.
//!
//! A [`Runner`] thread works on its lanes. Where the library allows it ([`Lane::callers_drive`]), a
//! caller that waits works on its own lane instead: no thread has to be woken for it.

#![allow(dead_code, reason = "the first backend that uses it is on its way")]

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, TryLockError};
use std::time::{Duration, Instant};

use super::host::call::{Call, Memory};
use super::host::core::Core;
use super::Backend;
use crate::error::{Error, Result};

/// Moves the data of a group's calls. Only one thread at a time calls it.
pub(crate) trait Transport: Send + std::fmt::Debug {
    /// Starts to move the data of `call`, in place in `memory` (see [`Call`] for the form), which stays
    /// where it is until [`Transport::poll`] counts the call. Every rank has called the same; `send`
    /// and `receive` alone come without that check. Does not wait for peers.
    fn start(&mut self, call: &Call, memory: &mut Memory) -> Result<()>;
    /// Lets data move. How many more of the started calls, oldest first, have ended. Does not wait.
    fn poll(&mut self) -> Result<usize>;
    /// The group is dead: lets go of what is under way, without waiting for peers. The memory of those
    /// calls is never used again, nor given back. Nothing but drop comes after it.
    fn abandon(&mut self);
}

/// How long a runner looks again and again before it sleeps between looks.
const EAGER: Duration = Duration::from_micros(200);
/// Between two looks after that, while calls are under way.
const NAP: Duration = Duration::from_micros(50);
/// Between two looks when nothing is under way: whatever comes wakes the runner.
const IDLE: Duration = Duration::from_secs(1);
/// The longest that a waiting caller sleeps between two looks.
const LOOK: Duration = Duration::from_millis(10);

/// One group's calls on their way through a transport.
#[derive(Debug)]
pub(crate) struct Lane {
    pub(crate) backend: Backend,
    pub(crate) core: Arc<Core>,
    runner: Arc<Runner>,
    /// Whether threads other than the runner may call the transport (one at a time).
    callers_drive: bool,
    /// Started, not yet seen by whoever holds `state`.
    incoming: Mutex<Vec<Submitted>>,
    state: Mutex<State>,
    ended: Condvar,
    closing: AtomicBool,
}

/// A call and, for collectives, its header's way over the control plane.
#[derive(Debug)]
struct Submitted {
    call: Arc<Call>,
    check: Option<Arc<Call>>,
}

#[derive(Debug)]
struct State {
    transport: Box<dyn Transport>,
    checking: VecDeque<Submitted>,
    moving: VecDeque<Arc<Call>>,
    /// When the oldest call's turn came.
    turn: Instant,
    abandoned: bool,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // What these protect is valid after every statement.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Lane {
    /// A lane on `runner`. With `callers_drive` waiting callers call the transport too.
    pub(crate) fn new(
        backend: Backend,
        core: Arc<Core>,
        runner: &Arc<Runner>,
        callers_drive: bool,
        transport: Box<dyn Transport>,
    ) -> Arc<Self> {
        let state = State {
            transport,
            checking: VecDeque::new(),
            moving: VecDeque::new(),
            turn: Instant::now(),
            abandoned: false,
        };
        let lane = Arc::new(Self {
            backend,
            core,
            runner: Arc::clone(runner),
            callers_drive,
            incoming: Mutex::default(),
            state: Mutex::new(state),
            ended: Condvar::new(),
            closing: AtomicBool::new(false),
        });
        lock(&runner.lanes).push(Arc::clone(&lane));
        runner.wake();
        lane
    }

    /// Takes a started call. `check` is its header's call on the control plane.
    pub(crate) fn submit(&self, call: Arc<Call>, check: Option<Arc<Call>>) {
        lock(&self.incoming).push(Submitted { call, check });
        self.runner.wake();
    }

    /// Blocks until `call` has ended, well or not: its time limit makes it end.
    pub(crate) fn wait(&self, call: &Call) {
        while !call.is_done() {
            if self.callers_drive {
                match self.state.try_lock() {
                    Ok(mut state) => {
                        while !call.is_done() {
                            if !self.step(&mut state) {
                                std::thread::yield_now();
                            }
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
            }
        }
    }

    /// No more calls come. The group is closed once those under way have ended.
    pub(crate) fn close(&self) {
        self.closing.store(true, Ordering::Release);
        self.runner.wake();
    }

    /// One look at everything; whether anything changed.
    fn step(&self, state: &mut State) -> bool {
        let before = (state.checking.len(), state.moving.len());
        state.checking.extend(lock(&self.incoming).drain(..));
        if before == (0, 0) {
            state.turn = Instant::now();
        }
        let result = match self.core.peers.failure() {
            Some(error) => Err(error),
            None => self.advance(state),
        };
        if let Err(error) = result {
            let error = self.core.peers.fail(error);
            self.abandon(state, &error);
        }
        before != (state.checking.len(), state.moving.len())
    }

    fn advance(&self, state: &mut State) -> Result<()> {
        while let Some(Submitted { call, check }) = state.checking.front() {
            if let Some(check) = check {
                match self.core.poll_check(check) {
                    Some(result) => result?,
                    None => break,
                }
            }
            let call = Arc::clone(call);
            state.transport.start(&call, &mut call.lock().memory)?;
            state.checking.pop_front();
            state.moving.push_back(call);
        }
        if state.moving.is_empty() && state.checking.is_empty() {
            return Ok(());
        }
        let ended = if state.moving.is_empty() { 0 } else { state.transport.poll()? };
        for call in state.moving.drain(..ended.min(state.moving.len())) {
            call.finish(Ok(()));
        }
        if ended > 0 {
            state.turn = Instant::now();
            drop(lock(&self.incoming));
            self.ended.notify_all();
            return Ok(());
        }
        self.check_time(state)
    }

    /// An error when the oldest call's time is over.
    fn check_time(&self, state: &State) -> Result<()> {
        let waiting = state.checking.front();
        let Some(oldest) = state.moving.front().or(waiting.map(|front| &front.call)) else {
            return Ok(());
        };
        if state.turn.elapsed() < oldest.timeout {
            return Ok(());
        }
        match waiting {
            Some(Submitted { check: Some(check), .. }) if state.moving.is_empty() => {
                Err(self.core.late(check))
            }
            _ => Err(Error::Stalled {
                rank: self.core.rank,
                backend: self.backend.name(),
                call: Box::new(oldest.record.clone()),
                timeout: oldest.timeout,
            }),
        }
    }

    fn abandon(&self, state: &mut State, error: &Error) {
        if !std::mem::replace(&mut state.abandoned, true) {
            state.transport.abandon();
        }
        for call in state.moving.drain(..) {
            // The library may still write there.
            let memory = std::mem::replace(&mut call.lock().memory, Memory::Nothing);
            _ = std::mem::ManuallyDrop::new(memory);
            call.finish(Err(error.clone()));
        }
        for Submitted { call, .. } in state.checking.drain(..) {
            call.finish(Err(error.clone()));
        }
        drop(lock(&self.incoming));
        self.ended.notify_all();
    }

    /// Whether calls are under way that this thread has to look after.
    fn is_busy(&self) -> bool {
        let is_open = |state: &State| !state.checking.is_empty() || !state.moving.is_empty();
        !lock(&self.incoming).is_empty()
            || match self.state.try_lock() {
                Ok(state) => is_open(&state),
                Err(TryLockError::Poisoned(poisoned)) => is_open(&poisoned.into_inner()),
                Err(TryLockError::WouldBlock) => false, // a caller looks after them
            }
    }

    /// Lets go of the group when it was closed and nothing is under way; whether it did.
    fn end_if_closed(&self) -> bool {
        if !self.closing.load(Ordering::Acquire) || self.is_busy() {
            return false;
        }
        self.core.close();
        true
    }
}

/// A thread that works on lanes.
#[derive(Debug)]
pub(crate) struct Runner {
    lanes: Mutex<Vec<Arc<Lane>>>,
    asleep: Mutex<bool>,
    work_came: Condvar,
    /// Whether it ends with its last lane.
    ends: bool,
}

impl Runner {
    /// Starts the thread, which runs `prepare` first. With `ends` it ends with its last lane.
    pub(crate) fn spawn(
        name: String,
        ends: bool,
        prepare: impl FnOnce() + Send + 'static,
    ) -> std::io::Result<Arc<Self>> {
        let runner = Arc::new(Self {
            lanes: Mutex::default(),
            asleep: Mutex::new(false),
            work_came: Condvar::new(),
            ends,
        });
        let ours = Arc::clone(&runner);
        // Not joined: it ends with its lanes, or with the process.
        drop(std::thread::Builder::new().name(name).spawn(move || {
            prepare();
            ours.run();
        })?);
        Ok(runner)
    }

    fn wake(&self) {
        let mut asleep = lock(&self.asleep);
        if std::mem::take(&mut *asleep) {
            self.work_came.notify_one();
        }
    }

    fn run(&self) {
        let mut had_lanes = false;
        let mut changed = Instant::now();
        loop {
            let lanes: Vec<Arc<Lane>> = lock(&self.lanes).clone();
            had_lanes |= !lanes.is_empty();
            let mut busy = false;
            for lane in &lanes {
                match lane.state.try_lock() {
                    Ok(mut state) => {
                        if lane.step(&mut state) {
                            changed = Instant::now();
                        }
                    }
                    Err(TryLockError::Poisoned(poisoned)) => drop(poisoned.into_inner()),
                    Err(TryLockError::WouldBlock) => {}
                }
                busy |= lane.is_busy();
            }
            lock(&self.lanes).retain(|lane| !lane.end_if_closed());
            if self.ends && had_lanes && lock(&self.lanes).is_empty() {
                return;
            }
            if busy && changed.elapsed() < EAGER {
                std::thread::yield_now();
                continue;
            }
            let mut asleep = lock(&self.asleep);
            *asleep = true;
            let limit = if busy { NAP } else { IDLE };
            let waited = self.work_came.wait_timeout(asleep, limit);
            *waited.unwrap_or_else(PoisonError::into_inner).0 = false;
        }
    }
}
