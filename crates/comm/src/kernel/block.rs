//! The loop that every kernel runs: a block of accumulators that stays in the first-level cache.
//!
//! For each block of [`BLOCK`] elements: load the first source (or the partial sum of the ranks
//! before), fold the others in order, finish, narrow, store to every target. The block is a local
//! array, so the compiler knows that nothing aliases it and vectorises every loop; sources and
//! targets may be the same memory, because a block is read whole before it is written.
#![expect(unsafe_code, reason = "raw memory of several processes, and vector instructions")]

use std::mem::size_of;

use super::scalar::{Accumulator, Factor, FoldOp, Scalar};
use super::{Output, Pass};

/// Elements in a block: 8 KiB of `f64`, a quarter of the smallest first-level cache in use.
const BLOCK: usize = 1024;

#[repr(align(64))]
struct Block<A>([A; BLOCK]);

/// Runs a pass. `VECTOR`: AVX2 and F16C may be used.
///
/// # Safety
///
/// Every pointer of `pass` is valid for its `count` elements (accumulators for partial sums), no
/// one else writes them meanwhile, and with `VECTOR` the processor has AVX2 and F16C.
#[inline(always)]
pub(super) unsafe fn run<T: Scalar, O: FoldOp, const VECTOR: bool>(pass: &Pass<'_>) {
    let mut accumulators = Block([T::Acc::default(); BLOCK]);
    let mut at = 0;
    while at < pass.count {
        let block = &mut accumulators.0[..BLOCK.min(pass.count - at)];
        let mut sources = pass.sources.iter().map(|source| {
            // SAFETY: `at` is below count, for which the caller vouches.
            unsafe { source.cast::<T>().add(at) }
        });
        if let Some(partial) = pass.partial {
            // SAFETY: as above, in accumulators.
            let from = unsafe { partial.cast::<T::Acc>().add(at) };
            // SAFETY: from has at least block.len() accumulators; the block is our own.
            unsafe { copy_to(from.cast(), block.as_mut_ptr().cast(), size_of_val(block)) };
        } else if let Some(first) = sources.next() {
            // SAFETY: the source has block.len() elements from here.
            unsafe { load_block::<T, VECTOR>(first, block) };
        }
        for source in sources {
            // SAFETY: as above.
            unsafe { fold_block::<T, O, VECTOR>(source, block) };
        }
        // SAFETY: targets have count elements by the caller's word.
        unsafe { store_block::<T, VECTOR>(pass, at, block) };
        at += block.len();
    }
    #[cfg(target_arch = "x86_64")]
    if matches!(pass.output, Output::Final { streaming: true, .. }) {
        // Streaming stores are not ordered by the release store that follows.
        // SAFETY: SSE is part of x86-64.
        unsafe { std::arch::x86_64::_mm_sfence() };
    }
}

/// # Safety
///
/// `source` is valid for `block.len()` elements.
#[inline(always)]
unsafe fn load_block<T: Scalar, const VECTOR: bool>(source: *const T, block: &mut [T::Acc]) {
    #[cfg(target_arch = "x86_64")]
    if VECTOR && is_f16::<T>() {
        // SAFETY: T is f16, so its accumulator is f32; VECTOR says that F16C is there.
        unsafe {
            super::x86::widen_f16(source.cast(), block.as_mut_ptr().cast::<f32>(), block.len());
        }
        return;
    }
    for (index, accumulator) in block.iter_mut().enumerate() {
        // SAFETY: index is below block.len().
        let element = unsafe { source.add(index).read_unaligned() };
        *accumulator = element.widen();
    }
}

/// # Safety
///
/// As [`load_block`].
#[inline(always)]
unsafe fn fold_block<T: Scalar, O: FoldOp, const VECTOR: bool>(
    source: *const T,
    block: &mut [T::Acc],
) {
    #[cfg(target_arch = "x86_64")]
    if VECTOR && is_f16::<T>() {
        let mut wide = Block([T::Acc::default(); BLOCK]);
        // SAFETY: as in load_block; wide has at least block.len() elements.
        unsafe { load_block::<T, VECTOR>(source, &mut wide.0[..block.len()]) };
        for (accumulator, element) in block.iter_mut().zip(&wide.0) {
            *accumulator = O::fold(*accumulator, *element);
        }
        return;
    }
    for (index, accumulator) in block.iter_mut().enumerate() {
        // SAFETY: index is below block.len().
        let element = unsafe { source.add(index).read_unaligned() };
        *accumulator = O::fold(*accumulator, element.widen());
    }
}

/// # Safety
///
/// The output's pointers are valid for elements `at .. at + block.len()`.
#[inline(always)]
unsafe fn store_block<T: Scalar, const VECTOR: bool>(
    pass: &Pass<'_>,
    at: usize,
    block: &mut [T::Acc],
) {
    match pass.output {
        Output::Partial(partial) => {
            // SAFETY: by the caller's word.
            let to = unsafe { partial.cast::<T::Acc>().add(at) };
            // SAFETY: to has block.len() accumulators; the block is our own.
            unsafe { copy_to(block.as_ptr().cast(), to.cast(), size_of_val(block)) };
        }
        Output::Final { targets, streaming, ref factor } => {
            if !matches!(factor, Factor::Keep) {
                for accumulator in block.iter_mut() {
                    *accumulator = accumulator.finish(factor);
                }
            }
            let mut narrow = Block([T::default(); BLOCK]);
            let bytes = block.len() * size_of::<T>();
            let from = if T::SAME {
                block.as_ptr().cast::<u8>()
            } else {
                narrow_block::<T, VECTOR>(block, &mut narrow);
                narrow.0.as_ptr().cast::<u8>()
            };
            for target in targets {
                // SAFETY: by the caller's word.
                let to = unsafe { target.add(at * size_of::<T>()) };
                #[cfg(target_arch = "x86_64")]
                if VECTOR && streaming {
                    // SAFETY: both sides have `bytes` bytes; VECTOR says that AVX2 is there.
                    unsafe { super::x86::stream(from, to, bytes) };
                    continue;
                }
                // SAFETY: both sides have `bytes` bytes, and a local block overlaps nothing.
                unsafe { copy_to(from, to, bytes) };
            }
        }
    }
}

#[inline(always)]
fn narrow_block<T: Scalar, const VECTOR: bool>(block: &[T::Acc], narrow: &mut Block<T>) {
    #[cfg(target_arch = "x86_64")]
    if VECTOR && is_f16::<T>() {
        let to = narrow.0.as_mut_ptr().cast();
        // SAFETY: T is f16 and its accumulator f32; narrow has BLOCK elements; F16C is there.
        unsafe { super::x86::narrow_f16(block.as_ptr().cast::<f32>(), to, block.len()) };
        return;
    }
    for (element, accumulator) in narrow.0.iter_mut().zip(block) {
        *element = T::narrow(*accumulator);
    }
}

#[inline(always)]
fn is_f16<T: 'static>() -> bool {
    std::any::TypeId::of::<T>() == std::any::TypeId::of::<half::f16>()
}

/// # Safety
///
/// Both sides have `bytes` bytes and do not overlap.
#[inline(always)]
unsafe fn copy_to(from: *const u8, to: *mut u8, bytes: usize) {
    // SAFETY: the caller's word.
    unsafe { std::ptr::copy_nonoverlapping(from, to, bytes) };
}
