//! A communicator: every call checked, none of them waits without a deadline.
//!
//! Communicators are made non-blocking: a call that NCCL has not finished says *in progress*, and
//! [`Communicator::settle_until`] asks until it has, or gives up. After an error all communicators of the
//! process are aborted inside one group call, as NCCL asks for (one by one they can wait for each other).
#![expect(unsafe_code, reason = "gate: calls of libnccl")]

use std::cell::Cell;
use std::ffi::{c_int, c_void};
use std::sync::atomic::{AtomicPtr, Ordering};
use std::time::{Duration, Instant};

use cudarc::nccl::sys::{cudaStream_t, ncclComm_t, ncclUniqueId};

use super::alive::{self, Alive, Handle};
use super::config::{code_of, config};
use super::library::{Nccl, IN_PROGRESS, SUCCESS};
use crate::dtype::DType;

/// A failed call: its name, and what NCCL said and what to do.
#[derive(Debug)]
pub(crate) struct NcclError {
    pub(crate) call: &'static str,
    pub(crate) what: String,
    /// Whether its time was over.
    pub(crate) late: bool,
}

impl NcclError {
    pub(super) fn new(call: &'static str, what: impl Into<String>) -> Self {
        Self { call, what: what.into(), late: false }
    }
}

type Result<T> = std::result::Result<T, NcclError>;

/// How long an orderly end may take before it becomes an abort.
const FINALIZE: Duration = Duration::from_secs(5);
/// How long aborts wait for the list of communicators.
const ABORT: Duration = Duration::from_secs(2);
/// Between two questions.
const PAUSE: Duration = Duration::from_micros(100);

thread_local! {
    /// Whether this thread is inside a group call, and so holds the list.
    static IN_GROUP: Cell<bool> = const { Cell::new(false) };
}

/// A rank's side of an NCCL communicator.
#[derive(Debug)]
pub(crate) struct Communicator {
    nccl: &'static Nccl,
    raw: Handle,
}

impl Communicator {
    /// Joins the communicator of `id` on the current device, until `deadline` or until the caller
    /// gives up.
    pub(crate) fn join(
        nccl: &'static Nccl,
        id: ncclUniqueId,
        rank: usize,
        world_size: usize,
        deadline: Instant,
        gives_up: &dyn Fn() -> bool,
    ) -> Result<Self> {
        const CALL: &str = "ncclCommInitRankConfig";
        let mut config = config(nccl.version_number());
        let mut raw: ncclComm_t = std::ptr::null_mut();
        let (rank, world_size) = (number(rank), number(world_size));
        let init = nccl.functions.init_rank_config;
        // SAFETY: NCCL writes the handle, and copies the configuration before it returns.
        let code = unsafe { init(&raw mut raw, world_size, id, rank, &raw mut config) };
        let communicator = Self { nccl, raw: Handle(raw) };
        if !communicator.raw.0.is_null() {
            lock_alive(CALL)?.push(communicator.raw);
        }
        if let Err(error) = communicator.accepted(CALL, code) {
            communicator.abort(&error.what);
            return Err(error);
        }
        if let Err(error) = communicator.settle_until(CALL, deadline, gives_up) {
            // Alone: the process's other groups have nothing to do with it.
            communicator.abort(&error.what);
            return Err(error);
        }
        Ok(communicator)
    }

    /// Divides it: ranks of one `color` form another, in the order of `key`. Collective, and nothing else
    /// is under way on it. `None` for those without a color.
    pub(crate) fn split(
        &self,
        color: Option<c_int>,
        key: c_int,
        deadline: Instant,
        gives_up: &dyn Fn() -> bool,
    ) -> Result<Option<Self>> {
        const CALL: &str = "ncclCommSplit";
        const NO_COLOR: c_int = -1;
        let mut config = config(self.nccl.version_number());
        // NCCL writes the handle when this communicator is ready again, maybe after we gave up: then it
        // stays.
        let place: &'static AtomicPtr<_> =
            Box::leak(Box::new(AtomicPtr::new(std::ptr::null_mut())));
        let split = self.nccl.functions.split;
        self.checked(CALL, |comm| {
            // SAFETY: a live communicator; the place stays; the configuration is copied.
            unsafe { split(comm, color.unwrap_or(NO_COLOR), key, place.as_ptr(), &raw mut config) }
        })?;
        self.settle_until(CALL, deadline, gives_up)?;
        let raw: ncclComm_t = place.load(Ordering::Acquire);
        if color.is_none() {
            return Ok(None);
        }
        if raw.is_null() {
            return Err(NcclError::new(CALL, "NCCL gave no communicator"));
        }
        let part = Self { nccl: self.nccl, raw: Handle(raw) };
        lock_alive(CALL)?.push(part.raw);
        part.settle_until(CALL, deadline, gives_up)?;
        Ok(Some(part))
    }

