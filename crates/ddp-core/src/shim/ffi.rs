//! Declarations of `shim/ddp_shim.h`, one for one. Only [`crate::shim`] calls them.

use std::ffi::{c_char, c_void};

pub(crate) const DDP_MESSAGE_BYTES: usize = 2040;

#[repr(C)]
pub(crate) struct Status {
    pub(crate) code: i32,
    pub(crate) message: [c_char; DDP_MESSAGE_BYTES],
}

/// What a variable is at this moment.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Variable {
    pub(crate) data: u64,
    pub(crate) version: u32,
    pub(crate) requires_grad: i32,
    pub(crate) scalar_type: i32,
    pub(crate) cuda_device: i32,
    pub(crate) has_gradient: i32,
}

#[repr(C)]
pub(crate) struct Gradient {
    pub(crate) data: *const c_void,
    pub(crate) place: i32,
}

#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(crate) struct AdamSettings {
    pub(crate) lr: f64,
    pub(crate) beta1: f64,
    pub(crate) beta2: f64,
    pub(crate) weight_decay: f64,
    pub(crate) eps: f64,
    pub(crate) decoupled: i32,
}

#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(crate) struct SgdSettings {
    pub(crate) lr: f64,
    pub(crate) momentum: f64,
    pub(crate) dampening: f64,
    pub(crate) weight_decay: f64,
    pub(crate) nesterov: i32,
    pub(crate) first_step: i32,
}

/// A node of the graph whose backward is ours.
#[repr(C)]
pub(crate) struct BackwardCall {
    pub(crate) saved: *const *mut c_void,
    pub(crate) saved_count: usize,
    pub(crate) gradients: *const *mut c_void,
    pub(crate) gradient_count: usize,
    pub(crate) needs: *const u8,
    pub(crate) input_count: usize,
    pub(crate) recording: i32,
    pub(crate) results: *mut *mut c_void,
}

pub(crate) type Backward =
    extern "C" fn(*mut c_void, *const BackwardCall, *mut c_char, usize) -> i32;
pub(crate) type Pack = extern "C" fn(*mut c_void, *mut *mut c_void, *mut c_char, usize) -> i32;
pub(crate) type Unpack = extern "C" fn(*mut c_void, *mut *mut c_void, *mut c_char, usize) -> i32;
pub(crate) type Callback = extern "C" fn(*mut c_void, *mut c_char, usize) -> i32;
pub(crate) type Destroy = extern "C" fn(*mut c_void);
pub(crate) type Witness = extern "C" fn();
pub(crate) type Access = extern "C" fn(*const u64, usize);

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
    pub(crate) fn ddp_shell_new(
        len: i64,
        scalar_type: i32,
        cuda_device: i32,
        token: u64,
        tensor: *mut *mut c_void,
    ) -> Status;
    pub(crate) fn ddp_shell_attach(shell: *mut c_void, memory: *mut c_void) -> Status;
    pub(crate) fn ddp_shell_fail(shell: *mut c_void, message: *const c_char) -> Status;
    pub(crate) fn ddp_access_add(callback: Access, handle: *mut u64) -> Status;
    pub(crate) fn ddp_access_remove(handle: u64) -> Status;
    pub(crate) fn ddp_current_stream(cuda_device: i32, handle: *mut u64) -> Status;
    pub(crate) fn ddp_set_data(variable: *mut c_void, data: *const c_void) -> Status;
    pub(crate) fn ddp_variables(
        variables: *const *mut c_void,
        count: usize,
        states: *mut Variable,
    ) -> Status;
    pub(crate) fn ddp_gradient_of(
        variable: *const c_void,
        view: *const c_void,
        gradient: *mut Gradient,
    ) -> Status;
    pub(crate) fn ddp_gradient_move(variable: *mut c_void, view: *const c_void) -> Status;
    pub(crate) fn ddp_gradient_set(variable: *mut c_void, gradient: *const c_void) -> Status;
    pub(crate) fn ddp_write(tensor: *mut c_void, values: *const c_void) -> Status;
    pub(crate) fn ddp_hook_add(
        variable: *mut c_void,
        callback: Callback,
        context: *mut c_void,
        destroy: Destroy,
        hook: *mut *mut c_void,
    ) -> Status;
    pub(crate) fn ddp_hook_remove(hook: *mut c_void) -> Status;
    pub(crate) fn ddp_witness_add(callback: Witness, handle: *mut u64) -> Status;
    pub(crate) fn ddp_witness_remove(handle: u64) -> Status;
    pub(crate) fn ddp_graph_reaches(
        variables: *const *mut c_void,
        count: usize,
        used: *mut u8,
    ) -> Status;
    pub(crate) fn ddp_end_of_backward(
        callback: Callback,
        context: *mut c_void,
        destroy: Destroy,
    ) -> Status;
    pub(crate) fn ddp_fused_adam(
        parameters: *const *mut c_void,
        gradients: *const *mut c_void,
        first_moments: *const *mut c_void,
        second_moments: *const *mut c_void,
        count: usize,
        step: *const c_void,
        gradient_divisor: *const c_void,
        settings: AdamSettings,
    ) -> Status;
    pub(crate) fn ddp_fused_sgd(
        parameters: *const *mut c_void,
        gradients: *const *mut c_void,
        momenta: *const *mut c_void,
        count: usize,
        gradient_divisor: *const c_void,
        settings: SgdSettings,
    ) -> Status;
    pub(crate) fn ddp_autocast_get(
        device_type: i32,
        enabled: *mut i32,
        scalar_type: *mut i32,
    ) -> Status;
    pub(crate) fn ddp_autocast_set(device_type: i32, enabled: i32, scalar_type: i32) -> Status;
    pub(crate) fn ddp_autocast_nest(change: i32) -> Status;
    pub(crate) fn ddp_random_state(cuda_device: i32, state: *mut *mut c_void) -> Status;
    pub(crate) fn ddp_set_random_state(cuda_device: i32, state: *const c_void) -> Status;
    pub(crate) fn ddp_function(
        name: *const c_char,
        inputs: *const *mut c_void,
        input_count: usize,
        outputs: *const *mut c_void,
        output_count: usize,
        saved: *const *mut c_void,
        saved_count: usize,
        callback: Backward,
        context: *mut c_void,
        destroy: Destroy,
        wrapped: *mut *mut c_void,
    ) -> Status;
    pub(crate) fn ddp_version(tensor: *const c_void, version: *mut u32) -> Status;
    pub(crate) fn ddp_grad_mode(enabled: *mut i32) -> Status;
    pub(crate) fn ddp_saved_new(tensor: *const c_void, saved: *mut *mut c_void) -> Status;
    pub(crate) fn ddp_saved_get(saved: *const c_void, tensor: *mut *mut c_void) -> Status;
    pub(crate) fn ddp_saved_free(saved: *mut c_void);
    pub(crate) fn ddp_saving(
        pack: Option<Pack>,
        unpack: Option<Unpack>,
        destroy: Option<Destroy>,
    ) -> Status;
}
