//! Declarations of `shim/ddp_shim.h`, one for one. Only [`crate::shim`] calls them.

use std::ffi::{c_char, c_void};

pub(crate) const DDP_MESSAGE_BYTES: usize = 2040;

#[repr(C)]
pub(crate) struct Status {
    pub(crate) code: i32,
    pub(crate) message: [c_char; DDP_MESSAGE_BYTES],
}

#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(crate) struct AdamWSettings {
    pub(crate) lr: f64,
    pub(crate) beta1: f64,
    pub(crate) beta2: f64,
    pub(crate) weight_decay: f64,
    pub(crate) eps: f64,
}

pub(crate) type Callback = extern "C" fn(*mut c_void, *mut c_char, usize) -> i32;
pub(crate) type Destroy = extern "C" fn(*mut c_void);

extern "C" {
    pub(crate) fn ddp_tensor_identity(tensor: *const c_void, identity: *mut u64) -> Status;
    pub(crate) fn ddp_tensor_over_memory(
        memory: *mut c_void,
        len: i64,
        scalar_type: i32,
        cuda_device: i32,
        context: *mut c_void,
        destroy: Destroy,
        tensor: *mut *mut c_void,
    ) -> Status;
    pub(crate) fn ddp_current_stream(cuda_device: i32, handle: *mut u64) -> Status;
    pub(crate) fn ddp_set_data(variable: *mut c_void, data: *const c_void) -> Status;
    pub(crate) fn ddp_gradient_place(
        variable: *const c_void,
        view: *const c_void,
        place: *mut i32,
    ) -> Status;
    pub(crate) fn ddp_gradient_move(variable: *mut c_void, view: *const c_void) -> Status;
    pub(crate) fn ddp_gradient_clear(variable: *mut c_void) -> Status;
    pub(crate) fn ddp_hook_add(
        variable: *mut c_void,
        callback: Callback,
        context: *mut c_void,
        destroy: Destroy,
        hook: *mut *mut c_void,
    ) -> Status;
    pub(crate) fn ddp_hook_remove(hook: *mut c_void) -> Status;
    pub(crate) fn ddp_end_of_backward(
        callback: Callback,
        context: *mut c_void,
        destroy: Destroy,
    ) -> Status;
    pub(crate) fn ddp_fused_adamw(
        parameters: *const *mut c_void,
        gradients: *const *mut c_void,
        first_moments: *const *mut c_void,
        second_moments: *const *mut c_void,
        count: usize,
        step: *const c_void,
        gradient_divisor: *const c_void,
        settings: AdamWSettings,
    ) -> Status;
    pub(crate) fn ddp_autocast_get(
        device_type: i32,
        enabled: *mut i32,
        scalar_type: *mut i32,
    ) -> Status;
    pub(crate) fn ddp_autocast_set(device_type: i32, enabled: i32, scalar_type: i32) -> Status;
    pub(crate) fn ddp_autocast_nest(change: i32) -> Status;
}
