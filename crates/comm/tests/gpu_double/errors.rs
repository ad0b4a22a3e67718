//! What the driver calls its errors.
#![expect(unsafe_code, reason = "the other side of the C interfaces")]

use std::ffi::{c_char, c_int};

use crate::driver::{NOT_READY, NO_CONTEXT, NO_MEMORY, NO_VALUE, OK};

#[no_mangle]
unsafe extern "C" fn cuGetErrorString(code: c_int, text: *mut *const c_char) -> c_int {
    *text = match code {
        NO_VALUE => c"invalid argument",
        NO_MEMORY => c"out of memory",
        NO_CONTEXT => c"invalid device context",
        NOT_READY => c"not ready",
        _ => c"an error",
    }
    .as_ptr();
    OK
}

#[no_mangle]
unsafe extern "C" fn cuGetErrorName(_code: c_int, text: *mut *const c_char) -> c_int {
    *text = c"CUDA_ERROR".as_ptr();
    OK
}
