//! Memory that a step has freed is kept for the next one. glibc gives large blocks back to the system at once and asks
//! for them again in the next step, which then touches every page of its activations and gradients for the first time.
//! `docs/performance.md` has what that costs.
#![expect(unsafe_code, reason = "gate: tells the C library's allocator")]

use std::sync::Once;

/// Bytes that the heap grows by at least.
#[cfg(all(target_os = "linux", target_env = "gnu"))]
const GROWTH_BYTES: libc::c_int = 64 << 20;

/// Lets this process keep freed memory, from now on. Its peak stays what it was; between steps it holds what a step needs.
pub(crate) fn keep() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        #[cfg(all(target_os = "linux", target_env = "gnu"))]
        for (setting, value) in
            [(libc::M_MMAP_MAX, 0), (libc::M_TRIM_THRESHOLD, -1), (libc::M_TOP_PAD, GROWTH_BYTES)]
        {
            // SAFETY: three numbers that the allocator's manual has for this; it may be called at any time.
            if unsafe { libc::mallopt(setting, value) } == 0 {
                tracing::debug!(
                    setting,
                    value,
                    "the C library's allocator does not take this setting"
                );
            }
        }
    });
}
