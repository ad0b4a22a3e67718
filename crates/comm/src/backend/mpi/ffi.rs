//! MPI's C interface, checked: every return code is looked at, and comes with the library's own text.
#![expect(unsafe_code, reason = "calls of a C library")]

use std::ffi::{c_char, c_int, c_void};
use std::ptr;

use mpi::ffi;

/// A call that MPI refused.
#[derive(Debug, Clone, thiserror::Error)]
#[error("{call}: {what} (code {code})")]
pub(super) struct MpiError {
    pub(super) call: &'static str,
    pub(super) code: c_int,
    pub(super) what: String,
}

pub(super) type Result<T, E = MpiError> = std::result::Result<T, E>;

/// A communicator's handle.
#[derive(Debug, Clone, Copy)]
pub(super) struct Communicator(ffi::MPI_Comm);

// SAFETY: a handle is a number or the address of the library's own object; which threads may use it
// is decided by the granted thread level, which `library` heeds.
unsafe impl Send for Communicator {}
// SAFETY: as for Send.
unsafe impl Sync for Communicator {}

/// An operation under way.
#[derive(Debug)]
pub(super) struct MpiRequest(ffi::MPI_Request);

// SAFETY: as for Communicator; a request is used by whoever holds it.
unsafe impl Send for MpiRequest {}

/// The caller's memory, as an address.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct MpiAddress(pub(super) *mut u8);

// SAFETY: an address; whoever passes it on to MPI answers for the memory.
unsafe impl Send for MpiAddress {}

impl MpiAddress {
    pub(super) fn at(self, byte: usize) -> Self {
        Self(self.0.wrapping_add(byte))
    }
}

fn check(call: &'static str, code: c_int) -> Result<()> {
    if code == ffi::MPI_SUCCESS.cast_signed() {
        return Ok(());
    }
    let mut text = [0_u8; 2048];
    let mut length: c_int = 0;
    // SAFETY: the buffer is longer than MPI_MAX_ERROR_STRING of any library.
    unsafe { ffi::MPI_Error_string(code, text.as_mut_ptr().cast::<c_char>(), &raw mut length) };
    Err(MpiError { call, code, what: string(&text, length) })
}

fn string(text: &[u8], length: c_int) -> String {
    let length = usize::try_from(length).unwrap_or(0).min(text.len());
    String::from_utf8_lossy(&text[..length]).trim_end_matches('\0').trim().to_owned()
}

/// A length or a rank as MPI has it; longer messages are cut by the callers.
pub(super) fn int(value: usize) -> c_int {
    c_int::try_from(value).unwrap_or(c_int::MAX)
}

fn bytes_type() -> ffi::MPI_Datatype {
    // SAFETY: a constant of the library.
    unsafe { ffi::RSMPI_UINT8_T }
}

/// Whether somebody has initialised MPI in this process.
pub(super) fn is_initialized() -> bool {
    let mut flag = 0;
    // SAFETY: may be called at any time.
    unsafe { ffi::MPI_Initialized(&raw mut flag) };
    flag != 0
}

/// Whether somebody has finalised it.
pub(super) fn is_finalized() -> bool {
    let mut flag = 0;
    // SAFETY: may be called at any time.
    unsafe { ffi::MPI_Finalized(&raw mut flag) };
    flag != 0
}

/// Initialises MPI; whether it lets every thread call it.
pub(super) fn init(multiple: bool) -> Result<bool> {
    // SAFETY: constants of the library.
    let wanted = unsafe {
        if multiple {
            ffi::RSMPI_THREAD_MULTIPLE
        } else {
            ffi::RSMPI_THREAD_FUNNELED
        }
    };
    let mut granted: c_int = 0;
    // SAFETY: MPI-2 and later take null for the arguments; called once, by the caller's word.
    let code =
        unsafe { ffi::MPI_Init_thread(ptr::null_mut(), ptr::null_mut(), wanted, &raw mut granted) };
    check("MPI_Init_thread", code)?;
    Ok(multiple && is_multiple(granted))
}

