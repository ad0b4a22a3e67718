//! A communicator: every call checked, none of them waits without a deadline.
//!
//! Communicators are made non-blocking: a call that NCCL has not finished says *in progress*, and
//! [`Communicator::settle`] asks until it has, or gives up. After an error all communicators of the
//! process are aborted inside one group call, as NCCL asks for (one by one they can wait for each other).
#![expect(unsafe_code, reason = "gate: calls of libnccl")]

use std::ffi::{c_int, c_void};
use std::mem::offset_of;
use std::sync::atomic::{AtomicPtr, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use cudarc::nccl::sys::{cudaStream_t, ncclComm_t, ncclConfig_t, ncclUniqueId};

use super::library::{Nccl, IN_PROGRESS, SUCCESS};
use crate::dtype::DType;

/// A failed call: its name, and what NCCL said and what to do.
#[derive(Debug)]
pub(crate) struct NcclError {
    pub(crate) call: &'static str,
    pub(crate) what: String,
}

type Result<T> = std::result::Result<T, NcclError>;

/// How long NCCL may take to accept a call (not: to carry it out).
const SETTLE: Duration = Duration::from_secs(20);
/// How long an orderly end may take before it becomes an abort.
const FINALIZE: Duration = Duration::from_secs(5);
/// Between two questions.
const PAUSE: Duration = Duration::from_micros(100);

/// The communicators of this process, for [`abort_all`].
static ALIVE: Mutex<Vec<Handle>> = Mutex::new(Vec::new());

/// Why [`abort_all`] was called last.
static CAUSE: Mutex<String> = Mutex::new(String::new());

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Handle(ncclComm_t);
// SAFETY: NCCL allows the calls that are made with it here from every thread, one at a time.
unsafe impl Send for Handle {}
// SAFETY: as for Send; the list of live communicators makes the calls one at a time.
unsafe impl Sync for Handle {}

/// A rank's side of an NCCL communicator.
#[derive(Debug)]
pub(crate) struct Communicator {
    nccl: &'static Nccl,
    raw: Handle,
}

/// `ncclConfig_t` with everything undefined (`NCCL_CONFIG_INITIALIZER`), but not blocking, and no
/// longer than the library knows it.
fn config(version: i32) -> ncclConfig_t {
    const UNDEFINED: c_int = c_int::MIN;
    const MAGIC: u32 = 0xcafe_beef;
    let size = match version {
        23_000.. => size_of::<ncclConfig_t>(),
        22_900.. => offset_of!(ncclConfig_t, maxP2pPeers),
        22_800.. => offset_of!(ncclConfig_t, graphUsageMode),
        22_700.. => offset_of!(ncclConfig_t, nChannelsPerNetPeer),
        22_600.. => offset_of!(ncclConfig_t, commName),
        _ => offset_of!(ncclConfig_t, trafficClass),
    };
    ncclConfig_t {
        size: size.next_multiple_of(align_of::<ncclConfig_t>()),
        magic: MAGIC,
        version: u32::try_from(version).unwrap_or(0),
        blocking: 0,
        cgaClusterSize: UNDEFINED,
        minCTAs: UNDEFINED,
        maxCTAs: UNDEFINED,
        netName: std::ptr::null(),
        splitShare: UNDEFINED,
        trafficClass: UNDEFINED,
        commName: std::ptr::null(),
        collnetEnable: UNDEFINED,
        CTAPolicy: UNDEFINED,
        shrinkShare: UNDEFINED,
        nvlsCTAs: UNDEFINED,
        nChannelsPerNetPeer: UNDEFINED,
        nvlinkCentricSched: UNDEFINED,
        graphUsageMode: UNDEFINED,
        numRmaCtx: UNDEFINED,
        maxP2pPeers: UNDEFINED,
    }
}

impl Communicator {
    /// Joins the communicator of `id` on the current device, until `deadline`.
    pub(crate) fn join(
        nccl: &'static Nccl,
        id: ncclUniqueId,
        rank: usize,
        world_size: usize,
        deadline: Instant,
    ) -> Result<Self> {
        let mut config = config(nccl.version_number());
        let mut raw: ncclComm_t = std::ptr::null_mut();
        let (rank, world_size) = (number(rank), number(world_size));
        let init = nccl.functions.init_rank_config;
        // SAFETY: NCCL writes the handle, and copies the configuration before it returns.
        let code = unsafe { init(&raw mut raw, world_size, id, rank, &raw mut config) };
        let communicator = Self { nccl, raw: Handle(raw) };
        communicator.accepted("ncclCommInitRankConfig", code)?;
        lock_alive().push(communicator.raw);
        communicator.settle_until("ncclCommInitRankConfig", deadline)?;
        Ok(communicator)
    }

    /// Divides it: ranks of one `color` form another, in the order of `key`. Collective, and nothing else
    /// is under way on it. `None` for those without a color.
    pub(crate) fn split(
        &self,
        color: Option<c_int>,
        key: c_int,
        deadline: Instant,
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
        self.settle_until(CALL, deadline)?;
        let raw: ncclComm_t = place.load(Ordering::Acquire);
        if color.is_none() {
            return Ok(None);
        }
        if raw.is_null() {
            return Err(NcclError { call: CALL, what: "NCCL gave no communicator".to_owned() });
        }
        let part = Self { nccl: self.nccl, raw: Handle(raw) };
        lock_alive().push(part.raw);
        part.settle_until(CALL, deadline)?;
        Ok(Some(part))
    }

    /// Fails unless NCCL has taken the call.
    fn accepted(&self, call: &'static str, code: c_int) -> Result<()> {
        if code == SUCCESS || code == IN_PROGRESS {
            return Ok(());
        }
        Err(NcclError { call, what: self.nccl.explain(code) })
    }

    /// Makes a call on the communicator, unless it was aborted meanwhile, and nobody aborts it during it.
    pub(crate) fn checked(
        &self,
        call: &'static str,
        make: impl FnOnce(ncclComm_t) -> c_int,
    ) -> Result<()> {
        let alive = lock_alive();
        if !alive.contains(&self.raw) {
            let why = CAUSE.lock().unwrap_or_else(PoisonError::into_inner);
            let what = format!("aborted, because a group of this process has failed: {why}");
            return Err(NcclError { call, what });
        }
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

    fn settle_until(&self, call: &'static str, deadline: Instant) -> Result<()> {
        let mut looks = 0_u32;
        while self.state(call)?.is_none() {
            if Instant::now() >= deadline {
                let what = "NCCL did not finish this call in time: not all ranks made it, or they \
                            cannot reach each other (NCCL_SOCKET_IFNAME, NCCL_DEBUG=INFO)";
                return Err(NcclError { call, what: what.to_owned() });
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

    /// Waits until NCCL has taken the calls before: no new one may be made earlier.
    pub(crate) fn settle(&self, call: &'static str) -> Result<()> {
        self.settle_until(call, Instant::now() + SETTLE)
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

    /// Runs `body`, whose calls NCCL carries out as one.
    pub(crate) fn grouped(&self, body: impl FnOnce() -> Result<()>) -> Result<()> {
        let functions = &self.nccl.functions;
        // SAFETY: takes nothing.
        self.accepted("ncclGroupStart", unsafe { (functions.group_start)() })?;
        let result = body();
        // SAFETY: takes nothing; a started group is always ended.
        let ended = self.accepted("ncclGroupEnd", unsafe { (functions.group_end)() });
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

    /// Ends the communicator in good order, or aborts it when that takes too long.
    pub(crate) fn end(&self) {
        let functions = &self.nccl.functions;
        let call = "ncclCommFinalize";
        let asked = self.checked(call, |comm| {
            // SAFETY: a live communicator; only its own lane ends it.
            unsafe { (functions.finalize)(comm) }
        });
        let result = asked.and_then(|()| self.settle_until(call, Instant::now() + FINALIZE));
        // Whoever takes the handle off the list frees it.
        let mut alive = lock_alive();
        let before = alive.len();
        alive.retain(|handle| *handle != self.raw);
        if alive.len() == before {
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
        drop(alive);
        if code != SUCCESS && code != IN_PROGRESS {
            tracing::debug!(what = self.nccl.describe(code), "the end of a communicator");
        }
    }
}

/// Aborts every communicator of this process inside one group call, because of `cause`.
pub(crate) fn abort_all(nccl: &Nccl, cause: &str) {
    // A call that holds the list hangs in NCCL: an abort is what frees it.
    let deadline = Instant::now() + Duration::from_secs(2);
    let mut list = loop {
        match ALIVE.try_lock() {
            Ok(list) => break Some(list),
            Err(std::sync::TryLockError::Poisoned(poisoned)) => break Some(poisoned.into_inner()),
            Err(std::sync::TryLockError::WouldBlock) if Instant::now() < deadline => {
                std::thread::park_timeout(PAUSE);
            }
            Err(std::sync::TryLockError::WouldBlock) => break None,
        }
    };
    let Some(list) = &mut list else {
        tracing::error!("a call of NCCL hangs; its communicators cannot be aborted");
        return;
    };
    let alive = std::mem::take(&mut **list);
    if alive.is_empty() {
        return;
    }
    cause.clone_into(&mut CAUSE.lock().unwrap_or_else(PoisonError::into_inner));
    let functions = &nccl.functions;
    // SAFETY: takes nothing.
    let started = unsafe { (functions.group_start)() };
    for handle in &alive {
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

fn lock_alive() -> std::sync::MutexGuard<'static, Vec<Handle>> {
    // The list is valid after every statement.
    ALIVE.lock().unwrap_or_else(PoisonError::into_inner)
}

fn number(rank: usize) -> c_int {
    c_int::try_from(rank).unwrap_or(c_int::MAX)
}

/// `ncclDataType_t` of an element type.
pub(crate) const fn code_of(dtype: DType) -> c_int {
    match dtype {
        DType::U8 => 1,
        DType::I32 => 2,
        DType::I64 => 4,
        DType::F16 => 6,
        DType::F32 => 7,
        DType::F64 => 8,
        DType::BF16 => 9,
    }
}
