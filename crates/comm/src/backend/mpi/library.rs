//! MPI in this process: initialised once, ended once, and who may call it.
//!
//! One thread, the *owner*, initialises MPI, runs all lanes, and finalises it. When MPI grants
//! `MPI_THREAD_MULTIPLE`, callers that wait call it as well; otherwise nobody but the owner does.
//!
//! MPI is finalised when the process exits in good order. Ranks wait for each other there, so that has a
//! time limit, and is left out after a failure that a peer may not survive: `mpirun` then says that a
//! rank ended without it, which is true.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{mpsc, Arc, OnceLock, PoisonError, RwLock, RwLockReadGuard};
use std::time::{Duration, Instant};

use super::ffi::{self, Communicator, MpiError};
use crate::error::guarded;
use crate::error::{Error, Result};
use crate::lane::runner::Runner;

/// How long exiting waits for works that were started and for the other ranks.
const EXIT_MAX: Duration = Duration::from_secs(10);
/// The same after a failure that all ranks may have survived.
const EXIT_AFTER_FAILURE_MAX: Duration = Duration::from_secs(2);
/// How long a set-up call waits between looks whether the group has failed.
const LOOK: Duration = Duration::from_millis(20);

/// MPI, initialised.
#[derive(Debug)]
pub(super) struct Library {
    pub(super) runner: Arc<Runner>,
    /// Whether every thread may call MPI.
    pub(super) multiple: bool,
    pub(super) world: Communicator,
    pub(super) rank: usize,
    pub(super) size: usize,
    /// Its name and version.
    pub(super) version: String,
    /// Whether it may be called: not from the moment on at which it is finalised.
    open: RwLock<bool>,
    /// A peer is gone, or MPI hangs: nothing may wait for all ranks.
    spoilt: AtomicBool,
    /// A group has failed: its ranks may not all come to the end.
    doubtful: AtomicBool,
    finalized: AtomicBool,
}

/// Set once; the text says why there is none.
static LIBRARY: OnceLock<Result<Library, String>> = OnceLock::new();

fn unavailable(what: impl Into<String>) -> Error {
    Error::NoBackend { backend: "mpi", what: what.into() }
}

/// MPI, initialised by the first caller. Ranks wait for each other there, until `deadline`.
pub(super) fn get(deadline: Instant) -> Result<&'static Library> {
    let library = LIBRARY.get_or_init(|| start(deadline));
    library.as_ref().map_err(|what| unavailable(what.clone()))
}

/// Whether the library takes addresses of a GPU: it says so itself (Open MPI, MPICH and MVAPICH do), unless the
/// environment does.
pub(super) fn is_cuda_aware() -> Result<bool> {
    let said =
        crate::environment::mpi_cuda_aware().map_err(|error| unavailable(error.to_string()))?;
    Ok(said.unwrap_or_else(ffi::says_cuda_aware))
}

fn start(deadline: Instant) -> Result<Library, String> {
    if !crate::environment::is_started_by_mpi() && !ffi::is_initialized() {
        return Err("this process was not started by an MPI launcher: start it with \
                    `mpirun -n 4 PROGRAM` or `srun --mpi=pmix -n4 PROGRAM`"
            .to_owned());
    }
    let threads = crate::environment::mpi_threads().map_err(|error| error.to_string())?;
    let (sender, receiver) = mpsc::channel();
    let prepare = move || {
        // The receiver is gone only when the time was over.
        drop(sender.send(initialize(threads)));
    };
    let runner = Runner::spawn("phalanx-mpi".to_owned(), false, prepare)
        .map_err(|error| format!("its thread could not be started: {error}"))?;
    let left = deadline.saturating_duration_since(Instant::now());
    let initialized = receiver.recv_timeout(left).map_err(|_late| {
        format!(
            "MPI_Init_thread did not return in {left:?}: every rank of the job must start MPI; look \
             for one that has died or does something else"
        )
    })?;
    let (multiple, world, rank, size, ours) = initialized.map_err(|error| error.to_string())?;
    if ours && !ffi::at_exit(at_exit) {
        tracing::warn!("MPI will not be finalised: atexit has no room");
    }
    let version = ffi::version();
    tracing::info!(library = version, multiple, rank, size, "MPI is initialised");
    Ok(Library {
        runner,
        multiple,
        world,
        rank,
        size,
        version,
        open: RwLock::new(true),
        spoilt: AtomicBool::new(false),
        doubtful: AtomicBool::new(false),
        finalized: AtomicBool::new(false),
    })
}

type Initialized = (bool, Communicator, usize, usize, bool);