/// Whether MPI, initialised by somebody else, lets every thread call it.
pub(super) fn granted() -> Result<bool> {
    let mut granted: c_int = 0;
    // SAFETY: MPI is initialised, by the caller's word.
    check("MPI_Query_thread", unsafe { ffi::MPI_Query_thread(&raw mut granted) })?;
    Ok(is_multiple(granted))
}

fn is_multiple(granted: c_int) -> bool {
    // SAFETY: a constant of the library.
    granted >= unsafe { ffi::RSMPI_THREAD_MULTIPLE }
}

/// The library's name and version, one line.
pub(super) fn version() -> String {
    let mut text = vec![0_u8; 1 << 13];
    let mut length: c_int = 0;
    // SAFETY: the buffer is longer than MPI_MAX_LIBRARY_VERSION_STRING of any library.
    unsafe { ffi::MPI_Get_library_version(text.as_mut_ptr().cast::<c_char>(), &raw mut length) };
    string(&text, length).lines().next().unwrap_or_default().to_owned()
}

/// Whether the library says that it takes addresses of a GPU. Many have no such function.
pub(super) fn says_cuda_aware() -> bool {
    let program = libloading::os::unix::Library::this();
    // SAFETY: `int MPIX_Query_cuda_support(void)` wherever it is defined.
    let query =
        unsafe { program.get::<unsafe extern "C" fn() -> c_int>(b"MPIX_Query_cuda_support\0") };
    // SAFETY: takes nothing, and may be called once MPI is initialised.
    query.is_ok_and(|query| unsafe { query() } == 1)
}

/// Ends MPI.
pub(super) fn finalize() -> Result<()> {
    // SAFETY: on the thread that initialised it, once, and no call comes after it (`library`).
    check("MPI_Finalize", unsafe { ffi::MPI_Finalize() })
}

/// The communicator of all ranks, with errors returned instead of fatal.
pub(super) fn world() -> Result<Communicator> {
    // SAFETY: a constant of the library.
    let world = Communicator(unsafe { ffi::RSMPI_COMM_WORLD });
    world.return_errors()?;
    Ok(world)
}

impl Communicator {
    fn return_errors(self) -> Result<()> {
        // SAFETY: a valid communicator and a constant of the library.
        let code = unsafe { ffi::MPI_Comm_set_errhandler(self.0, ffi::RSMPI_ERRORS_RETURN) };
        check("MPI_Comm_set_errhandler", code)
    }

    pub(super) fn rank(self) -> Result<usize> {
        let mut rank = 0;
        // SAFETY: a valid communicator.
        check("MPI_Comm_rank", unsafe { ffi::MPI_Comm_rank(self.0, &raw mut rank) })?;
        Ok(usize::try_from(rank).unwrap_or(0))
    }

    pub(super) fn size(self) -> Result<usize> {
        let mut size = 0;
        // SAFETY: a valid communicator.
        check("MPI_Comm_size", unsafe { ffi::MPI_Comm_size(self.0, &raw mut size) })?;
        Ok(usize::try_from(size).unwrap_or(1))
    }

    /// A communicator of `members`, ranks of this one, in that order. Waits for them; `tag` tells
    /// apart what the same ranks make at the same time.
    pub(super) fn part(self, members: &[usize], tag: usize) -> Result<Self> {
        let members: Vec<c_int> = members.iter().map(|member| int(*member)).collect();
        // SAFETY: constants of the library.
        let (mut all, mut some) = unsafe { (ffi::RSMPI_GROUP_NULL, ffi::RSMPI_GROUP_NULL) };
        // SAFETY: as above.
        let mut part = Self(unsafe { ffi::RSMPI_COMM_NULL });
        // SAFETY: a valid communicator; the handle is freed below.
        check("MPI_Comm_group", unsafe { ffi::MPI_Comm_group(self.0, &raw mut all) })?;
        // SAFETY: as many ranks as the count says.
        let code = unsafe {
            ffi::MPI_Group_incl(all, int(members.len()), members.as_ptr(), &raw mut some)
        };
        let made = check("MPI_Group_incl", code).and_then(|()| {
            // SAFETY: every member calls this with the same group and tag.
            let created =
                unsafe { ffi::MPI_Comm_create_group(self.0, some, int(tag), &raw mut part.0) };
            check("MPI_Comm_create_group", created)
        });
        // SAFETY: made above; the null group is left alone.
        unsafe {
            if some != ffi::RSMPI_GROUP_NULL {
                ffi::MPI_Group_free(&raw mut some);
            }
        }
        // SAFETY: made above.
        unsafe { ffi::MPI_Group_free(&raw mut all) };
        made?;
        part.return_errors()?;
        Ok(part)
    }

