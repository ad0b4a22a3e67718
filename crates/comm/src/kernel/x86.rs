//! The three things that a compiler does not find by itself on x86-64: F16C conversions both ways,
//! and stores that go around the caches.
#![expect(unsafe_code, reason = "vector instructions")]

use std::arch::x86_64::{
    __m128i, __m256i, _mm256_cvtph_ps, _mm256_cvtps_ph, _mm256_loadu_ps, _mm256_loadu_si256,
    _mm256_storeu_ps, _mm256_stream_si256, _mm_loadu_si128, _mm_storeu_si128,
    _MM_FROUND_TO_NEAREST_INT,
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

/// Copies without leaving the target in the caches. The caller fences afterwards.
///
/// # Safety
///
/// Both sides have `bytes` bytes and do not overlap; the processor has AVX2.
#[inline]
#[target_feature(enable = "avx2")]
pub(super) unsafe fn stream(from: *const u8, to: *mut u8, bytes: usize) {
    const WIDTH: usize = size_of::<__m256i>();
    let head = to.align_offset(WIDTH).min(bytes);
    // SAFETY: head is at most bytes.
    unsafe { std::ptr::copy_nonoverlapping(from, to, head) };
    let mut at = head;
    while at + WIDTH <= bytes {
        // SAFETY: WIDTH bytes from `at` are inside the source.
        let vector = unsafe { _mm256_loadu_si256(from.add(at).cast()) };
        // SAFETY: and inside the target, which is aligned from `head` on.
        unsafe { _mm256_stream_si256(to.add(at).cast(), vector) };
        at += WIDTH;
    }
    // SAFETY: the rest is inside both sides.
    unsafe { std::ptr::copy_nonoverlapping(from.add(at), to.add(at), bytes - at) };
}
