//! Folding a long message into a block of 256 bytes with the same remainder, by multiplying polynomials without carries.
//!
//! The message is sixteen streams of 128-bit lanes. A lane `a·x⁶⁴ + b` that lies [`BLOCK_BYTES`] before another is congruent to
//! `a·(x^(D+64) mod P) + b·(x^D mod P)` there, `D` = 2048 bits: two multiplications and two additions, in as many lanes at a time as a
//! register has (one, two or four). Bits are reflected, so a product of two 64-bit numbers is one place low; the constants make up for it.
//!
//! Cost: two multiplications for each 16, 32 or 64 bytes.
//!
//! # Source
//!
//! Gopal, Ozturk, Guilford et al., *Fast CRC Computation for Generic Polynomials Using PCLMULQDQ Instruction*, Intel, 2009.
#![expect(unsafe_code, reason = "vector instructions, after a look at the processor")]

use std::arch::x86_64::{
    __m128i, __m256i, __m512i, _mm256_broadcastsi128_si256, _mm256_clmulepi64_epi128,
    _mm256_loadu_si256, _mm256_storeu_si256, _mm256_xor_si256, _mm512_broadcast_i32x4,
    _mm512_clmulepi64_epi128, _mm512_loadu_si512, _mm512_storeu_si512, _mm512_xor_si512,
    _mm_clmulepi64_si128, _mm_loadu_si128, _mm_set_epi64x, _mm_storeu_si128, _mm_xor_si128,
};

/// What is folded at a time, and what a message is folded into.
const BLOCK_BYTES: usize = 256;
/// From here on folding is faster than the processor's CRC instruction alone.
const FOLD_BYTES_MIN: usize = 1024;

/// A block with a message's remainder.
pub(super) type Block = [u8; BLOCK_BYTES];

/// x^`power` mod P for [`BLOCK_BYTES`], reflected, one place up.
const fn constant(power: usize) -> i64 {
    const POLYNOMIAL: u32 = 0x1edc_6f41;
    let (mut value, mut step) = (1_u32, 0);
    while step < power {
        let carry = value >> 31;
        value = (value << 1) ^ (carry * POLYNOMIAL);
        step += 1;
    }
    (value.reverse_bits() as i64) << 1
}

/// For the lower half of a lane, which comes first on the wire and so has the higher powers; and for the upper one.
const LOWER: i64 = constant(BLOCK_BYTES * 8 + 32);
const UPPER: i64 = constant(BLOCK_BYTES * 8 - 32);

/// Folds whole blocks of `bytes`, with a register of CRC-32C before them, into one; and what is left of them. `None`: the message is
/// short, or the processor does not multiply so.
pub(super) fn fold(register: u32, bytes: &[u8]) -> Option<(Block, &[u8])> {
    if bytes.len() < FOLD_BYTES_MIN || !is_x86_feature_detected!("pclmulqdq") {
        return None;
    }
    let (whole, rest) = bytes.as_chunks::<BLOCK_BYTES>();
    let (first, following) = whole.split_first()?;
    let mut block = *first;
    for (byte, with) in block.iter_mut().zip(register.to_le_bytes()) {
        *byte ^= with;
    }
    if is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("vpclmulqdq") {
        // SAFETY: the processor has AVX-512 and multiplies in it.
        unsafe { by_512(&mut block, following) };
    } else if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("vpclmulqdq") {
        // SAFETY: the processor has AVX2 and multiplies in it.
        unsafe { by_256(&mut block, following) };
    } else {
        // SAFETY: the processor multiplies polynomials.
        unsafe { by_128(&mut block, following) };
    }
    Some((block, rest))
}

/// Folds `following` into `block` in registers of one width.
macro_rules! folding {
    ($name:ident, $features:literal, $register:ty, $wide:expr, $load:ident, $store:ident, $multiply:ident, $add:ident) => {
        #[target_feature(enable = $features)]
        fn $name(block: &mut Block, following: &[Block]) {
            const REGISTERS: usize = BLOCK_BYTES / size_of::<$register>();
            let constants: $register = $wide(_mm_set_epi64x(UPPER, LOWER));
            let load = |from: &Block, index: usize| {
                let (parts, _) = from.as_chunks::<{ size_of::<$register>() }>();
                // SAFETY: a part is as long as a register, and may start anywhere.
                unsafe { $load(parts[index].as_ptr().cast()) }
            };
            let mut sums: [$register; REGISTERS] = std::array::from_fn(|index| load(block, index));
            for next in following {
                for (index, sum) in sums.iter_mut().enumerate() {
                    let lower = $multiply::<0x00>(*sum, constants);
                    let upper = $multiply::<0x11>(*sum, constants);
                    *sum = $add($add(lower, upper), load(next, index));
                }
            }
            let (parts, _) = block.as_chunks_mut::<{ size_of::<$register>() }>();
            for (part, sum) in parts.iter_mut().zip(sums) {
                // SAFETY: as above.
                unsafe { $store(part.as_mut_ptr().cast(), sum) };
            }
        }
    };
}

folding!(
    by_128,
    "sse2,pclmulqdq",
    __m128i,
    |one: __m128i| one,
    _mm_loadu_si128,
    _mm_storeu_si128,
    _mm_clmulepi64_si128,
    _mm_xor_si128
);
folding!(
    by_256,
    "avx2,pclmulqdq,vpclmulqdq",
    __m256i,
    _mm256_broadcastsi128_si256,
    _mm256_loadu_si256,
    _mm256_storeu_si256,
    _mm256_clmulepi64_epi128,
    _mm256_xor_si256
);
folding!(
    by_512,
    "avx512f,pclmulqdq,vpclmulqdq",
    __m512i,
    _mm512_broadcast_i32x4,
    _mm512_loadu_si512,
    _mm512_storeu_si512,
    _mm512_clmulepi64_epi128,
    _mm512_xor_si512
);

#[cfg(test)]
mod tests {
    use super::*;

    /// Which one ran does not show.
    #[test]
    fn every_width_gives_the_same_block() {
        let value = |at: usize| (at * 167 % 251) as u8;
        let message: Vec<u8> = (0..BLOCK_BYTES * 9).map(value).collect();
        let (blocks, _) = message.as_chunks::<BLOCK_BYTES>();
        let (first, following) = blocks.split_first().unwrap();
        let mut made = Vec::new();
        if is_x86_feature_detected!("pclmulqdq") {
            let mut block = *first;
            // SAFETY: the processor multiplies polynomials.
            unsafe { by_128(&mut block, following) };
            made.push(block);
        }
        if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("vpclmulqdq") {
            let mut block = *first;
            // SAFETY: the processor has AVX2 and multiplies in it.
            unsafe { by_256(&mut block, following) };
            made.push(block);
        }
        if is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("vpclmulqdq") {
            let mut block = *first;
            // SAFETY: the processor has AVX-512 and multiplies in it.
            unsafe { by_512(&mut block, following) };
            made.push(block);
        }
        let remainder = |block: &Block| crc32c::crc32c_append(!0, block);
        for block in &made {
            assert_eq!(remainder(block), crc32c::crc32c_append(!0, &message));
            assert_eq!(block, &made[0]);
        }
    }
}
