//! CRC-32C of what travels between machines. Pure.
//!
//! TCP has a sum of 16 bits, which misses one damaged packet in 65 536, and is computed by the network card: what is
//! damaged in the memory of a card, a switch or a host has a sum that fits. CRC-32C finds every error of up to 32 bits in a row,
//! and every one of up to three bits in messages of the lengths here; of others one in 2³² escapes.
//!
//! Cost: `docs/performance.md` has figures. Where the processor multiplies polynomials (`pclmulqdq`, up to 64 bytes at a
//! time) long messages are folded first ([`fold`]), which is several times as fast as its CRC instruction.
//!
//! # Source
//!
//! RFC 3720, 12.1 and B.4 (polynomial, order of bits and bytes, examples). Stone and Partridge, *When the CRC and TCP Checksum
//! Disagree*, SIGCOMM 2000.

#[cfg(target_arch = "x86_64")]
mod fold;

/// Bytes of a checksum on a wire, little-endian.
pub(crate) const CHECKSUM_BYTES: usize = 4;

/// The checksum of `bytes`.
pub(crate) fn of(bytes: &[u8]) -> u32 {
    append(0, bytes)
}

/// The checksum of a message of which a part with checksum `before` is followed by `bytes`.
pub(crate) fn append(before: u32, bytes: &[u8]) -> u32 {
    #[cfg(target_arch = "x86_64")]
    if let Some((block, rest)) = fold::fold(!before, bytes) {
        // The block has the remainder of all that was folded into it, begun with nothing: `!0` undone.
        return crc32c::crc32c_append(crc32c::crc32c_append(!0, &block), rest);
    }
    crc32c::crc32c_append(before, bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Bit by bit, as the polynomial is written.
    fn plain(bytes: &[u8]) -> u32 {
        let step = |crc: u32| (crc >> 1) ^ (0x82f6_3b78 & 0_u32.wrapping_sub(crc & 1));
        let byte = |crc: u32, byte: &u8| (0..8).fold(crc ^ u32::from(*byte), |crc, _| step(crc));
        !bytes.iter().fold(!0, byte)
    }

    fn bytes(len: usize) -> Vec<u8> {
        let value = |at: u32| at.wrapping_mul(2_654_435_761).to_le_bytes()[2];
        (0..u32::try_from(len).unwrap()).map(value).collect()
    }

    #[test]
    fn the_examples_of_the_rfc_are_met() {
        let ascending: Vec<u8> = (0..32).collect();
        let descending: Vec<u8> = (0..32).rev().collect();
        let examples: [(&[u8], u32); 6] = [
            (b"", 0),
            (b"123456789", 0xe306_9283),
            (&[0; 32], 0x8a91_36aa),
            (&[0xff; 32], 0x62a8_ab43),
            (&ascending, 0x46dd_794e),
            (&descending, 0x113f_db5c),
        ];
        for (bytes, expected) in examples {
            assert_eq!(of(bytes), expected);
            assert_eq!(plain(bytes), expected);
        }
    }

    #[test]
    fn every_length_start_and_cut_has_the_polynomials_remainder() {
        let all = bytes(6000);
        let lengths = (0..70).chain([255, 256, 257, 511, 512, 513, 767, 1023, 1024, 1025, 5901]);
        for len in lengths {
            for start in [0, 1, 7, 63] {
                let part = &all[start..start + len];
                let expected = plain(part);
                assert_eq!(of(part), expected, "{len} bytes from {start}");
                for cut in [len / 3, len.saturating_sub(300)] {
                    let (head, tail) = part.split_at(cut);
                    assert_eq!(append(of(head), tail), expected, "{len} bytes, cut at {cut}");
                }
            }
        }
    }

    #[test]
    fn ten_thousand_flipped_bits_are_all_found() {
        let mut message = bytes(1 << 20);
        let right = of(&message);
        let mut short = bytes(400);
        let of_short = of(&short);
        for flip in 0..10_000_usize {
            let bit = flip % (short.len() * 8);
            short[bit / 8] ^= 1 << (bit % 8);
            assert_ne!(of(&short), of_short, "bit {bit}");
            short[bit / 8] ^= 1 << (bit % 8);
        }
        for flip in 0..300_usize {
            let bit = flip * 7_919_991 % (message.len() * 8);
            message[bit / 8] ^= 1 << (bit % 8);
            assert_ne!(of(&message), right, "bit {bit}");
            message[bit / 8] ^= 1 << (bit % 8);
        }
        assert_eq!(of(&message), right);
    }
}
