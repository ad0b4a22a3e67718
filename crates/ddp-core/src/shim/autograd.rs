//! Custom functions and saved tensors across the C++ boundary: the part of `shim/ddp_autograd.cc`.
#![expect(unsafe_code, reason = "gate: calls the C++ boundary, and is called by it")]

use std::ffi::{c_char, c_void, CString};
use std::mem::ManuallyDrop;
use std::panic::{catch_unwind, AssertUnwindSafe};
use std::ptr;
use std::sync::{Mutex, TryLockError};

use tch::Tensor;
use torch_sys::C_tensor;

use super::{check, ffi, panic_text, raw, tell};
use crate::Result;

/// What a backward is given.
#[derive(Debug)]
pub(crate) struct Call {
    pub(crate) saved: Vec<Tensor>,
    /// By output; `None` where it is undefined.
    pub(crate) gradients: Vec<Option<Tensor>>,
    /// By input: whether its gradient is wanted.
    pub(crate) needs: Vec<bool>,
    /// Whether this backward is itself recorded.
    pub(crate) is_recording: bool,
}

/// Gradients of the inputs, or the text of what went wrong.
pub(crate) type Backward = Box<dyn FnMut(Call) -> Result<Vec<Option<Tensor>>, String> + Send>;

/// What libtorch calls back, perhaps on a GPU's thread.
struct Called {
    body: Mutex<Backward>,
}

/// Records a function of `inputs` whose `outputs` are computed, and returns the outputs as the graph has them.
///
/// `backward` is dropped when the graph is freed; at once, if nothing is recorded.
pub(crate) fn function(
    name: &str,
    inputs: &[&Tensor],
    outputs: &[Tensor],
    saved: &[Tensor],
    backward: Backward,
) -> Result<Vec<Tensor>> {
    let name = CString::new(name.replace('\0', " ")).unwrap_or_default();
    let inputs: Vec<*mut c_void> = inputs.iter().map(|tensor| raw(tensor)).collect();
    let outputs: Vec<*mut c_void> = outputs.iter().map(raw).collect();
    let saved: Vec<*mut c_void> = saved.iter().map(raw).collect();
    let mut wrapped = vec![ptr::null_mut(); outputs.len()];
    let context: *mut c_void =
        Box::into_raw(Box::new(Called { body: Mutex::new(backward) })).cast();
    // SAFETY: arrays of live at::Tensor* of the lengths given; the shim takes the context over, also on
    // failure.
    let status = unsafe {
        ffi::ddp_function(
            name.as_ptr(),
            inputs.as_ptr(),
            inputs.len(),
            outputs.as_ptr(),
            outputs.len(),
            saved.as_ptr(),
            saved.len(),
            on_backward,
            context,
            destroy_called,
            wrapped.as_mut_ptr(),
        )
    };
    check("ddp_function", &status)?;
    // SAFETY: on success each is a new at::Tensor* that nobody else owns.
    Ok(wrapped.into_iter().map(|tensor| unsafe { owned(tensor) }).collect())
}

/// Takes over a new tensor of the shim's.
///
/// # Safety
/// `tensor` is an `at::Tensor*` that nobody else owns.
unsafe fn owned(tensor: *mut c_void) -> Tensor {
    // SAFETY: the caller's.
    unsafe { Tensor::from_ptr(tensor.cast::<C_tensor>()) }
}

/// Gives a tensor to the shim, which takes it over.
fn given(tensor: Tensor) -> *mut c_void {
    raw(&ManuallyDrop::new(tensor))
}

/// The elements of an array of the shim's.
///
/// # Safety
/// `count` elements are there, for this call.
unsafe fn list<T: Copy>(start: *const T, count: usize) -> Vec<T> {
    if count == 0 {
        return Vec::new();
    }
    // SAFETY: the caller's; an empty array may be null, and was seen to above.
    unsafe { std::slice::from_raw_parts(start, count) }.to_vec()
}

