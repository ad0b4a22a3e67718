//! What a compiler does not find by itself on x86-64: the F16C conversions, both ways.
#![expect(unsafe_code, reason = "vector instructions")]
#![expect(
    clippy::multiple_unsafe_ops_per_block,
    reason = "a pointer's offset and its use are one step in these loops"
)]

use std::arch::x86_64::{
    __m128i, _mm256_cvtph_ps, _mm256_cvtps_ph, _mm256_loadu_ps, _mm256_storeu_ps, _mm_loadu_si128,
    _mm_storeu_si128, _MM_FROUND_TO_NEAREST_INT,
};

use half::f16;

const LANES: usize = 8;

/// Converts `count` halves to `f32`.
///
/// # Safety
///
/// Both sides have `count` elements; the processor has AVX and F16C.
#[inline]
#[target_feature(enable = "avx2,f16c")]
pub(super) unsafe fn widen_f16(from: *const f16, to: *mut f32, count: usize) {
    let mut at = 0;
    while at + LANES <= count {
        // SAFETY: eight elements from `at` are inside both sides.
        let half = unsafe { _mm_loadu_si128(from.add(at).cast::<__m128i>()) };
        // SAFETY: as above.
        unsafe { _mm256_storeu_ps(to.add(at), _mm256_cvtph_ps(half)) };
        at += LANES;
    }
    if at < count {
        let (mut half, mut wide) = ([f16::ZERO; LANES], [0.0_f32; LANES]);
        // SAFETY: count - at < LANES elements remain.
        unsafe { std::ptr::copy_nonoverlapping(from.add(at), half.as_mut_ptr(), count - at) };
        // SAFETY: the arrays have LANES elements.
        unsafe { widen_f16(half.as_ptr(), wide.as_mut_ptr(), LANES) };
        // SAFETY: count - at < LANES elements remain.
        unsafe { std::ptr::copy_nonoverlapping(wide.as_ptr(), to.add(at), count - at) };
    }
}

/// Converts `count` numbers to halves, to nearest, ties to even.
///
/// # Safety
///
/// As [`widen_f16`].
#[inline]
#[target_feature(enable = "avx2,f16c")]
pub(super) unsafe fn narrow_f16(from: *const f32, to: *mut f16, count: usize) {
    let mut at = 0;
    while at + LANES <= count {
        // SAFETY: eight elements from `at` are inside both sides.
        let wide = unsafe { _mm256_loadu_ps(from.add(at)) };
        let half = _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(wide);
        // SAFETY: as above.
        unsafe { _mm_storeu_si128(to.add(at).cast::<__m128i>(), half) };
        at += LANES;
    }
    if at < count {
        let (mut wide, mut half) = ([0.0_f32; LANES], [f16::ZERO; LANES]);
        // SAFETY: count - at < LANES elements remain.
        unsafe { std::ptr::copy_nonoverlapping(from.add(at), wide.as_mut_ptr(), count - at) };
        // SAFETY: the arrays have LANES elements.
        unsafe { narrow_f16(wide.as_ptr(), half.as_mut_ptr(), LANES) };
        // SAFETY: count - at < LANES elements remain.
        unsafe { std::ptr::copy_nonoverlapping(half.as_ptr(), to.add(at), count - at) };
    }
}
