//! The safe face of the C++ boundary (`shim/README.md`): every call into the shim stands here.
#![expect(unsafe_code, reason = "gate: the only caller of the C++ boundary")]

use std::any::Any;
use std::ffi::{c_char, c_void, CStr};
use std::panic::{catch_unwind, AssertUnwindSafe};
use std::ptr;

use phalanx_comm::Stream;
use tch::{Device, Kind, Tensor};

use crate::{Error, Result};

pub(crate) mod autograd;
mod ffi;
mod shell;

pub(crate) use ffi::{AdamSettings, SgdSettings, Variable};
pub(crate) use shell::{Accesses, Shell};

/// Where a parameter's gradient lies, compared with a view.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum GradientPlace {
    Undefined,
    InView,
    /// Elsewhere, with another kind or other strides.
    Elsewhere,
    /// Elsewhere, with the kind and the strides of the view; here it begins.
    Alike(*const c_void),
    Sparse,
}

fn check(call: &'static str, status: &ffi::Status) -> Result<()> {
    if status.code == 0 {
        return Ok(());
    }
    // SAFETY: the shim NUL-terminates `message` inside the array, which lives as long as `status`.
    let text = unsafe { CStr::from_ptr(status.message.as_ptr()) };
    // The text of a libtorch exception goes on with a C++ backtrace, which helps nobody here.
    let text = text.to_string_lossy();
    let message = text.split("\nException raised from").next().unwrap_or(&text).to_owned();
    Err(Error::Libtorch { call, message })
}

fn raw(tensor: &Tensor) -> *mut c_void {
    tensor.as_ptr().cast_mut().cast()
}

/// Identity of the variable behind `tensor`: the same for shallow clones.
pub(crate) fn identity(tensor: &Tensor) -> Result<u64> {
    let mut identity = 0;
    // SAFETY: `raw` is a live at::Tensor* for the call, and `identity` outlives it.
    let status = unsafe { ffi::ddp_tensor_identity(raw(tensor), &raw mut identity) };
    check("ddp_tensor_identity", &status)?;
    Ok(identity)
}

/// A flat tensor over `memory`, which is on `device`; the tensor's storage owns `keep_alive`.
///
/// # Safety
/// `memory` must be valid for reads and writes of `len` elements of `kind` while `keep_alive` lives.
pub(crate) unsafe fn tensor_over_memory(
    memory: *mut c_void,
    len: usize,
    kind: Kind,
    device: Device,
    keep_alive: Box<dyn Any + Send>,
) -> Result<Tensor> {
    let context = Box::into_raw(Box::new(keep_alive));
    let mut tensor = ptr::null_mut();
    let len = i64::try_from(len).map_err(|_too_long| Error::TooLarge { elements: len })?;
    // SAFETY: the caller vouches for the memory; the shim takes `context` over, also on failure.
    let status = unsafe {
        ffi::ddp_tensor_over_memory(
            memory,
            len,
            scalar_type(kind),
            cuda_index(device),
            context.cast(),
            drop_any,
            &raw mut tensor,
        )
    };
    check("ddp_tensor_over_memory", &status)?;
    // SAFETY: on success `tensor` is a new at::Tensor* that nobody else owns.
    Ok(unsafe { Tensor::from_ptr(tensor.cast()) })
}

/// The number of a CUDA device; -1 is the CPU.
fn cuda_index(device: Device) -> i32 {
    match device {
        Device::Cuda(index) => i32::try_from(index).unwrap_or(i32::MAX),
        _ => -1,
    }
}

/// This thread's current stream of a CUDA device, as collectives take it; the CPU has none.
pub(crate) fn current_stream(device: Device) -> Result<Stream> {
    if !device.is_cuda() {
        return Ok(Stream::default());
    }
    let mut handle = 0;
    // SAFETY: writes one number.
    let status = unsafe { ffi::ddp_current_stream(cuda_index(device), &raw mut handle) };
    check("ddp_current_stream", &status)?;
    Ok(Stream(usize::try_from(handle).unwrap_or(0)))
}

/// `c10::ScalarType`'s number of a kind that flat storage or a column of data holds.
fn scalar_type(kind: Kind) -> i32 {
    match kind {
        Kind::Uint8 => 0,
        Kind::Int8 => 1,
        Kind::Int16 => 2,
        Kind::Int => 3,
        Kind::Int64 => 4,
        Kind::Half => 5,
        Kind::Double => 7,
        Kind::Bool => 11,
        Kind::BFloat16 => 15,
        _ => 6, // f32: `Flat` and `feed` let no others through
    }
}