    /// The ranks that share memory with this one. Waits for all.
    pub(super) fn machine(self) -> Result<Self> {
        // SAFETY: a constant of the library.
        let mut machine = Self(unsafe { ffi::RSMPI_COMM_NULL });
        // SAFETY: every rank calls this; no hints.
        let code = unsafe {
            let (kind, none) = (ffi::RSMPI_COMM_TYPE_SHARED, ffi::RSMPI_INFO_NULL);
            ffi::MPI_Comm_split_type(self.0, kind, 0, none, &raw mut machine.0)
        };
        check("MPI_Comm_split_type", code)?;
        machine.return_errors()?;
        Ok(machine)
    }

    pub(super) fn free(mut self) -> Result<()> {
        // SAFETY: nothing uses it any more, by the caller's word.
        check("MPI_Comm_free", unsafe { ffi::MPI_Comm_free(&raw mut self.0) })
    }

    /// Replaces everybody's bytes by rank 0's. Waits.
    pub(super) fn tell(self, bytes: &mut [u8]) -> Result<()> {
        let (to, count) = (bytes.as_mut_ptr().cast::<c_void>(), int(bytes.len()));
        // SAFETY: `count` bytes, the same number on every rank.
        check("MPI_Bcast", unsafe { ffi::MPI_Bcast(to, count, bytes_type(), 0, self.0) })
    }

    /// Everybody's number. Waits.
    pub(super) fn gather(self, mine: u64) -> Result<Vec<u64>> {
        let mut all = vec![0_u64; self.size()?];
        let (from, to) = ((&raw const mine).cast::<c_void>(), all.as_mut_ptr().cast::<c_void>());
        // SAFETY: eight bytes from each rank.
        let code =
            unsafe { ffi::MPI_Allgather(from, 8, bytes_type(), to, 8, bytes_type(), self.0) };
        check("MPI_Allgather", code)?;
        Ok(all)
    }

    /// Lets MPI move data.
    pub(super) fn progress(self) -> Result<()> {
        let mut flag: c_int = 0;
        // SAFETY: a valid communicator; a look that takes nothing.
        let code = unsafe {
            let (any, tag) = (ffi::RSMPI_ANY_SOURCE, ffi::RSMPI_ANY_TAG);
            ffi::MPI_Iprobe(any, tag, self.0, &raw mut flag, ffi::RSMPI_STATUS_IGNORE)
        };
        check("MPI_Iprobe", code)
    }

    fn start(
        call: &'static str,
        run: impl FnOnce(*mut ffi::MPI_Request) -> c_int,
    ) -> Result<MpiRequest> {
        // SAFETY: a constant of the library.
        let mut request = MpiRequest(unsafe { ffi::RSMPI_REQUEST_NULL });
        check(call, run(&raw mut request.0))?;
        Ok(request)
    }

    // In what follows the memory must stay valid, and unused as MPI demands, until the request has
    // ended; the transport keeps it so, and leaks it where a request can end no more.

    pub(super) fn send(
        self,
        from: MpiAddress,
        bytes: usize,
        to: usize,
        tag: usize,
    ) -> Result<MpiRequest> {
        let (from, count, bytes_type) = (from.0.cast::<c_void>(), int(bytes), bytes_type());
        Self::start("MPI_Isend", |request| {
            // SAFETY: see above.
            unsafe { ffi::MPI_Isend(from, count, bytes_type, int(to), int(tag), self.0, request) }
        })
    }