    /// Fails unless NCCL has taken the call.
    fn accepted(&self, call: &'static str, code: c_int) -> Result<()> {
        if code == SUCCESS || code == IN_PROGRESS {
            return Ok(());
        }
        Err(NcclError::new(call, self.nccl.explain(code)))
    }

    /// Makes a call on the communicator, unless it was aborted meanwhile, and nobody aborts it during it.
    pub(crate) fn checked(
        &self,
        call: &'static str,
        make: impl FnOnce(ncclComm_t) -> c_int,
    ) -> Result<()> {
        if IN_GROUP.get() {
            // This thread holds the list, and has looked.
            return self.accepted(call, make(self.raw.0));
        }
        let alive = lock_alive(call)?;
        self.check_alive(call, &alive)?;
        let code = make(self.raw.0);
        drop(alive);
        self.accepted(call, code)
    }

    /// What the communicator's state is: `None` while a call is in progress.
    pub(crate) fn state(&self, call: &'static str) -> Result<Option<()>> {
        let mut state = SUCCESS;
        self.checked(call, |comm| {
            // SAFETY: a live communicator; writes one number.
            unsafe { (self.nccl.functions.get_async_error)(comm, &raw mut state) }
        })?;
        self.accepted(call, state)?;
        Ok((state == SUCCESS).then_some(()))
    }

    /// Waits until NCCL has taken the calls before: no new one may be made earlier.
    pub(crate) fn settle_until(
        &self,
        call: &'static str,
        deadline: Instant,
        gives_up: &dyn Fn() -> bool,
    ) -> Result<()> {
        let mut looks = 0_u32;
        while self.state(call)?.is_none() {
            if gives_up() {
                return Err(NcclError::new(call, "given up: the group has failed meanwhile"));
            }
            if Instant::now() >= deadline {
                let what = "NCCL did not finish this call in time: not all ranks made it, or they \
                            cannot reach each other (NCCL_SOCKET_IFNAME, NCCL_DEBUG=INFO)";
                return Err(NcclError { late: true, ..NcclError::new(call, what) });
            }
            looks += 1;
            if looks > 1000 {
                std::thread::park_timeout(PAUSE);
            } else {
                std::hint::spin_loop();
            }
        }
        Ok(())
    }

    /// Makes a call when nothing is in progress on the communicator, and lets nobody start anything during
    /// it; for what NCCL does not guard against its own launches. `None`: it is in progress until `deadline`.
    pub(crate) fn when_settled(
        &self,
        call: &'static str,
        deadline: Instant,
        make: impl FnOnce(ncclComm_t) -> c_int,
    ) -> Result<Option<()>> {
        loop {
            let alive = lock_alive(call)?;
            self.check_alive(call, &alive)?;
            let mut state = SUCCESS;
            // SAFETY: a live communicator; writes one number.
            let code = unsafe { (self.nccl.functions.get_async_error)(self.raw.0, &raw mut state) };
            self.accepted(call, code).and_then(|()| self.accepted(call, state))?;
            if state == SUCCESS {
                let made = make(self.raw.0);
                drop(alive);
                return self.accepted(call, made).map(Some);
            }
            drop(alive);
            if Instant::now() >= deadline {
                return Ok(None);
            }
            std::thread::park_timeout(PAUSE);
        }
    }

    fn check_alive(&self, call: &'static str, alive: &[Handle]) -> Result<()> {
        if alive.contains(&self.raw) {
            return Ok(());
        }
        let why = alive::cause();
        let what = format!("aborted, because a group of this process has failed: {why}");
        Err(NcclError::new(call, what))
    }

    pub(crate) fn all_reduce(
        &self,
        at: *mut c_void,
        count: usize,
        dtype: DType,
        op: c_int,
        stream: cudaStream_t,
    ) -> Result<()> {
        let call = self.nccl.functions.all_reduce;
        self.checked("ncclAllReduce", |comm| {
            // SAFETY: the transport's caller answers for the memory; it stays until the call is passed.
            unsafe { call(at, at, count, code_of(dtype), op, comm, stream) }
        })
    }