extern "C" fn drop_any(context: *mut c_void) {
    // SAFETY: `context` is the Box<Box<dyn Any>> leaked above, and the shim calls this once.
    let owned = unsafe { Box::from_raw(context.cast::<Box<dyn Any + Send>>()) };
    // A panic must not reach C++; a destructor of ours that panics has nothing left to say.
    if catch_unwind(AssertUnwindSafe(move || drop(owned))).is_err() {
        tracing::error!("a destructor panicked while libtorch released memory");
    }
}

/// Gives `variable` the storage of `data`; shallow clones see it too.
pub(crate) fn set_data(variable: &Tensor, data: &Tensor) -> Result<()> {
    // SAFETY: both are live at::Tensor* for the call.
    let status = unsafe { ffi::ddp_set_data(raw(variable), raw(data)) };
    check("ddp_set_data", &status)
}

/// What each of `variables` is at this moment.
pub(crate) fn variables(variables: &[&Tensor]) -> Result<Vec<Variable>> {
    let pointers: Vec<*mut c_void> = variables.iter().map(|tensor| raw(tensor)).collect();
    let mut states = vec![Variable::default(); pointers.len()];
    // SAFETY: both arrays have `len` elements; the pointers are live at::Tensor* for the call.
    let status =
        unsafe { ffi::ddp_variables(pointers.as_ptr(), pointers.len(), states.as_mut_ptr()) };
    check("ddp_variables", &status)?;
    Ok(states)
}

/// Which of `variables` the graph below the running node reaches; only from inside a witness or a hook.
pub(crate) fn graph_reaches(variables: &[&Tensor]) -> Result<Vec<bool>> {
    let pointers: Vec<*mut c_void> = variables.iter().map(|tensor| raw(tensor)).collect();
    let mut used = vec![0_u8; pointers.len()];
    // SAFETY: both arrays have `len` elements; the pointers are live at::Tensor* for the call.
    let status =
        unsafe { ffi::ddp_graph_reaches(pointers.as_ptr(), pointers.len(), used.as_mut_ptr()) };
    check("ddp_graph_reaches", &status)?;
    Ok(used.into_iter().map(|flag| flag != 0).collect())
}

/// Says where the gradient of `variable` lies, compared with `view`.
pub(crate) fn gradient_place(variable: &Tensor, view: &Tensor) -> Result<GradientPlace> {
    let mut found = ffi::Gradient { data: ptr::null(), place: 0 };
    // SAFETY: both are live at::Tensor*, and `found` outlives the call.
    let status = unsafe { ffi::ddp_gradient_of(raw(variable), raw(view), &raw mut found) };
    check("ddp_gradient_of", &status)?;
    Ok(match found.place {
        0 => GradientPlace::Undefined,
        1 => GradientPlace::InView,
        3 => GradientPlace::Alike(found.data),
        4 => GradientPlace::Sparse,
        _ => GradientPlace::Elsewhere,
    })
}

/// Copies the gradient of `variable`, dense or sparse, into `view`, which becomes the gradient.
pub(crate) fn gradient_move(variable: &Tensor, view: &Tensor) -> Result<()> {
    // SAFETY: both are live at::Tensor* for the call.
    let status = unsafe { ffi::ddp_gradient_move(raw(variable), raw(view)) };
    check("ddp_gradient_move", &status)
}

/// Makes `gradient` the gradient of `variable`; `None` makes it undefined.
pub(crate) fn gradient_set(variable: &Tensor, gradient: Option<&Tensor>) -> Result<()> {
    let gradient = gradient.map_or(ptr::null_mut(), raw);
    // SAFETY: live at::Tensor* for the call, or null.
    let status = unsafe { ffi::ddp_gradient_set(raw(variable), gradient) };
    check("ddp_gradient_set", &status)
}

/// Copies `values` into `tensor` without counting it as a change in place.
pub(crate) fn write(tensor: &Tensor, values: &Tensor) -> Result<()> {
    // SAFETY: both are live at::Tensor* for the call.
    let status = unsafe { ffi::ddp_write(raw(tensor), raw(values)) };
    check("ddp_write", &status)
}

type Body = Box<dyn Fn() -> Result<(), String> + Send + Sync>;

/// What libtorch calls back: `body` may fail, and `body` is dropped when libtorch lets go of it.
struct Called {
    body: Body,
}

