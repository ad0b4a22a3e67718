//! The element types that collectives move and reduce.
//!
//! The set is closed: every backend and every kernel covers exactly these, so the trait is sealed.

use half::{bf16, f16};

/// The type of one element, as a value.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u8)]
pub enum DType {
    /// IEEE 754 binary64.
    F64 = 1,
    /// IEEE 754 binary32.
    F32 = 2,
    /// IEEE 754 binary16; reductions accumulate in `f32`.
    F16 = 3,
    /// bfloat16; reductions accumulate in `f32`.
    BF16 = 4,
    /// Signed 64-bit integer; sums and products wrap.
    I64 = 5,
    /// Signed 32-bit integer; sums and products wrap.
    I32 = 6,
    /// Unsigned byte; sums and products wrap.
    U8 = 7,
}

impl DType {
    /// Bytes of one element.
    #[must_use]
    pub const fn size_bytes(self) -> usize {
        match self {
            Self::F64 | Self::I64 => 8,
            Self::F32 | Self::I32 => 4,
            Self::F16 | Self::BF16 => 2,
            Self::U8 => 1,
        }
    }

    /// Bytes of one accumulator: what travels between machines while a sum is under way.
    #[must_use]
    pub(crate) const fn accumulator_bytes(self) -> usize {
        match self {
            Self::F64 | Self::I64 => 8,
            Self::F32 | Self::I32 | Self::F16 | Self::BF16 => 4,
            Self::U8 => 1,
        }
    }

    /// The name that error messages use.
    #[must_use]
    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::F64 => "f64",
            Self::F32 => "f32",
            Self::F16 => "f16",
            Self::BF16 => "bf16",
            Self::I64 => "i64",
            Self::I32 => "i32",
            Self::U8 => "u8",
        }
    }

    pub(crate) const fn from_code(code: u8) -> Option<Self> {
        Some(match code {
            1 => Self::F64,
            2 => Self::F32,
            3 => Self::F16,
            4 => Self::BF16,
            5 => Self::I64,
            6 => Self::I32,
            7 => Self::U8,
            _ => return None,
        })
    }
}

impl std::fmt::Display for DType {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

#[expect(unnameable_types, reason = "sealed: nobody outside may name it")]
mod sealed {
    pub trait Sealed {}
}
pub(crate) use sealed::Sealed;

/// A type that collectives can move: plain bytes without padding, any bit pattern valid.
pub trait Element: Sealed + bytemuck::Pod + Send + Sync + 'static {
    /// The same type as a value.
    const DTYPE: DType;
}

/// The floating-point elements: those that can be averaged or scaled.
pub trait Float: Element {}

macro_rules! elements {
    ($($type:ty => $dtype:ident),*) => {$(
        impl Sealed for $type {}
        impl Element for $type {
            const DTYPE: DType = DType::$dtype;
        }
    )*};
}
elements!(f64 => F64, f32 => F32, f16 => F16, bf16 => BF16, i64 => I64, i32 => I32, u8 => U8);

impl Float for f64 {}
impl Float for f32 {}
impl Float for f16 {}
impl Float for bf16 {}
