//! What stands before a snapshot in its slot. Pure.
//!
//! ```text
//! u64 × 4   magic, step, nonce, bytes of the snapshot
//! u64       the beginning of the SHA-256 of these
//! ```
//!
//! It is cleared before the first byte of a snapshot is written, and written after the last one. So a slot whose writer died has
//! none, or one that is cut off, which its checksum tells. The snapshot guards its own bytes.

use sha2::{Digest as _, Sha256};

/// What a snapshot begins behind: a page, so that its own pages are whole.
pub(super) const PAGE_BYTES: u64 = 4096;
/// Bytes of the header itself.
pub(super) const HEADER_BYTES: usize = 40;

const MAGIC: u64 = u64::from_le_bytes(*b"phxslot1");

/// Which snapshot: all ranks' shares of one have the same stamp, and no other snapshot has it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stamp {
    /// After which step it was made.
    pub step: u64,
    /// Drawn for each: two attempts may come to the same step.
    pub nonce: u64,
}

/// The bytes of a header.
pub(super) fn encode(stamp: Stamp, bytes: u64) -> [u8; HEADER_BYTES] {
    let mut header = [0; HEADER_BYTES];
    for (word, value) in header.chunks_exact_mut(8).zip([MAGIC, stamp.step, stamp.nonce, bytes]) {
        word.copy_from_slice(&value.to_le_bytes());
    }
    let sum = sum(&header);
    header[HEADER_BYTES - 8..].copy_from_slice(&sum);
    header
}

/// Whose snapshot stands behind it and how long that is; `None` where there is no whole header.
pub(super) fn decode(header: &[u8; HEADER_BYTES]) -> Option<(Stamp, u64)> {
    let word = |at: usize| header[at * 8..].first_chunk().copied().map_or(0, u64::from_le_bytes);
    let is_whole = word(0) == MAGIC && header[HEADER_BYTES - 8..] == sum(header);
    is_whole.then(|| (Stamp { step: word(1), nonce: word(2) }, word(3)))
}

fn sum(header: &[u8; HEADER_BYTES]) -> [u8; 8] {
    let hash = Sha256::digest(&header[..HEADER_BYTES - 8]);
    hash.first_chunk().copied().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_header_is_read_back_and_no_part_or_change_of_it_is() {
        let stamp = Stamp { step: 120, nonce: 7 };
        let header = encode(stamp, 5000);
        assert_eq!(decode(&header), Some((stamp, 5000)));
        for bit in 0..HEADER_BYTES * 8 {
            let mut changed = header;
            changed[bit / 8] ^= 1 << (bit % 8);
            assert_eq!(decode(&changed), None, "bit {bit}");
        }
        for len in 0..HEADER_BYTES {
            let mut cut = [0; HEADER_BYTES];
            cut[..len].copy_from_slice(&header[..len]);
            assert_eq!(decode(&cut), None, "{len} bytes");
        }
    }
}
