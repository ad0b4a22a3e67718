//! Copies, and page-locked memory.
#![expect(unsafe_code, reason = "the other side of the C interfaces")]

use std::ffi::{c_int, c_uint, c_void};

use crate::a_while;
use crate::driver::{cuCtxSynchronize, gpu, is_inside, must_be_inside, NO_VALUE, OK};

#[no_mangle]
unsafe extern "C" fn cuMemcpyDtoDAsync_v2(
    to: u64,
    from: u64,
    bytes: usize,
    stream: usize,
) -> c_int {
    in_context!();
    let found = gpu().streams.get(&stream).cloned();
    let Some(stream) = found.filter(|_| is_inside(from, bytes) && is_inside(to, bytes)) else {
        return NO_VALUE;
    };
    stream.push(move || {
        a_while(3000);
        std::ptr::copy(from as *const u8, to as *mut u8, bytes);
    });
    OK
}

#[no_mangle]
unsafe extern "C" fn cuMemcpyDtoH_v2(to: *mut u8, from: u64, bytes: usize) -> c_int {
    in_context!();
    if !is_inside(from, bytes) {
        return NO_VALUE;
    }
    std::ptr::copy_nonoverlapping(from as *const u8, to, bytes);
    OK
}

#[no_mangle]
unsafe extern "C" fn cuMemcpyHtoD_v2(to: u64, from: *const u8, bytes: usize) -> c_int {
    in_context!();
    if !is_inside(to, bytes) {
        return NO_VALUE;
    }
    std::ptr::copy_nonoverlapping(from, to as *mut u8, bytes);
    OK
}

/// Page-locked memory, by address.
static PINNED: std::sync::Mutex<Vec<(usize, usize)>> = std::sync::Mutex::new(Vec::new());

fn pinned() -> std::sync::MutexGuard<'static, Vec<(usize, usize)>> {
    PINNED.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

#[no_mangle]
unsafe extern "C" fn cuMemHostAlloc(at: *mut *mut c_void, bytes: usize, _flags: c_uint) -> c_int {
    in_context!();
    let memory = Box::into_raw(vec![0xa5_u8; bytes].into_boxed_slice()).cast::<u8>();
    pinned().push((memory as usize, bytes));
    *at = memory.cast();
    OK
}

#[no_mangle]
unsafe extern "C" fn cuMemFreeHost(at: *mut c_void) -> c_int {
    in_context!();
    // As the driver's own: not before all is done.
    cuCtxSynchronize();
    let mut pinned = pinned();
    let Some(found) = pinned.iter().position(|(start, _)| *start == at as usize) else {
        return NO_VALUE;
    };
    let (start, bytes) = pinned.swap_remove(found);
    drop(Box::from_raw(std::ptr::slice_from_raw_parts_mut(start as *mut u8, bytes)));
    OK
}

/// Stricter than the driver: only page-locked memory, of which it reads when the stream comes there.
#[no_mangle]
unsafe extern "C" fn cuMemcpyHtoDAsync_v2(
    to: u64,
    from: *const u8,
    bytes: usize,
    stream: usize,
) -> c_int {
    in_context!();
    let from = from as usize;
    let is_pinned = pinned().iter().any(|(at, size)| *at <= from && from + bytes <= at + size);
    let found = gpu().streams.get(&stream).cloned();
    let Some(stream) = found.filter(|_| is_pinned && is_inside(to, bytes)) else {
        return NO_VALUE;
    };
    stream.push(move || {
        a_while(3000);
        std::ptr::copy(from as *const u8, to as *mut u8, bytes);
    });
    OK
}

/// Stricter than the driver: only to page-locked memory, which it writes when the stream comes there.
#[no_mangle]
unsafe extern "C" fn cuMemcpyDtoHAsync_v2(
    to: *mut u8,
    from: u64,
    bytes: usize,
    stream: usize,
) -> c_int {
    in_context!();
    let to = to as usize;
    let is_pinned = pinned().iter().any(|(at, size)| *at <= to && to + bytes <= at + size);
    let found = gpu().streams.get(&stream).cloned();
    let Some(stream) = found.filter(|_| is_pinned && is_inside(from, bytes)) else {
        return NO_VALUE;
    };
    stream.push(move || {
        a_while(3000);
        must_be_inside(from, bytes);
        std::ptr::copy(from as *const u8, to as *mut u8, bytes);
    });
    OK
}