extern "C" fn on_backward(
    context: *mut c_void,
    call: *const ffi::BackwardCall,
    message: *mut c_char,
    message_bytes: usize,
) -> i32 {
    // SAFETY: the shim's arguments, for this call.
    let call = unsafe { &*call };
    // SAFETY: an array of the shim's.
    let saved = unsafe { list(call.saved, call.saved_count) };
    // SAFETY: as above.
    let gradients = unsafe { list(call.gradients, call.gradient_count) };
    // SAFETY: as above.
    let needs = unsafe { list(call.needs, call.input_count) };
    // Taken over before anything can go wrong.
    let arguments = Call {
        // SAFETY: new tensors, ours.
        saved: saved.into_iter().map(|tensor| unsafe { owned(tensor) }).collect(),
        // SAFETY: new tensors, ours, or null.
        gradients: gradients
            .into_iter()
            .map(|tensor| (!tensor.is_null()).then(|| unsafe { owned(tensor) }))
            .collect(),
        needs: needs.into_iter().map(|need| need != 0).collect(),
        is_recording: call.recording != 0,
    };
    // SAFETY: `context` is the `Called` handed over with this function, alive until it is destroyed.
    let called = unsafe { &*context.cast::<Called>() };
    let count = call.input_count;
    let outcome = catch_unwind(AssertUnwindSafe(|| run(called, arguments, count)));
    let text = match outcome {
        Ok(Ok(results)) => {
            for (at, result) in results.into_iter().enumerate() {
                // SAFETY: `results` has room for one pointer for each input, and there are as many.
                let place = unsafe { call.results.add(at) };
                // SAFETY: inside the array.
                unsafe { place.write(result) };
            }
            return 0;
        }
        Ok(Err(text)) => text,
        Err(panic) => format!("panic in a backward: {}", panic_text(&*panic)),
    };
    // SAFETY: the shim's buffer.
    unsafe { tell(&text, message, message_bytes) };
    1
}

/// Gradients for `count` inputs, given to the shim.
fn run(called: &Called, call: Call, count: usize) -> Result<Vec<*mut c_void>, String> {
    let gradients = match called.body.try_lock() {
        Ok(mut body) => body(call)?,
        Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner()(call)?,
        Err(TryLockError::WouldBlock) => {
            return Err("this backward runs already, on another thread or around this one".into())
        }
    };
    if gradients.len() != count {
        return Err(format!("{} gradients for {count} inputs", gradients.len()));
    }
    Ok(gradients.into_iter().map(|gradient| gradient.map_or(ptr::null_mut(), given)).collect())
}

extern "C" fn destroy_called(context: *mut c_void) {
    // SAFETY: `context` is a leaked Box<Called>, and the shim calls this once.
    let owned = unsafe { Box::from_raw(context.cast::<Called>()) };
    if catch_unwind(AssertUnwindSafe(move || drop(owned))).is_err() {
        tracing::error!("a destructor panicked while libtorch released a backward");
    }
}

/// How often the memory of `tensor` was changed in place.
pub(crate) fn version(tensor: &Tensor) -> Result<u32> {
    let mut version = 0;
    // SAFETY: a live at::Tensor*; writes one number.
    let status = unsafe { ffi::ddp_version(raw(tensor), &raw mut version) };
    check("ddp_version", &status)?;
    Ok(version)
}

/// Whether operations of this thread are recorded.
pub(crate) fn grad_mode() -> Result<bool> {
    let mut enabled = 0;
    // SAFETY: writes one number.
    let status = unsafe { ffi::ddp_grad_mode(&raw mut enabled) };
    check("ddp_grad_mode", &status)?;
    Ok(enabled != 0)
}

/// A tensor as a node of the graph keeps it.
#[derive(Debug)]
pub(crate) struct Saved {
    raw: *mut c_void,
}

// SAFETY: a SavedVariable is a tensor and numbers; libtorch's own nodes are freed on any thread.
unsafe impl Send for Saved {}

impl Saved {
    pub(crate) fn new(tensor: &Tensor) -> Result<Self> {
        let mut saved = ptr::null_mut();
        // SAFETY: a live at::Tensor*; writes one pointer.
        let status = unsafe { ffi::ddp_saved_new(raw(tensor), &raw mut saved) };
        check("ddp_saved_new", &status)?;
        Ok(Self { raw: saved })
    }

