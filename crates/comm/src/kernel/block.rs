//! The loop that every kernel runs: a block of accumulators that stays in the first-level cache.
//!
//! For each block of [`BLOCK`] elements: load the first source (or the partial sum of the ranks
//! before), fold the others in order, finish, narrow, store to every target. The block is a local
//! array, so the compiler knows that nothing aliases it and vectorises every loop; sources and
//! targets may be the same memory, because a block is read whole before it is written.
#![expect(unsafe_code, reason = "raw memory of several processes, and vector instructions")]
#![expect(
    clippy::multiple_unsafe_ops_per_block,
    reason = "a pointer's offset and its use are one step in these loops"
)]

use std::mem::{size_of, MaybeUninit};

use super::scalar::{Accumulator, Factor, FoldOp, Scalar};
use super::{KernelOutput, KernelPass};

/// Elements in a block: 8 KiB of `f64`, a quarter of the smallest first-level cache in use.
const BLOCK: usize = 1024;

#[repr(align(64))]
struct Block<A>([MaybeUninit<A>; BLOCK]);

impl<A> Block<A> {
    #[inline(always)]
    fn new() -> Self {
        Self([const { MaybeUninit::uninit() }; BLOCK])
    }
}

/// Runs a pass. `VECTOR`: AVX2 and F16C may be used.
///
/// # Safety
///
/// Every pointer of `pass` is valid for its `count` elements (accumulators for partial sums), no
/// one else writes them meanwhile, and with `VECTOR` the processor has AVX2 and F16C.
#[inline(always)]
pub(super) unsafe fn run<T: Scalar, O: FoldOp, const VECTOR: bool>(pass: &KernelPass<'_>) {
    // SAFETY: the caller's word.
    let mut at = unsafe { run_few::<T, O>(pass) };
    let mut accumulators = Block::<T::Acc>::new();
    while at < pass.count {
        let count = BLOCK.min(pass.count - at);
        // SAFETY: uninitialised numbers that the load (or the copy) below writes before any are read.
        let block = unsafe {
            std::slice::from_raw_parts_mut(accumulators.0.as_mut_ptr().cast::<T::Acc>(), count)
        };
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
}

/// Elements that fit into a few vector registers.
const CHUNK: usize = 32;

/// Few ranks whose element is as wide as its accumulator, the result in all of them: the commonest
/// case, without the detour through a block. Returns how many elements it has done.
///
/// # Safety
///
/// As [`run`].
#[inline(always)]
unsafe fn run_few<T: Scalar, O: FoldOp>(pass: &KernelPass<'_>) -> usize {
    let KernelOutput::Final { targets, factor } = pass.output else { return 0 };
    if !T::FEW || pass.partial.is_some() {
        return 0;
    }
    // SAFETY: the caller's word.
    unsafe {
        match (pass.sources.len(), targets.len()) {
            (2, 2) => chunks::<T, O, 2>(pass, targets, &factor),
            (3, 3) => chunks::<T, O, 3>(pass, targets, &factor),
            (4, 4) => chunks::<T, O, 4>(pass, targets, &factor),
            (8, 8) => chunks::<T, O, 8>(pass, targets, &factor),
            _ => 0,
        }
    }
}

/// # Safety
///
/// As [`run`]; the pass has `N` sources and `N` targets.
#[inline(always)]
unsafe fn chunks<T: Scalar, O: FoldOp, const N: usize>(
    pass: &KernelPass<'_>,
    targets: &[*mut u8],
    factor: &Factor,
) -> usize {
    let sources: [*const T; N] = std::array::from_fn(|rank| pass.sources[rank].cast());
    let targets: [*mut T; N] = std::array::from_fn(|rank| targets[rank].cast());
    let mut at = 0;
    while at + CHUNK <= pass.count {
        let mut chunk = [T::default(); CHUNK];
        for (index, element) in chunk.iter_mut().enumerate() {
            // SAFETY: at + CHUNK is at most count.
            let mut sum = unsafe { sources[0].add(at + index).read_unaligned() }.widen();
            for source in &sources[1..] {
                // SAFETY: as above.
                sum = O::fold(sum, unsafe { source.add(at + index).read_unaligned() }.widen());
            }
            *element = T::narrow(sum.finish(factor));
        }
        // The whole chunk is read before any of it is written: targets are the sources.
        for target in &targets {
            // SAFETY: at + CHUNK is at most count.
            unsafe { target.add(at).cast::<[T; CHUNK]>().write_unaligned(chunk) };
        }
        at += CHUNK;
    }
    at
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
        let mut wide = Block::<T::Acc>::new();
        let wide = wide.0.as_mut_ptr().cast::<T::Acc>();
        // SAFETY: uninitialised numbers that load_block writes before any are read.
        let wide = unsafe { std::slice::from_raw_parts_mut(wide, block.len()) };
        // SAFETY: as in load_block; wide has block.len() elements.
        unsafe { load_block::<T, VECTOR>(source, wide) };
        for (accumulator, element) in block.iter_mut().zip(wide) {
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
    pass: &KernelPass<'_>,
    at: usize,
    block: &mut [T::Acc],
) {
    match pass.output {
        KernelOutput::Partial(partial) => {
            // SAFETY: by the caller's word.
            let to = unsafe { partial.cast::<T::Acc>().add(at) };
            // SAFETY: to has block.len() accumulators; the block is our own.
            unsafe { copy_to(block.as_ptr().cast(), to.cast(), size_of_val(block)) };
        }
        KernelOutput::Final { targets, ref factor } => {
            if !matches!(factor, Factor::Keep) {
                for accumulator in block.iter_mut() {
                    *accumulator = accumulator.finish(factor);
                }
            }
            let mut narrow = Block::<T>::new();
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
        element.write(T::narrow(*accumulator));
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