    pub(crate) fn reduce(
        &self,
        at: *mut c_void,
        count: usize,
        dtype: DType,
        (op, root): (c_int, usize),
        stream: cudaStream_t,
    ) -> Result<()> {
        let call = self.nccl.functions.reduce;
        let root = number(root);
        self.checked("ncclReduce", |comm| {
            // SAFETY: as in all_reduce.
            unsafe { call(at, at, count, code_of(dtype), op, root, comm, stream) }
        })
    }

    /// `from`: all segments; `to`: this rank's, `count` elements.
    pub(crate) fn reduce_scatter(
        &self,
        (from, to): (*mut c_void, *mut c_void),
        count: usize,
        dtype: DType,
        op: c_int,
        stream: cudaStream_t,
    ) -> Result<()> {
        let call = self.nccl.functions.reduce_scatter;
        self.checked("ncclReduceScatter", |comm| {
            // SAFETY: as in all_reduce.
            unsafe { call(from, to, count, code_of(dtype), op, comm, stream) }
        })
    }

    pub(crate) fn broadcast(
        &self,
        at: *mut c_void,
        count: usize,
        dtype: DType,
        root: usize,
        stream: cudaStream_t,
    ) -> Result<()> {
        let call = self.nccl.functions.broadcast;
        self.checked("ncclBroadcast", |comm| {
            // SAFETY: as in all_reduce.
            unsafe { call(at, at, count, code_of(dtype), number(root), comm, stream) }
        })
    }

    /// `from`: this rank's segment of `count` elements; `to`: all of them.
    pub(crate) fn all_gather(
        &self,
        (from, to): (*mut c_void, *mut c_void),
        count: usize,
        dtype: DType,
        stream: cudaStream_t,
    ) -> Result<()> {
        let call = self.nccl.functions.all_gather;
        self.checked("ncclAllGather", |comm| {
            // SAFETY: as in all_reduce.
            unsafe { call(from, to, count, code_of(dtype), comm, stream) }
        })
    }

    pub(crate) fn send(
        &self,
        from: *mut c_void,
        count: usize,
        dtype: DType,
        peer: usize,
        stream: cudaStream_t,
    ) -> Result<()> {
        let call = self.nccl.functions.send;
        self.checked("ncclSend", |comm| {
            // SAFETY: as in all_reduce.
            unsafe { call(from, count, code_of(dtype), number(peer), comm, stream) }
        })
    }

    pub(crate) fn receive(
        &self,
        to: *mut c_void,
        count: usize,
        dtype: DType,
        peer: usize,
        stream: cudaStream_t,
    ) -> Result<()> {
        let call = self.nccl.functions.receive;
        self.checked("ncclRecv", |comm| {
            // SAFETY: as in all_reduce.
            unsafe { call(to, count, code_of(dtype), number(peer), comm, stream) }
        })
    }

    /// Runs `body`, whose calls NCCL carries out as one. Nobody aborts the communicator meanwhile: the end
    /// of a group works on it too.
    pub(crate) fn grouped(&self, body: impl FnOnce() -> Result<()>) -> Result<()> {
        const START: &str = "ncclGroupStart";
        let functions = &self.nccl.functions;
        let outermost = !IN_GROUP.get();
        let alive = outermost.then(|| lock_alive(START)).transpose()?;
        if let Some(alive) = &alive {
            self.check_alive(START, alive)?;
        }
        // SAFETY: takes nothing.
        self.accepted(START, unsafe { (functions.group_start)() })?;
        IN_GROUP.set(true);
        let mut started = StartedGroup { nccl: Some(self.nccl), outermost };
        let result = body();
        let ended = self.accepted("ncclGroupEnd", started.end());
        drop(alive);
        result.and(ended)
    }

    /// A sum whose inputs are multiplied by `factor` (of `dtype`'s bytes) first.
    pub(crate) fn scaled_sum(&self, factor: &[u8], dtype: DType) -> Result<c_int> {
        const HOST_IMMEDIATE: c_int = 1;
        let mut op: c_int = 0;
        let mut factor = factor.to_vec();
        let create = self.nccl.functions.create_scaled_sum;
        let at: *mut c_void = factor.as_mut_ptr().cast();
        let dtype = code_of(dtype);
        let place = &raw mut op;
        self.checked("ncclRedOpCreatePreMulSum", |comm| {
            // SAFETY: NCCL reads the factor before it returns and writes the operation's number.
            unsafe { create(place, at, dtype, HOST_IMMEDIATE, comm) }
        })?;
        Ok(op)
    }

