//! MPI that says no: this program has functions of the library's own names before it, as profilers do, which fail when they
//! are told to. The standard gives every function a second name for that (`PMPI_…`).
#![expect(unsafe_code, reason = "stands in for functions of a C library")]

use std::ffi::{c_int, c_void};
use std::sync::atomic::{AtomicBool, Ordering};

use mpi::ffi::{self, MPI_Comm, MPI_Datatype, MPI_Request, MPI_Status};

/// What comes next of either fails.
pub(crate) static SENDS: AtomicBool = AtomicBool::new(false);
pub(crate) static TESTS: AtomicBool = AtomicBool::new(false);

const REFUSED: c_int = ffi::MPI_ERR_OTHER.cast_signed();

#[unsafe(no_mangle)]
extern "C" fn MPI_Isend(
    from: *const c_void,
    count: c_int,
    kind: MPI_Datatype,
    to: c_int,
    tag: c_int,
    communicator: MPI_Comm,
    request: *mut MPI_Request,
) -> c_int {
    if SENDS.load(Ordering::Acquire) {
        return REFUSED;
    }
    // SAFETY: what the caller was to give to that function.
    unsafe { ffi::PMPI_Isend(from, count, kind, to, tag, communicator, request) }
}

#[unsafe(no_mangle)]
extern "C" fn MPI_Test(
    request: *mut MPI_Request,
    is_done: *mut c_int,
    status: *mut MPI_Status,
) -> c_int {
    if TESTS.load(Ordering::Acquire) {
        return REFUSED;
    }
    // SAFETY: as above.
    unsafe { ffi::PMPI_Test(request, is_done, status) }
}