extern "C" fn call(context: *mut c_void, message: *mut c_char, message_bytes: usize) -> i32 {
    // SAFETY: `context` is the `Called` handed over with this function, alive until `destroy`.
    let called = unsafe { &*context.cast::<Called>() };
    let outcome = catch_unwind(AssertUnwindSafe(|| (called.body)()));
    let text = match outcome {
        Ok(Ok(())) => return 0,
        Ok(Err(text)) => text,
        Err(panic) => format!("panic in a gradient hook: {}", panic_text(&*panic)),
    };
    // SAFETY: the shim's buffer, for this call.
    unsafe { tell(&text, message, message_bytes) };
    1
}

/// Writes `text`, cut where it must be, into a buffer of the shim.
///
/// # Safety
/// `message` has room for `message_bytes` bytes.
unsafe fn tell(text: &str, message: *mut c_char, message_bytes: usize) {
    let kept = text.len().min(message_bytes.saturating_sub(1));
    // SAFETY: `message` has room for `message_bytes` bytes, and `kept` is less than that.
    unsafe { ptr::copy_nonoverlapping(text.as_ptr(), message.cast::<u8>(), kept) };
    // SAFETY: `kept` < `message_bytes`.
    let end = unsafe { message.add(kept) };
    // SAFETY: inside the buffer.
    unsafe { end.write(0) };
}

pub(crate) fn panic_text(panic: &(dyn Any + Send)) -> &str {
    panic
        .downcast_ref::<&str>()
        .copied()
        .or_else(|| panic.downcast_ref::<String>().map(String::as_str))
        .unwrap_or("no text")
}

extern "C" fn destroy(context: *mut c_void) {
    // SAFETY: `context` is a leaked Box<Called>, and the shim calls this once.
    let owned = unsafe { Box::from_raw(context.cast::<Called>()) };
    if catch_unwind(AssertUnwindSafe(move || drop(owned))).is_err() {
        tracing::error!("a destructor panicked while libtorch released a callback");
    }
}

fn leak(body: Body) -> *mut c_void {
    Box::into_raw(Box::new(Called { body })).cast()
}

/// A hook on a parameter's gradient accumulation; dropping it removes the hook.
#[derive(Debug)]
pub(crate) struct Hook {
    raw: *mut c_void,
}

impl Hook {
    /// Runs `body` after each accumulation into the gradient of `variable`. An error of `body` stops
    /// that backward with its text.
    pub(crate) fn add(variable: &Tensor, body: Body) -> Result<Self> {
        let mut raw_hook = ptr::null_mut();
        // SAFETY: a live at::Tensor*; the shim takes the context over, also on failure.
        let status = unsafe {
            ffi::ddp_hook_add(raw(variable), call, leak(body), destroy, &raw mut raw_hook)
        };
        check("ddp_hook_add", &status)?;
        Ok(Self { raw: raw_hook })
    }
}

impl Drop for Hook {
    fn drop(&mut self) {
        // SAFETY: `raw` came from ddp_hook_add and is removed once, here.
        let status = unsafe { ffi::ddp_hook_remove(self.raw) };
        if let Err(error) = check("ddp_hook_remove", &status) {
            tracing::error!(%error, "a gradient hook could not be removed");
        }
    }
}

/// A function that this thread's backwards tell of their first node; dropping it ends that.
#[derive(Debug)]
pub(crate) struct Witness {
    handle: u64,
}

impl Witness {
    /// On this thread, until it is dropped (on this thread, too).
    pub(crate) fn add(callback: extern "C" fn()) -> Result<Self> {
        let mut handle = 0;
        // SAFETY: a function that lives as long as the program; `handle` outlives the call.
        let status = unsafe { ffi::ddp_witness_add(callback, &raw mut handle) };
        check("ddp_witness_add", &status)?;
        Ok(Self { handle })
    }
}

impl Drop for Witness {
    fn drop(&mut self) {
        // SAFETY: the handle came from ddp_witness_add and is removed once, here.
        let status = unsafe { ffi::ddp_witness_remove(self.handle) };
        if let Err(error) = check("ddp_witness_remove", &status) {
            tracing::error!(%error, "the witness of backwards could not be removed");
        }
    }
}

/// Runs `body` at the end of the backward that is running; only from inside a hook.
pub(crate) fn end_of_backward(body: Body) -> Result<()> {
    // SAFETY: the shim takes the context over, also on failure.
    let status = unsafe { ffi::ddp_end_of_backward(call, leak(body), destroy) };
    check("ddp_end_of_backward", &status)
}

fn pointers(list: &[Tensor]) -> Vec<*mut c_void> {
    list.iter().map(raw).collect()
}

