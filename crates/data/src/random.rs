//! Random numbers that depend on nothing but what they are drawn for.
//!
//! `SplitMix64`: a counter with a strong finaliser. Frozen: sample order and masks are made of it,
//! and a resumed run must see the same ones, so no library whose output may change between releases
//! is used here.
//! Source: Steele, Lea, Flood, "Fast splittable pseudorandom number generators" (2014); finaliser
//! of Stafford, variant 13.

/// The golden ratio in 64 bits: the counter's step.
const STEP: u64 = 0x9E37_79B9_7F4A_7C15;

/// The finaliser: a bijection of 64 bits in which every input bit reaches every output bit.
pub(crate) const fn mix(value: u64) -> u64 {
    let value = (value ^ (value >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    let value = (value ^ (value >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    value ^ (value >> 31)
}

/// A stream of random words.
#[derive(Clone, Debug)]
pub(crate) struct RandomStream(u64);

impl RandomStream {
    /// The stream that belongs to `purpose` and `key`; streams of other keys or purposes are
    /// unrelated to it.
    pub(crate) fn keyed(purpose: u64, key: &[u64]) -> Self {
        let start = mix(purpose.wrapping_add(STEP));
        RandomStream(key.iter().fold(start, |state, &part| {
            mix(state.wrapping_mul(STEP).wrapping_add(mix(part.wrapping_add(STEP))))
        }))
    }

    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(STEP);
        mix(self.0)
    }
}

/// A number below `bound` from 32 random bits (Lemire's multiplication; the bias is below bound /
/// 2^32).
pub(crate) const fn below(random: u32, bound: u32) -> u32 {
    high_half(random as u64 * bound as u64)
}

/// The upper 32 bits of a word.
pub(crate) const fn high_half(word: u64) -> u32 {
    (word >> 32) as u32
}
