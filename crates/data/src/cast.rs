//! Conversions between counts on disk (`u64`) and in memory (`usize`), which are the same thing on
//! 64-bit machines.

#[cfg(not(target_pointer_width = "64"))]
compile_error!("phalanx-data addresses files beyond 4 GiB: it needs a 64-bit machine");

/// A count or offset from a file, as an index in memory.
#[expect(clippy::cast_possible_truncation, reason = "usize has 64 bits, see above")]
pub(crate) const fn to_usize(count: u64) -> usize {
    count as usize
}

/// A length in memory, as a count for a file.
pub(crate) const fn to_u64(count: usize) -> u64 {
    count as u64
}
