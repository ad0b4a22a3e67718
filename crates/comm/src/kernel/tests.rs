//! Kernels against plain loops of one element at a time: every type, operation and instruction set
//! that this processor has, bit by bit.

#![expect(unsafe_code, reason = "calls the kernels on slices of its own")]
#![expect(clippy::shadow_unrelated, reason = "the same thing twice, a different way")]

use half::{bf16, f16};

use super::block;
use super::scalar::{
    Accumulator, AsBf16, Factor, FoldMax, FoldMin, FoldOp, FoldProduct, FoldSum, Scalar,
};
use super::{dispatch, KernelOutput, KernelPass};
use crate::reduce_op::Finish;

/// Numbers with all kinds of bits; for floats also NaN, infinities, subnormals and zeros.
fn noise(source: usize, index: usize) -> u64 {
    let mut x = (source as u64 + 1) << 48 ^ index as u64;
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

trait Sample: Scalar + bytemuck::Pod {
    /// From arbitrary bits.
    fn sample(bits: u64) -> Self {
        let bytes = bits.to_le_bytes();
        bytemuck::pod_read_unaligned(&bytes[..size_of::<Self>()])
    }
    /// Equal bits, all NaN being one.
    fn same(self, other: Self) -> bool;
}

macro_rules! samples {
    ($($type:ty => $nan:expr;)*) => {$(
        impl Sample for $type {
            fn same(self, other: Self) -> bool {
                let nan: fn(Self) -> bool = $nan;
                bytemuck::bytes_of(&self) == bytemuck::bytes_of(&other) || (nan(self) && nan(other))
            }
        }
    )*};
}
samples! {
    f64 => |x| x.is_nan(); f32 => |x| x.is_nan(); f16 => f16::is_nan; bf16 => bf16::is_nan;
    AsBf16 => |x| x.0.is_nan(); i64 => |_| false; i32 => |_| false; u8 => |_| false;
}

// SAFETY: an f32, transparently.
unsafe impl bytemuck::Zeroable for AsBf16 {}
// SAFETY: as above.
unsafe impl bytemuck::Pod for AsBf16 {}

type Kernel = unsafe fn(&KernelPass<'_>);

/// One element at a time, in order. Halves by the `half` crate's own conversions.
fn expected<T: Sample, O: FoldOp>(values: &[T], factor: &Factor) -> T {
    let first = values[0].widen();
    let sum = values[1..].iter().fold(first, |sum, value| O::fold(sum, value.widen()));
    T::narrow(sum.finish(factor))
}

fn check<T: Sample, O: FoldOp>(kernel: Kernel) {
    for sources in 1..6 {
        for count in [0, 1, 7, 31, 32, 33, 1000, 1024, 1025, 3001] {
            for finish in [Finish::Keep, Finish::Divide, Finish::Scale(0.3)] {
                // An odd start: kernels may not count on alignment beyond the element's.
                let buffer = |source| -> Vec<T> {
                    (0..=count).map(|index| T::sample(noise(source, index))).collect()
                };
                let before: Vec<Vec<T>> = (0..sources).map(buffer).collect();
                let mut buffers = before.clone();
                let targets: Vec<*mut u8> =
                    buffers.iter_mut().map(|b| b[1..].as_mut_ptr().cast()).collect();
                let pointers: Vec<*const u8> = targets.iter().map(|t| t.cast_const()).collect();
                let factor = Factor::new(finish, sources);
                let output = KernelOutput::Final { targets: &targets, factor };
                // SAFETY: each buffer has count + 1 elements.
                unsafe { kernel(&KernelPass { partial: None, sources: &pointers, count, output }) };
                for index in 0..=count {
                    let column: Vec<T> = before.iter().map(|b| b[index]).collect();
                    for (buffer, old) in buffers.iter().zip(&column) {
                        let want =
                            if index == 0 { *old } else { expected::<T, O>(&column, &factor) };
                        assert!(buffer[index].same(want), "{sources} sources, {index} of {count}");
                    }
                }
                check_in_two_steps::<T, O>(kernel, &before, &buffers[0], factor);
            }
        }
    }
}

/// Partial sums handed on give the same bits as one pass.
fn check_in_two_steps<T: Sample, O: FoldOp>(
    kernel: Kernel,
    sources: &[Vec<T>],
    whole: &[T],
    factor: Factor,
) {
    let count = whole.len() - 1;
    let pointers: Vec<*const u8> = sources.iter().map(|s| s[1..].as_ptr().cast()).collect();
    let cut = sources.len() / 2;
    if cut == 0 {
        return;
    }
    let mut partial = vec![T::Acc::default(); count];
    let output = KernelOutput::Partial(partial.as_mut_ptr().cast());
    // SAFETY: every buffer has count elements from its second on, partial has count accumulators.
    unsafe { kernel(&KernelPass { partial: None, sources: &pointers[..cut], count, output }) };
    let mut result = vec![T::default(); count];
    let targets = [result.as_mut_ptr().cast()];
    let output = KernelOutput::Final { targets: &targets, factor };
    let partial = Some(partial.as_ptr().cast());
    // SAFETY: as above; result has count elements.
    unsafe { kernel(&KernelPass { partial, sources: &pointers[cut..], count, output }) };
    for (index, (one, two)) in result.iter().zip(&whole[1..]).enumerate() {
        assert!(one.same(*two), "{index} of {count}");
    }
}

fn check_type<T: Sample>() {
    macro_rules! each {
        ($($op:ty),*) => {$(
            check::<T, $op>(block::run::<T, $op, false>);
            check::<T, $op>(dispatch::<T, $op>);
            #[cfg(target_arch = "x86_64")]
            if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("f16c") {
                check::<T, $op>(super::with_avx2::<T, $op>);
            }
        )*};
    }
    each!(FoldSum, FoldMin, FoldMax, FoldProduct);
}

#[test]
fn f64_kernels_equal_plain_loops() {
    check_type::<f64>();
}

#[test]
fn f32_kernels_equal_plain_loops() {
    check_type::<f32>();
}

#[test]
fn f16_kernels_equal_plain_loops() {
    check_type::<f16>();
}

#[test]
fn bf16_kernels_equal_plain_loops() {
    check_type::<bf16>();
}

/// What [`AsBf16`] says of one element, against halves of memory of their own.
#[test]
fn f32_that_count_as_bf16_give_what_bf16_give() {
    check_type::<AsBf16>();
    let number = |source, index| f32::sample(noise(source, index));
    for factor in [Factor::Keep, Factor::new(Finish::Scale(0.3), 3)] {
        for index in 0..100_000 {
            let numbers: Vec<f32> = (0..3).map(|source| number(source, index)).collect();
            let wide: Vec<AsBf16> = numbers.iter().map(|&number| AsBf16(number)).collect();
            let halves: Vec<bf16> = numbers.iter().map(|&number| bf16::from_f32(number)).collect();
            let found = expected::<AsBf16, FoldSum>(&wide, &factor).0;
            assert!(found.same(expected::<bf16, FoldSum>(&halves, &factor).to_f32()));
        }
    }
}

#[test]
fn integer_kernels_equal_plain_loops() {
    check_type::<i64>();
    check_type::<i32>();
    check_type::<u8>();
}

#[test]
fn our_half_conversions_are_those_of_the_half_crate() {
    for bits in 0..=u16::MAX {
        let (ours, theirs) = (bf16::from_bits(bits).widen(), bf16::from_bits(bits).to_f32());
        assert!(ours.same(theirs), "{bits:x}");
        let (ours, theirs) = (f16::from_bits(bits).widen(), f16::from_bits(bits).to_f32());
        assert!(ours.same(theirs), "{bits:x}");
    }
    for index in 0..200_000 {
        let number = f32::sample(noise(9, index));
        assert!(bf16::narrow(number).same(bf16::from_f32(number)), "{number:e}");
        assert!(<f16 as Scalar>::narrow(number).same(f16::from_f32(number)), "{number:e}");
    }
}
