//! What a reduction does with the values of the ranks.
//!
//! Every operation folds in rank order, `((g0 ∘ g1) ∘ g2) ∘ g3`, on every path but NCCL's. Illegal pairs of
//! element type and operation do not compile:
//!
//! ```compile_fail,E0277
//! fn needs<T: phalanx_comm::Element, O: phalanx_comm::ReduceOp<T>>(_: O) {}
//! needs::<i32, _>(phalanx_comm::Avg); // an average of integers has no good answer
//! ```
//! ```
//! fn needs<T: phalanx_comm::Element, O: phalanx_comm::ReduceOp<T>>(_: O) {}
//! needs::<f32, _>(phalanx_comm::Avg);
//! needs::<i32, _>(phalanx_comm::Max);
//! ```

use crate::dtype::{Element, Float};

/// The sum over the ranks; integers wrap.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Sum;
/// The smallest value; a NaN on any rank gives NaN.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Min;
/// The largest value; a NaN on any rank gives NaN.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Max;
/// The product over the ranks; integers wrap.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Product;
/// The sum divided by the number of ranks, once, after the sum.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Avg;
/// The sum times a factor, multiplied once, after the sum (in `f32` for halves). NCCL multiplies what goes into the sum
/// instead, by the factor in the elements' own type.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct ScaledSum(pub f64);

/// As [`ScaledSum`] of `f32`, each value rounded to bf16 before and after: the bits of a [`ScaledSum`] of
/// values that were rounded to bf16, without memory for those. Not over NCCL.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Bf16Sum(pub f64);

/// How two values become one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Fold {
    Sum = 1,
    Min = 2,
    Max = 3,
    Product = 4,
    /// Of `f32` rounded to bf16.
    Bf16Sum = 5,
}

/// What happens once to the folded value.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Finish {
    Keep,
    Divide,
    Scale(f64),
}

/// A reduction as a value.
#[doc(hidden)]
#[expect(unnameable_types, reason = "part of a sealed trait")]
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Reduction {
    pub(crate) fold: Fold,
    pub(crate) finish: Finish,
}

impl Reduction {
    /// A number that differs between reductions, for the fingerprint.
    pub(crate) fn code(self) -> u64 {
        let base = self.fold as u64;
        match self.finish {
            Finish::Keep => base,
            Finish::Divide => 16 + base,
            Finish::Scale(factor) => factor.to_bits().rotate_left(17) ^ (32 + base),
        }
    }

    pub(crate) fn name(self) -> &'static str {
        match (self.fold, self.finish) {
            (Fold::Sum, Finish::Keep) => "sum",
            (Fold::Sum, Finish::Divide) => "avg",
            (Fold::Sum, Finish::Scale(_)) => "scaled sum",
            (Fold::Min, _) => "min",
            (Fold::Max, _) => "max",
            (Fold::Product, _) => "product",
            (Fold::Bf16Sum, _) => "scaled sum in bf16",
        }
    }
}

#[expect(unnameable_types, reason = "sealed: nobody outside may name them")]
mod sealed {
    pub trait Sealed {}
    impl Sealed for super::Sum {}
    impl Sealed for super::Min {}
    impl Sealed for super::Max {}
    impl Sealed for super::Product {}
    impl Sealed for super::Avg {}
    impl Sealed for super::ScaledSum {}
    impl Sealed for super::Bf16Sum {}
    /// What only this crate may ask of an operation.
    pub trait Reduce {
        fn reduction(self) -> super::Reduction;
    }
}
pub(crate) use sealed::Reduce;

/// A reduction that is legal for elements of type `T`.
pub trait ReduceOp<T: Element>: sealed::Sealed + Reduce + Copy + Send + 'static {}

macro_rules! reduce {
    ($($op:ident, $this:pat => $fold:ident, $finish:expr;)*) => {$(
        impl Reduce for $op {
            fn reduction(self) -> Reduction {
                let $this = self;
                Reduction { fold: Fold::$fold, finish: $finish }
            }
        }
    )*};
}
reduce! {
    Sum, _ => Sum, Finish::Keep;
    Min, _ => Min, Finish::Keep;
    Max, _ => Max, Finish::Keep;
    Product, _ => Product, Finish::Keep;
    Avg, _ => Sum, Finish::Divide;
    ScaledSum, ScaledSum(factor) => Sum, Finish::Scale(factor);
    Bf16Sum, Bf16Sum(factor) => Bf16Sum, Finish::Scale(factor);
}

impl<T: Element> ReduceOp<T> for Sum {}
impl<T: Element> ReduceOp<T> for Min {}
impl<T: Element> ReduceOp<T> for Max {}
impl<T: Element> ReduceOp<T> for Product {}
impl<T: Float> ReduceOp<T> for Avg {}
impl<T: Float> ReduceOp<T> for ScaledSum {}
impl ReduceOp<f32> for Bf16Sum {}
