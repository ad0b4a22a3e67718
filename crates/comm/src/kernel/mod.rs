//! Reduction kernels: fold the memory of several ranks in rank order and write the result to all.
//!
//! One loop ([`block`]) for every element type and operation, compiled three times on x86-64
//! (baseline, AVX2 + F16C, AVX-512) and chosen at run time; elsewhere the baseline has vectors
//! already (NEON on aarch64). The result does not depend on which one ran: no operation is fused or
//! reassociated.
//!
//! Stores are plain at every size. Targets are sources, whose lines a block has just brought into
//! the cache; stores that go around it made 64 MiB over two ranks half as slow again (Zen 3).
#![expect(unsafe_code, reason = "raw memory of several processes, run-time dispatch")]

mod block;
mod scalar;
#[cfg(test)]
mod tests;
#[cfg(target_arch = "x86_64")]
mod x86;

use half::{bf16, f16};

pub(crate) use scalar::Factor;
use scalar::{AsBf16, FoldMax, FoldMin, FoldOp, FoldProduct, FoldSum, Scalar};

use crate::dtype::DType;
use crate::reduce_op::Fold;

/// One sweep over `count` elements.
#[derive(Debug, Clone, Copy)]
pub(crate) struct KernelPass<'a> {
    /// Accumulators of the ranks before these, if any.
    pub(crate) partial: Option<*const u8>,
    /// The values of consecutive ranks, in order.
    pub(crate) sources: &'a [*const u8],
    pub(crate) count: usize,
    pub(crate) output: KernelOutput<'a>,
}

/// Where a sweep leaves its result.
#[derive(Debug, Clone, Copy)]
pub(crate) enum KernelOutput<'a> {
    /// As accumulators, for the ranks after these to go on with.
    Partial(*mut u8),
    /// Finished, in each target. A target may be one of the sources.
    Final { targets: &'a [*mut u8], factor: Factor },
}

/// Runs a sweep.
///
/// # Safety
///
/// Sources and targets are valid for `count` elements of `dtype`, partial sums for as many of its
/// accumulators; nobody else writes the sources or touches the targets meanwhile; a target is
/// either one of the sources or does not overlap them.
pub(crate) unsafe fn reduce(dtype: DType, fold: Fold, pass: &KernelPass<'_>) {
    match dtype {
        // SAFETY: the caller's word, with T the element type of dtype, in every arm.
        DType::F32 if fold == Fold::Bf16Sum => unsafe { dispatch::<AsBf16, FoldSum>(pass) },
        // SAFETY: as above.
        DType::F64 => unsafe { typed::<f64>(fold, pass) },
        // SAFETY: as above.
        DType::F32 => unsafe { typed::<f32>(fold, pass) },
        // SAFETY: as above.
        DType::F16 => unsafe { typed::<f16>(fold, pass) },
        // SAFETY: as above.
        DType::BF16 => unsafe { typed::<bf16>(fold, pass) },
        // SAFETY: as above.
        DType::I64 => unsafe { typed::<i64>(fold, pass) },
        // SAFETY: as above.
        DType::I32 => unsafe { typed::<i32>(fold, pass) },
        // SAFETY: as above.
        DType::U8 => unsafe { typed::<u8>(fold, pass) },
    }
}

unsafe fn typed<T: Scalar>(fold: Fold, pass: &KernelPass<'_>) {
    match fold {
        // SAFETY: the caller's word.
        // Of other types than f32 no `ReduceOp` has the second.
        Fold::Sum | Fold::Bf16Sum => unsafe { dispatch::<T, FoldSum>(pass) },
        // SAFETY: the caller's word.
        Fold::Min => unsafe { dispatch::<T, FoldMin>(pass) },
        // SAFETY: the caller's word.
        Fold::Max => unsafe { dispatch::<T, FoldMax>(pass) },
        // SAFETY: the caller's word.
        Fold::Product => unsafe { dispatch::<T, FoldProduct>(pass) },
    }
}

#[cfg(target_arch = "x86_64")]
unsafe fn dispatch<T: Scalar, O: FoldOp>(pass: &KernelPass<'_>) {
    // std caches the answers: each test is a load and a mask.
    if O::HOT
        && is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx512vl")
        && is_x86_feature_detected!("f16c")
    {
        // SAFETY: the features are there; the rest is the caller's word.
        unsafe { with_avx512::<T, O>(pass) }
    } else if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("f16c") {
        // SAFETY: as above.
        unsafe { with_avx2::<T, O>(pass) }
    } else {
        // SAFETY: the caller's word; nothing is asked of the processor.
        unsafe { block::run::<T, O, false>(pass) }
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx2,f16c")]
unsafe fn with_avx512<T: Scalar, O: FoldOp>(pass: &KernelPass<'_>) {
    // SAFETY: the caller's word.
    unsafe { block::run::<T, O, true>(pass) }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,f16c")]
unsafe fn with_avx2<T: Scalar, O: FoldOp>(pass: &KernelPass<'_>) {
    // SAFETY: the caller's word.
    unsafe { block::run::<T, O, true>(pass) }
}

#[cfg(not(target_arch = "x86_64"))]
unsafe fn dispatch<T: Scalar, O: FoldOp>(pass: &KernelPass<'_>) {
    // SAFETY: the caller's word.
    unsafe { block::run::<T, O, false>(pass) }
}