    pub(super) fn receive(
        self,
        to: MpiAddress,
        bytes: usize,
        from: usize,
        tag: usize,
    ) -> Result<MpiRequest> {
        let (to, count, bytes_type) = (to.0.cast::<c_void>(), int(bytes), bytes_type());
        Self::start("MPI_Irecv", |request| {
            // SAFETY: see above.
            unsafe { ffi::MPI_Irecv(to, count, bytes_type, int(from), int(tag), self.0, request) }
        })
    }

    pub(super) fn broadcast(self, at: MpiAddress, bytes: usize, root: usize) -> Result<MpiRequest> {
        let (at, count, bytes_type) = (at.0.cast::<c_void>(), int(bytes), bytes_type());
        Self::start("MPI_Ibcast", |request| {
            // SAFETY: see above.
            unsafe { ffi::MPI_Ibcast(at, count, bytes_type, int(root), self.0, request) }
        })
    }

    /// `bytes` from each rank, to all.
    pub(super) fn all_gather(
        self,
        from: MpiAddress,
        to: MpiAddress,
        bytes: usize,
    ) -> Result<MpiRequest> {
        let (from, to) = (from.0.cast::<c_void>(), to.0.cast::<c_void>());
        let (count, of) = (int(bytes), bytes_type());
        Self::start("MPI_Iallgather", |request| {
            // SAFETY: see above; the two do not overlap.
            unsafe { ffi::MPI_Iallgather(from, count, of, to, count, of, self.0, request) }
        })
    }

    /// `bytes` from each rank, to the root.
    pub(super) fn gather_to(
        self,
        root: usize,
        from: MpiAddress,
        to: MpiAddress,
        bytes: usize,
    ) -> Result<MpiRequest> {
        let (from, to) = (from.0.cast::<c_void>(), to.0.cast::<c_void>());
        let (count, of, root) = (int(bytes), bytes_type(), int(root));
        Self::start("MPI_Igather", |request| {
            // SAFETY: see above; the two do not overlap.
            unsafe { ffi::MPI_Igather(from, count, of, to, count, of, root, self.0, request) }
        })
    }

    /// `bytes` to each rank, from the root.
    pub(super) fn scatter_from(
        self,
        root: usize,
        from: MpiAddress,
        to: MpiAddress,
        bytes: usize,
    ) -> Result<MpiRequest> {
        let (from, to) = (from.0.cast::<c_void>(), to.0.cast::<c_void>());
        let (count, of, root) = (int(bytes), bytes_type(), int(root));
        Self::start("MPI_Iscatter", |request| {
            // SAFETY: see above; the two do not overlap.
            unsafe { ffi::MPI_Iscatter(from, count, of, to, count, of, root, self.0, request) }
        })
    }

    /// `bytes` from each rank to each.
    pub(super) fn all_to_all(
        self,
        from: MpiAddress,
        to: MpiAddress,
        bytes: usize,
    ) -> Result<MpiRequest> {
        let (from, to) = (from.0.cast::<c_void>(), to.0.cast::<c_void>());
        let (count, of) = (int(bytes), bytes_type());
        Self::start("MPI_Ialltoall", |request| {
            // SAFETY: see above; the two do not overlap.
            unsafe { ffi::MPI_Ialltoall(from, count, of, to, count, of, self.0, request) }
        })
    }
}

impl MpiRequest {
    /// Lets MPI move data; whether this operation has ended. Ended ones stay so.
    pub(super) fn test(&mut self) -> Result<bool> {
        let mut flag: c_int = 0;
        // SAFETY: a request of ours, or the null request after its end.
        let code =
            unsafe { ffi::MPI_Test(&raw mut self.0, &raw mut flag, ffi::RSMPI_STATUS_IGNORE) };
        check("MPI_Test", code)?;
        Ok(flag != 0)
    }
}

unsafe extern "C" {
    fn atexit(callback: extern "C" fn()) -> c_int;
}

/// Has `callback` called when the process exits in good order. It must not unwind.
pub(super) fn at_exit(callback: extern "C" fn()) -> bool {
    // SAFETY: a function that lives as long as the process.
    unsafe { atexit(callback) == 0 }
}