/// An error unless all lists of a fused call are as long as the first.
fn check_lists(count: usize, others: &[&[Tensor]]) -> Result<()> {
    if others.iter().all(|list| list.len() == count) {
        return Ok(());
    }
    let (setting, value) = ("lists of a fused step", "of different lengths".to_owned());
    Err(Error::BadSetting { setting, value, expected: "one length" })
}

/// `at::_fused_adamw_` or `at::_fused_adam_`; gradients are divided by `divisor` first, in place.
pub(crate) fn fused_adam(
    [parameters, gradients, first_moments, second_moments]: [&[Tensor]; 4],
    step: &Tensor,
    divisor: Option<&Tensor>,
    settings: AdamSettings,
) -> Result<()> {
    let count = parameters.len();
    check_lists(count, &[gradients, first_moments, second_moments])?;
    if count == 0 {
        return Ok(());
    }
    let (parameters, gradients) = (pointers(parameters), pointers(gradients));
    let (first, second) = (pointers(first_moments), pointers(second_moments));
    // SAFETY: four arrays of `count` live at::Tensor* each; `step` is live; the divisor live or null.
    let status = unsafe {
        ffi::ddp_fused_adam(
            parameters.as_ptr(),
            gradients.as_ptr(),
            first.as_ptr(),
            second.as_ptr(),
            count,
            raw(step),
            divisor.map_or(ptr::null(), |tensor| raw(tensor).cast_const()),
            settings,
        )
    };
    check("ddp_fused_adam", &status)
}

/// `at::_fused_sgd_`; `momenta` is empty where there is no momentum.
pub(crate) fn fused_sgd(
    [parameters, gradients, momenta]: [&[Tensor]; 3],
    divisor: Option<&Tensor>,
    settings: SgdSettings,
) -> Result<()> {
    let count = parameters.len();
    check_lists(count, &[gradients])?;
    check_lists(if settings.momentum > 0.0 { count } else { 0 }, &[momenta])?;
    if count == 0 {
        return Ok(());
    }
    let (parameters, gradients) = (pointers(parameters), pointers(gradients));
    let momenta = pointers(momenta);
    // SAFETY: arrays of `count` live at::Tensor* each (none for `momenta` where it is not read); the
    // divisor is live or null.
    let status = unsafe {
        ffi::ddp_fused_sgd(
            parameters.as_ptr(),
            gradients.as_ptr(),
            momenta.as_ptr(),
            count,
            divisor.map_or(ptr::null(), |tensor| raw(tensor).cast_const()),
            settings,
        )
    };
    check("ddp_fused_sgd", &status)
}

/// Whether autocast is on for a device type on this thread, and to which kind.
pub(crate) fn autocast_get(device_type: i32) -> Result<(bool, i32)> {
    let (mut enabled, mut kind) = (0, 0);
    // SAFETY: both out-parameters outlive the call.
    let status = unsafe { ffi::ddp_autocast_get(device_type, &raw mut enabled, &raw mut kind) };
    check("ddp_autocast_get", &status)?;
    Ok((enabled != 0, kind))
}

/// Sets autocast of a device type on this thread.
pub(crate) fn autocast_set(device_type: i32, enabled: bool, kind: i32) -> Result<()> {
    // SAFETY: plain values.
    let status = unsafe { ffi::ddp_autocast_set(device_type, i32::from(enabled), kind) };
    check("ddp_autocast_set", &status)
}

/// Enters (+1) or leaves (−1) an autocast region.
pub(crate) fn autocast_nest(change: i32) -> Result<()> {
    // SAFETY: a plain value.
    let status = unsafe { ffi::ddp_autocast_nest(change) };
    check("ddp_autocast_nest", &status)
}

/// The state of the default random generator of `device`: bytes on the CPU.
pub(crate) fn random_state(device: Device) -> Result<Tensor> {
    let mut state = ptr::null_mut();
    // SAFETY: writes one pointer.
    let status = unsafe { ffi::ddp_random_state(cuda_index(device), &raw mut state) };
    check("ddp_random_state", &status)?;
    // SAFETY: on success `state` is a new at::Tensor* that nobody else owns.
    Ok(unsafe { Tensor::from_ptr(state.cast()) })
}

/// Puts the default random generator of `device` into a state that [`random_state`] gave.
pub(crate) fn set_random_state(device: Device, state: &Tensor) -> Result<()> {
    // SAFETY: `raw` is a live at::Tensor* for the call; libtorch checks its kind and length.
    let status = unsafe { ffi::ddp_set_random_state(cuda_index(device), raw(state)) };
    check("ddp_set_random_state", &status)
}