fn initialize(multiple: bool) -> Result<Initialized, MpiError> {
    if ffi::is_finalized() {
        let what = "MPI was finalised in this process, and cannot be started again".to_owned();
        return Err(MpiError { call: "MPI_Finalized", code: 0, what });
    }
    let ours = !ffi::is_initialized();
    let multiple = if ours { ffi::init(multiple)? } else { ffi::granted()? };
    if !ours && !multiple {
        let what =
            "the program has initialised MPI without MPI_THREAD_MULTIPLE: initialise it with, \
                    or leave it to phalanx";
        return Err(MpiError { call: "MPI_Query_thread", code: 0, what: what.to_owned() });
    }
    let world = ffi::world()?;
    Ok((multiple, world, world.rank()?, world.size()?, ours))
}

impl Library {
    /// The right to call MPI, while it is held.
    pub(super) fn enter(&self, rank: usize) -> Result<RwLockReadGuard<'_, bool>> {
        let open = self.open.read().unwrap_or_else(PoisonError::into_inner);
        if *open {
            return Ok(open);
        }
        let what = "MPI was finalised: the process is exiting".to_owned();
        Err(Error::Backend { rank, backend: "mpi", call: "a collective".to_owned(), what })
    }

    /// A group has failed, for this reason.
    pub(super) fn group_failed(&self, error: Option<&Error>) {
        self.doubtful.store(true, Ordering::Release);
        let all_live = matches!(
            error,
            Some(
                Error::OutOfStep { .. }
                    | Error::Aborted { .. }
                    | Error::PeerLeft { .. }
                    | Error::Timeout { .. }
            )
        );
        if !all_live {
            self.spoilt.store(true, Ordering::Release);
        }
    }

    /// Runs what waits for other ranks, on a thread that may call MPI, until `deadline` or until
    /// `gives_up` says so.
    pub(super) fn set_up<T: Send + 'static>(
        &self,
        rank: usize,
        deadline: Instant,
        gives_up: impl Fn() -> Option<Error>,
        job: impl FnOnce() -> Result<T, MpiError> + Send + 'static,
    ) -> Result<T> {
        let backend = |call: &str, what: String| Error::Backend {
            rank,
            backend: "mpi",
            call: call.to_owned(),
            what,
        };
        let (sender, receiver) = mpsc::channel();
        // The receiver is gone only when the time was over.
        let job = move || drop(sender.send(guarded(rank, &"mpi", || Ok(job()))));
        if self.multiple {
            let thread = std::thread::Builder::new().name("phalanx-mpi-setup".to_owned());
            drop(thread.spawn(job).map_err(|error| Error::system(rank, "start a thread", error))?);
        } else {
            self.runner.ask(Box::new(job));
        }
        loop {
            match receiver.recv_timeout(LOOK) {
                Ok(Ok(Ok(value))) => return Ok(value),
                Ok(Ok(Err(MpiError { call, code, what }))) => {
                    return Err(backend(call, format!("{what} (code {code})")))
                }
                Ok(Err(panic)) => return Err(panic),
                Err(_) => {}
            }
            let late = || backend("set-up", "the other ranks did not come in time".to_owned());
            let error = gives_up().or_else(|| (Instant::now() >= deadline).then(late));
            if let Some(error) = error {
                self.group_failed(None);
                return Err(error);
            }
        }
    }

    fn finalize(&'static self) {
        let doubtful = self.doubtful.load(Ordering::Acquire);
        let limit = if doubtful { EXIT_AFTER_FAILURE_MAX } else { EXIT_MAX };
        let deadline = Instant::now() + limit;
        // Groups that live are closed as if they had been dropped.
        super::close_lanes(limit);
        if self.spoilt.load(Ordering::Acquire) || !self.runner.has_no_lanes() {
            return;
        }
        self.runner.ask(Box::new(|| {
            *self.open.write().unwrap_or_else(PoisonError::into_inner) = false;
            if let Err(error) = ffi::finalize() {
                tracing::debug!(%error, "MPI could not be finalised");
            }
            self.finalized.store(true, Ordering::Release);
        }));
        until(deadline, || self.finalized.load(Ordering::Acquire));
    }

    /// Waits until no group is open, or nothing may be waited for.
    pub(super) fn await_lanes(&self, limit: Duration) {
        let spoilt = || self.spoilt.load(Ordering::Acquire);
        until(Instant::now() + limit, || self.runner.has_no_lanes() || spoilt());
    }
}

/// Waits, while the process exits.
fn until(deadline: Instant, done: impl Fn() -> bool) {
    while !done() && Instant::now() < deadline {
        // Thread-local storage is gone by now: nothing of std that parks.
        let limit = rustix::time::Timespec { tv_sec: 0, tv_nsec: 1_000_000 };
        rustix::event::poll(&mut [], Some(&limit)).ok();
    }
}

/// MPI, if it was initialised.
pub(super) fn started() -> Option<&'static Library> {
    LIBRARY.get()?.as_ref().ok()
}

extern "C" fn at_exit() {
    let finalize = || {
        if let Some(library) = started() {
            library.finalize();
        }
    };
    // Nobody is left to hear of a panic.
    drop(std::panic::catch_unwind(finalize));
}
