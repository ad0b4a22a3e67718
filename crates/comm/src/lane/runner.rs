//! The thread that polls lanes, so that data moves while callers compute.

use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::Lane;

/// How long it looks again and again before it sleeps between looks.
const EAGER: Duration = Duration::from_micros(200);
/// Between two looks after that, while calls are under way.
const NAP: Duration = Duration::from_micros(50);
/// How long it stays light asleep after work.
const DOZING: Duration = Duration::from_millis(100);
/// Between two looks meanwhile.
const DOZE: Duration = Duration::from_millis(2);
/// Between two looks after that: whatever comes wakes it.
const SLEEP: Duration = Duration::from_secs(1);

/// What only the runner's thread may do.
type Job = Box<dyn FnOnce() + Send>;

pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // What these protect is valid after every statement.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
enum Rest {
    #[default]
    Awake,
    /// It looks soon by itself.
    Dozing,
    Asleep,
}

/// Whether somebody called since its last sleep.
type Called = bool;

/// A thread that works on lanes.
pub(crate) struct Runner {
    lanes: Mutex<Vec<Arc<Lane>>>,
    jobs: Mutex<VecDeque<Job>>,
    rest: Mutex<(Rest, Called)>,
    work_came: Condvar,
    /// Whether it ends with its last lane.
    ends: bool,
}

