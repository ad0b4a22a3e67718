//! The arithmetic of one element, written so that loops over it vectorise.

use half::{bf16, f16};

use crate::reduce_op::Finish;

/// What sums are held in: the element itself, or `f32` for halves.
pub(crate) trait Accumulator: Copy + Default + 'static {
    fn add(self, other: Self) -> Self;
    fn multiply(self, other: Self) -> Self;
    fn min(self, other: Self) -> Self;
    fn max(self, other: Self) -> Self;
    /// Applies what comes once, after the fold.
    fn finish(self, factor: &Factor) -> Self;
}

/// A [`Finish`] with its number worked out in every accumulator type.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Factor {
    Keep,
    Divide { f32: f32, f64: f64 },
    Multiply { f32: f32, f64: f64 },
}

impl Factor {
    pub(crate) fn new(finish: Finish, world_size: usize) -> Self {
        match finish {
            Finish::Keep => Self::Keep,
            #[expect(clippy::cast_possible_truncation, reason = "the factor in the sum's own type")]
            Finish::Scale(factor) => Self::Multiply { f32: factor as f32, f64: factor },
            #[expect(clippy::cast_precision_loss, reason = "world sizes are small")]
            Finish::Divide => {
                let (f32, f64) = (world_size as f32, world_size as f64);
                // The reciprocal of a power of two is exact: the same bits, without the division.
                if world_size.is_power_of_two() {
                    Self::Multiply { f32: 1.0 / f32, f64: 1.0 / f64 }
                } else {
                    Self::Divide { f32, f64 }
                }
            }
        }
    }
}

macro_rules! float_accumulator {
    ($($type:ident),*) => {$(
        impl Accumulator for $type {
            #[inline(always)]
            fn add(self, other: Self) -> Self { self + other }
            #[inline(always)]
            fn multiply(self, other: Self) -> Self { self * other }
            #[inline(always)]
            #[expect(clippy::float_cmp, reason = "x != x is the NaN test that vectorises")]
            fn min(self, other: Self) -> Self {
                if other < self || other != other { other } else { self }
            }
            #[inline(always)]
            #[expect(clippy::float_cmp, reason = "x != x is the NaN test that vectorises")]
            fn max(self, other: Self) -> Self {
                if other > self || other != other { other } else { self }
            }
            #[inline(always)]
            fn finish(self, factor: &Factor) -> Self {
                match factor {
                    Factor::Keep => self,
                    Factor::Divide { $type: number, .. } => self / number,
                    Factor::Multiply { $type: number, .. } => self * number,
                }
            }
        }
    )*};
}
float_accumulator!(f32, f64);

macro_rules! integer_accumulator {
    ($($type:ty),*) => {$(
        impl Accumulator for $type {
            #[inline(always)]
            fn add(self, other: Self) -> Self { self.wrapping_add(other) }
            #[inline(always)]
            fn multiply(self, other: Self) -> Self { self.wrapping_mul(other) }
            #[inline(always)]
            fn min(self, other: Self) -> Self { if other < self { other } else { self } }
            #[inline(always)]
            fn max(self, other: Self) -> Self { if other > self { other } else { self } }
            #[inline(always)]
            fn finish(self, _: &Factor) -> Self { self }
        }
    )*};
}
integer_accumulator!(i64, i32, u8);

/// An element and its accumulator.
pub(crate) trait Scalar: Copy + Default + 'static {
    type Acc: Accumulator;
    /// Whether the accumulator is the element itself.
    const SAME: bool;
    /// Whether a few ranks' elements are best folded in registers.
    const FEW: bool = Self::SAME;
    fn widen(self) -> Self::Acc;
    fn narrow(acc: Self::Acc) -> Self;
}

macro_rules! same {
    ($($type:ty),*) => {$(
        impl Scalar for $type {
            type Acc = $type;
            const SAME: bool = true;
            #[inline(always)]
            fn widen(self) -> $type { self }
            #[inline(always)]
            fn narrow(acc: $type) -> $type { acc }
        }
    )*};
}
same!(f64, f32, i64, i32, u8);

impl Scalar for bf16 {
    type Acc = f32;
    const SAME: bool = false;
    #[inline(always)]
    fn widen(self) -> f32 {
        f32::from_bits(u32::from(self.to_bits()) << 16)
    }
    /// Rounds to nearest, ties to even, as `half` does, but without a branch.
    #[inline(always)]
    #[expect(clippy::cast_possible_truncation, reason = "the upper half of 32 bits")]
    fn narrow(acc: f32) -> Self {
        let bits = acc.to_bits();
        let rounded = bits.wrapping_add(0x7fff + ((bits >> 16) & 1)) >> 16;
        let quiet = (bits >> 16) | 0x40;
        let nan = bits & 0x7fff_ffff > 0x7f80_0000;
        Self::from_bits(if nan { quiet } else { rounded } as u16)
    }
}

/// An `f32` that counts as the bf16 that it rounds to.
#[derive(Debug, Clone, Copy, Default)]
#[repr(transparent)]
pub(crate) struct AsBf16(pub(crate) f32);

impl Scalar for AsBf16 {
    type Acc = f32;
    const SAME: bool = false;
    const FEW: bool = true;
    #[inline(always)]
    fn widen(self) -> f32 {
        bf16::narrow(self.0).widen()
    }
    #[inline(always)]
    fn narrow(acc: f32) -> Self {
        Self(bf16::narrow(acc).widen())
    }
}

impl Scalar for f16 {
    type Acc = f32;
    const SAME: bool = false;
    #[inline(always)]
    fn widen(self) -> f32 {
        self.to_f32_const()
    }
    #[inline(always)]
    fn narrow(acc: f32) -> Self {
        Self::from_f32_const(acc)
    }
}

/// How two accumulators become one.
pub(crate) trait FoldOp {
    /// Worth a version of its own for the widest vectors; the others make do with AVX2, which
    /// halves what there is to compile.
    const HOT: bool;
    fn fold<A: Accumulator>(left: A, right: A) -> A;
}

macro_rules! folds {
    ($($name:ident => $method:ident, $hot:expr;)*) => {$(
        #[derive(Debug)]
        pub(crate) struct $name;
        impl FoldOp for $name {
            const HOT: bool = $hot;
            #[inline(always)]
            fn fold<A: Accumulator>(left: A, right: A) -> A { left.$method(right) }
        }
    )*};
}
folds! {
    FoldSum => add, true;
    FoldMin => min, false;
    FoldMax => max, false;
    FoldProduct => multiply, false;
}