    /// Lets go of a scaled sum, whose calls NCCL has all taken.
    pub(crate) fn forget_sum(&self, op: c_int) -> Result<()> {
        self.checked("ncclRedOpDestroy", |comm| {
            // SAFETY: made by scaled_sum of this communicator, and let go once.
            unsafe { (self.nccl.functions.destroy_sum)(op, comm) }
        })
    }

    /// Aborts this communicator alone, because of `cause`.
    fn abort(&self, cause: &str) {
        if alive::remove(self.raw) {
            alive::set_cause(cause);
            // SAFETY: taken off the list by us; never used again.
            let code = unsafe { (self.nccl.functions.abort)(self.raw.0) };
            tracing::debug!(code, "ncclCommAbort");
        }
    }

    /// Ends the communicator in good order, or aborts it when that takes too long.
    pub(crate) fn end(&self) {
        let functions = &self.nccl.functions;
        let call = "ncclCommFinalize";
        let asked = self.checked(call, |comm| {
            // SAFETY: a live communicator; only its own lane ends it.
            unsafe { (functions.finalize)(comm) }
        });
        let result =
            asked.and_then(|()| self.settle_until(call, Instant::now() + FINALIZE, &|| false));
        // Whoever takes the handle off the list frees it.
        // Other groups go on while this one is taken apart.
        if !alive::remove(self.raw) {
            return;
        }
        let code = match result {
            // SAFETY: finalized; never used again.
            Ok(()) => unsafe { (functions.destroy)(self.raw.0) },
            Err(error) => {
                tracing::warn!(
                    what = error.what,
                    "a communicator is aborted: it could not be finalized"
                );
                // SAFETY: never used again.
                unsafe { (functions.abort)(self.raw.0) }
            }
        };
        if code != SUCCESS && code != IN_PROGRESS {
            tracing::debug!(what = self.nccl.describe(code), "the end of a communicator");
        }
    }
}

/// A group call that has been started, and is ended in whatever way its body ends: an abort after a panic would be a part of it.
struct StartedGroup {
    /// `None` when it was ended.
    nccl: Option<&'static Nccl>,
    outermost: bool,
}

impl StartedGroup {
    fn end(&mut self) -> c_int {
        let Some(nccl) = self.nccl.take() else { return SUCCESS };
        IN_GROUP.set(!self.outermost);
        // SAFETY: takes nothing; a started group is always ended.
        unsafe { (nccl.functions.group_end)() }
    }
}

impl Drop for StartedGroup {
    fn drop(&mut self) {
        self.end();
    }
}

/// Aborts every communicator of this process inside one group call, because of `cause`.
pub(crate) fn abort_all(nccl: &Nccl, cause: &str) {
    // A call that holds the list hangs in NCCL: an abort is what frees it.
    let Some(mut list) = alive::lock_for(ABORT) else {
        tracing::error!("a call of NCCL hangs; its communicators cannot be aborted");
        return;
    };
    let taken = std::mem::take(&mut *list);
    if taken.is_empty() {
        return;
    }
    alive::set_cause(cause);
    // An abort may wait for the device; the other groups hear at once that theirs are gone.
    drop(list);
    let functions = &nccl.functions;
    // SAFETY: takes nothing.
    let started = unsafe { (functions.group_start)() };
    for handle in &taken {
        // SAFETY: taken off the list by us, so nobody else ends it; a call that another thread has under
        // way on it returns an error.
        let code = unsafe { (functions.abort)(handle.0) };
        tracing::debug!(code, "ncclCommAbort");
    }
    if started == SUCCESS {
        // SAFETY: takes nothing.
        let code = unsafe { (functions.group_end)() };
        tracing::debug!(code, "ncclGroupEnd after aborts");
    }
}

/// The list of live communicators, for a call.
fn lock_alive(call: &'static str) -> Result<Alive> {
    let hangs = "another call of NCCL in this process holds its communicators and does not return";
    alive::lock().ok_or_else(|| NcclError { late: true, ..NcclError::new(call, hangs) })
}

fn number(rank: usize) -> c_int {
    c_int::try_from(rank).unwrap_or(c_int::MAX)
}