impl std::fmt::Debug for Runner {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Runner").field("ends", &self.ends).finish_non_exhaustive()
    }
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
            jobs: Mutex::default(),
            rest: Mutex::default(),
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

    pub(super) fn adopt(&self, lane: Arc<Lane>) {
        lock(&self.lanes).push(lane);
        self.wake();
    }

    /// Has the thread do something between two looks.
    #[cfg(feature = "mpi")]
    pub(crate) fn ask(&self, job: Job) {
        lock(&self.jobs).push_back(job);
        self.wake();
    }

    /// Whether all groups are closed.
    #[cfg(feature = "mpi")]
    pub(crate) fn has_no_lanes(&self) -> bool {
        lock(&self.lanes).is_empty()
    }

    pub(super) fn wake(&self) {
        let mut rest = lock(&self.rest);
        rest.1 = true;
        if rest.0 != Rest::Awake {
            self.work_came.notify_one();
        }
    }

    /// Wakes it unless it soon looks by itself.
    pub(super) fn wake_from_sleep(&self) {
        let mut rest = lock(&self.rest);
        if rest.0 == Rest::Dozing {
            return;
        }
        rest.1 = true;
        if rest.0 == Rest::Asleep {
            self.work_came.notify_one();
        }
    }

    fn run(&self) {
        let mut had_lanes = false;
        let mut moved = Instant::now();
        let mut polled = Instant::now();
        loop {
            while let Some(job) = { lock(&self.jobs).pop_front() } {
                job();
            }
            let lanes: Vec<Arc<Lane>> = lock(&self.lanes).clone();
            had_lanes |= !lanes.is_empty();
            let idle_poll = lanes.iter().filter_map(|lane| lane.idle_poll).min();
            let idle = idle_poll.is_some_and(|every| polled.elapsed() >= every);
            if idle {
                polled = Instant::now();
            }
            let mut busy = false;
            for lane in &lanes {
                let look = lane.look(idle);
                busy |= look.busy;
                if look.moved {
                    moved = Instant::now();
                }
            }
            let over: Vec<_> = lanes.into_iter().filter(Lane::end_if_closed).collect();
            if !over.is_empty() {
                let is_over = |lane: &Arc<Lane>| over.iter().any(|one| Arc::ptr_eq(one, lane));
                lock(&self.lanes).retain(|lane| !is_over(lane));
            }
            if self.ends && had_lanes && lock(&self.lanes).is_empty() {
                return;
            }
            if busy && moved.elapsed() < EAGER {
                std::thread::yield_now();
                continue;
            }
            let (rest, limit) = match (busy, moved.elapsed() < DOZING) {
                (true, _) => (Rest::Dozing, NAP),
                (false, true) => (Rest::Dozing, DOZE),
                (false, false) => (Rest::Asleep, idle_poll.unwrap_or(SLEEP)),
            };
            if self.sleep(rest, limit) {
                moved = Instant::now();
            }
        }
    }

    /// Sleeps unless somebody has called since the last time; whether somebody did.
    fn sleep(&self, depth: Rest, limit: Duration) -> Called {
        let mut rest = lock(&self.rest);
        if !rest.1 {
            rest.0 = depth;
            rest =
                self.work_came.wait_timeout(rest, limit).unwrap_or_else(PoisonError::into_inner).0;
        }
        rest.0 = Rest::Awake;
        std::mem::take(&mut rest.1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::call::{Call, CallMemory};
    use crate::control::liveness::Liveness;
    use crate::dtype::DType;
    use crate::environment::{HostLink, World};
    use crate::error::Error;
    use crate::fingerprint::{CallRecord, Op};
    use crate::lane::{Check, Mover};
    use crate::order::executor::Carry;
    use crate::order::setup;
    use crate::recorder::GroupPart;

    /// What a library does with calls.
    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    enum Manner {
        /// It carries out each at once.
        Quick,
        /// It carries out each once the log has said twice that it waits.
        Slow,
        /// It carries out none.
        Panics,
    }

    #[derive(Debug)]
    struct Library {
        manner: Manner,
        started: Vec<Arc<Call>>,
    }

    fn library(manner: Manner) -> Library {
        Library { manner, started: Vec::new() }
    }

    impl Mover for Library {
        fn start(&mut self, call: &Arc<Call>, _: &mut CallMemory) -> crate::Result<()> {
            if self.manner == Manner::Panics {
                std::panic::panic_any("no such symbol");
            }
            self.started.push(Arc::clone(call));
            Ok(())
        }

        fn poll(&mut self, ended: &mut Vec<usize>) -> crate::Result<bool> {
            let is_ready = |call: &Arc<Call>| self.manner != Manner::Slow || call.reminded() >= 2;
            if self.started.iter().all(is_ready) {
                ended.extend(0..std::mem::take(&mut self.started).len());
            }
            Ok(!ended.is_empty())
        }

        fn abandon(&mut self, _: &Error) {
            assert!(self.manner != Manner::Panics, "again");
        }
    }

    fn call(runner: &Arc<Runner>, callers_drive: bool, library: Library) -> crate::Result<()> {
        let limit = Duration::from_secs(20);
        let liveness = Liveness {
            heartbeat: limit,
            dead_after: limit,
            remind_after: Duration::from_millis(1),
        };
        let nobody: &mut setup::Exchange<'_> = &mut |_, _| Ok(Vec::new());
        let (mut world, part) = (World::single(), GroupPart::whole(1));
        let (link, carry): (_, Carry) = (HostLink::Auto, |_, _| Ok(()));
        let terms = setup::Terms { link, timeout: limit, liveness, carry };
        let core = setup::connect(&mut world, terms, part, nobody)?;
        let lane = Lane::new("test", core, runner, callers_drive, Box::new(library));
        let record = CallRecord {
            op: Op::Barrier,
            seq: 0,
            dtype: None,
            len: 0,
            reduction: "",
            root: None,
            tag: String::new(),
        };
        let call = Call::new(record, DType::U8, None, 0, 1, false, limit, CallMemory::Nothing);
        let call = Arc::new(call);
        lane.submit(Arc::clone(&call), Check::None);
        lane.wait(&call)?;
        let result = call.lock().result.clone();
        lane.close();
        result.expect("it has ended")
    }

    #[test]
    fn a_panic_in_the_library_is_an_error_and_other_groups_go_on() {
        let runner = Runner::spawn("phalanx-test".to_owned(), false, || ()).unwrap();
        for callers_drive in [false, true] {
            let error =
                call(&runner, callers_drive, library(Manner::Panics)).unwrap_err().to_string();
            assert!(error.contains("no such symbol"), "{error}");
            call(&runner, callers_drive, library(Manner::Quick)).unwrap();
        }
    }

    #[test]
    fn a_library_that_takes_long_is_spoken_of_and_waited_for() {
        let runner = Runner::spawn("phalanx-test".to_owned(), false, || ()).unwrap();
        for callers_drive in [false, true] {
            call(&runner, callers_drive, library(Manner::Slow)).unwrap();
        }
    }
}