    /// The tensor; an error if it was changed in place.
    pub(crate) fn get(&self) -> Result<Tensor> {
        let mut tensor = ptr::null_mut();
        // SAFETY: `raw` is alive until this is dropped; writes one pointer.
        let status = unsafe { ffi::ddp_saved_get(self.raw, &raw mut tensor) };
        check("ddp_saved_get", &status)?;
        // SAFETY: on success a new at::Tensor*, ours.
        Ok(unsafe { owned(tensor) })
    }
}

impl Drop for Saved {
    fn drop(&mut self) {
        // SAFETY: made by ddp_saved_new, freed once, here.
        unsafe { ffi::ddp_saved_free(self.raw) };
    }
}

/// What is kept in the place of a tensor that autograd saves.
pub(crate) trait Packed: Send + Sync {
    /// The tensor, when a node needs it.
    fn unpack(&self) -> Result<Tensor, String>;
}

/// Decides on this thread what is kept in the place of a tensor.
pub(crate) type Pack = fn(Tensor) -> Result<Box<dyn Packed>, String>;

thread_local! {
    static PACK: std::cell::Cell<Option<Pack>> = const { std::cell::Cell::new(None) };
}

/// From here on every tensor that autograd would save on this thread goes to `pack`; `None` ends that.
pub(crate) fn saving(pack: Option<Pack>) -> Result<()> {
    PACK.set(pack);
    let on = pack.is_some();
    let on_pack: Option<ffi::Pack> = on.then_some(on_pack);
    let on_unpack: Option<ffi::Unpack> = on.then_some(on_unpack);
    let on_destroy: Option<ffi::Destroy> = on.then_some(destroy_packed);
    // SAFETY: functions that live as long as the program.
    let status = unsafe { ffi::ddp_saving(on_pack, on_unpack, on_destroy) };
    check("ddp_saving", &status)
}

extern "C" fn on_pack(
    tensor: *mut c_void,
    handle: *mut *mut c_void,
    message: *mut c_char,
    message_bytes: usize,
) -> i32 {
    // SAFETY: a new at::Tensor*, ours.
    let tensor = unsafe { owned(tensor) };
    let outcome = catch_unwind(AssertUnwindSafe(|| match PACK.get() {
        Some(pack) => pack(tensor),
        None => Err("a tensor was saved, and nobody keeps it".to_owned()),
    }));
    let text = match outcome {
        Ok(Ok(packed)) => {
            // A thin pointer to a fat one.
            let packed: *mut c_void = Box::into_raw(Box::new(packed)).cast();
            // SAFETY: the shim's pointer, for this call.
            unsafe { handle.write(packed) };
            return 0;
        }
        Ok(Err(text)) => text,
        Err(panic) => format!("panic while a tensor was saved: {}", panic_text(&*panic)),
    };
    // SAFETY: the shim's buffer.
    unsafe { tell(&text, message, message_bytes) };
    1
}

extern "C" fn on_unpack(
    handle: *mut c_void,
    tensor: *mut *mut c_void,
    message: *mut c_char,
    message_bytes: usize,
) -> i32 {
    // SAFETY: the Box that `on_pack` leaked, alive until it is destroyed.
    let packed = unsafe { &*handle.cast::<Box<dyn Packed>>() };
    let text = match catch_unwind(AssertUnwindSafe(|| packed.unpack().map(given))) {
        Ok(Ok(unpacked)) => {
            // SAFETY: the shim's pointer, for this call.
            unsafe { tensor.write(unpacked) };
            return 0;
        }
        Ok(Err(text)) => text,
        Err(panic) => format!("panic while a saved tensor was needed: {}", panic_text(&*panic)),
    };
    // SAFETY: the shim's buffer.
    unsafe { tell(&text, message, message_bytes) };
    1
}

extern "C" fn destroy_packed(handle: *mut c_void) {
    // SAFETY: the Box that `on_pack` leaked, and the shim calls this once.
    let owned = unsafe { Box::from_raw(handle.cast::<Box<dyn Packed>>()) };
    if catch_unwind(AssertUnwindSafe(move || drop(owned))).is_err() {
        tracing::error!("a destructor panicked while libtorch released a saved tensor");
    }
}
