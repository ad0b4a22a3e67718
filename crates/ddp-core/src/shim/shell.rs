//! Tensors whose memory comes and goes, and how an operation that needs it is noticed.
#![expect(unsafe_code, reason = "gate: calls across the C++ boundary")]

use std::ffi::{c_void, CString};
use std::ptr;

use tch::{Device, Kind, Tensor};

use super::{check, cuda_index, ffi, raw, scalar_type};
use crate::{Error, Result};

/// A flat tensor whose memory comes and goes, under all of its views.
#[derive(Debug)]
pub(crate) struct Shell {
    tensor: Tensor,
}

impl Shell {
    /// `len` elements without memory; `token` is what [`Accesses`] tells of it.
    pub(crate) fn new(kind: Kind, device: Device, len: usize, token: u64) -> Result<Self> {
        let mut tensor = ptr::null_mut();
        let len = i64::try_from(len).map_err(|_too_long| Error::TooLarge { elements: len })?;
        let (kind, device) = (scalar_type(kind), cuda_index(device));
        // SAFETY: plain values; writes one pointer.
        let status = unsafe { ffi::ddp_shell_new(len, kind, device, token, &raw mut tensor) };
        check("ddp_shell_new", &status)?;
        // SAFETY: on success `tensor` is a new at::Tensor* that nobody else owns.
        Ok(Self { tensor: unsafe { Tensor::from_ptr(tensor.cast()) } })
    }

    /// All of it.
    pub(crate) fn tensor(&self) -> &Tensor {
        &self.tensor
    }

    /// Gives it memory.
    ///
    /// # Safety
    /// `memory` holds the shell's elements, on its device, until other memory is attached or it is [detached](Self::detach).
    pub(crate) unsafe fn attach(&self, memory: *mut c_void) -> Result<()> {
        // SAFETY: a live at::Tensor*; the caller vouches for the memory.
        let status = unsafe { ffi::ddp_shell_attach(raw(&self.tensor), memory) };
        check("ddp_shell_attach", &status)
    }

    /// Takes its memory away.
    pub(crate) fn detach(&self) -> Result<()> {
        // SAFETY: a live at::Tensor*; without memory nothing can be read.
        let status = unsafe { ffi::ddp_shell_attach(raw(&self.tensor), ptr::null_mut()) };
        check("ddp_shell_attach", &status)
    }

    /// Takes its memory away for ever: whoever asks for it gets `message`.
    pub(crate) fn fail(&self, message: &str) -> Result<()> {
        self.detach()?;
        let text = CString::new(message.replace('\0', " ")).unwrap_or_default();
        // SAFETY: a live at::Tensor*, and a text that ends with NUL.
        let status = unsafe { ffi::ddp_shell_fail(raw(&self.tensor), text.as_ptr()) };
        check("ddp_shell_fail", &status)
    }
}

/// A function that is told of this thread's operations on shells without memory; dropping it (on this thread) ends that.
#[derive(Debug)]
pub(crate) struct Accesses {
    handle: u64,
}

impl Accesses {
    /// One function for the whole program.
    pub(crate) fn add(callback: extern "C" fn(*const u64, usize)) -> Result<Self> {
        let mut handle = 0;
        // SAFETY: a function that lives as long as the program; `handle` outlives the call.
        let status = unsafe { ffi::ddp_access_add(callback, &raw mut handle) };
        check("ddp_access_add", &status)?;
        Ok(Self { handle })
    }
}

impl Drop for Accesses {
    fn drop(&mut self) {
        // SAFETY: the handle came from ddp_access_add and is removed once, here.
        let status = unsafe { ffi::ddp_access_remove(self.handle) };
        if let Err(error) = check("ddp_access_remove", &status) {
            tracing::error!(%error, "the function that is told of operations could not be removed");
        }
    }
}
