//! Reductions of received pieces, in rank order, by the kernels of the host backend.
#![expect(unsafe_code, reason = "reads and writes the caller's buffer by address")]

use super::ffi::MpiAddress;
use crate::dtype::DType;
use crate::kernel::{self, Factor, KernelOutput, KernelPass};
use crate::reduce_op::Reduction;

/// Folds `sources`, the buffers of all ranks in rank order, into `target`, `bytes` of each. The target
/// may be one of the sources. No message that touches any of them is under way.
pub(super) fn fold(
    (dtype, reduction): (DType, Reduction),
    sources: &[*const u8],
    target: MpiAddress,
    bytes: usize,
) {
    let factor = Factor::new(reduction.finish, sources.len());
    let output = KernelOutput::Final { targets: &[target.0], factor };
    let count = bytes / dtype.size_bytes();
    let pass = KernelPass { partial: None, sources, count, output };
    // SAFETY: the caller of this crate's lane keeps the buffer and leaves it alone while the call is under
    // way; what was received lies in memory of ours of the same length; nothing else touches either.
    unsafe { kernel::reduce(dtype, reduction.fold, &pass) };
}

/// Copies out of the caller's buffer.
pub(super) fn copy_out(from: MpiAddress, bytes: usize) -> Vec<u8> {
    let mut copy = vec![0; bytes];
    crate::memory::mapping::copy(from.0, copy.as_mut_ptr(), bytes);
    copy
}
