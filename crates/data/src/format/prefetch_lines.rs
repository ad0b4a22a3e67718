//! Asking the processor for memory that will be read soon.
#![expect(unsafe_code, reason = "the prefetch instruction takes a pointer")]

/// Starts to load the cache lines of `bytes`, where the processor has an instruction for that.
#[inline]
pub(crate) fn prefetch_lines(bytes: &[u8]) {
    #[cfg(target_arch = "x86_64")]
    for line in bytes.chunks(64) {
        use std::arch::x86_64::{_mm_prefetch, _MM_HINT_T0};
        // SAFETY: a hint that reads nothing; the pointer is that of a slice all the same.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(line.as_ptr().cast()) };
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _: &[u8] = bytes;
}
