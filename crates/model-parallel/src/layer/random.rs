//! Random numbers by position: what an element gets depends on a key and on its place in the whole tensor, never on who computes it.
//!
//! So a weight that is cut begins as it would on one rank, and dropout drops the same elements on every mesh. The numbers are those of
//! `SplitMix64` (Steele et al. 2014), whose output function is applied to key + (place + 1) · γ. Pure.

use std::f64::consts::TAU;

/// `SplitMix64`'s increment: the golden ratio in 64 bits.
const GAMMA: u64 = 0x9E37_79B9_7F4A_7C15;

/// `SplitMix64`'s output function: a bijection that mixes all bits.
#[must_use]
#[inline]
pub const fn mix(state: u64) -> u64 {
    let state = (state ^ (state >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    let state = (state ^ (state >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    state ^ (state >> 31)
}

/// What numbers are drawn from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Key(u64);

impl Key {
    /// The key of a seed.
    #[must_use]
    pub const fn of_seed(seed: u64) -> Self {
        Self(mix(seed ^ GAMMA))
    }

    /// The key of a part of what this one is for: a layer by its name.
    #[must_use]
    pub fn named(self, name: &str) -> Self {
        // No byte is the end: parts "a" and "b" of a thing are not its part "ab".
        let letters = name.bytes().map(u64::from).chain([1 << 8]);
        Self(letters.fold(self.0, |key, letter| mix(key ^ letter).wrapping_add(GAMMA)))
    }

    /// The key of a part of what this one is for: a step, a micro-batch, by its number.
    #[must_use]
    pub const fn numbered(self, number: u64) -> Self {
        Self(mix(self.0.wrapping_add(mix(number.wrapping_add(GAMMA)))))
    }

    /// 64 random bits for the element at `place`.
    #[must_use]
    #[inline]
    pub(crate) const fn bits(self, place: u64) -> u64 {
        mix(self.0.wrapping_add(place.wrapping_add(1).wrapping_mul(GAMMA)))
    }

    /// A number in [0, 1), a multiple of 2⁻⁵³.
    #[must_use]
    #[inline]
    #[expect(clippy::cast_precision_loss, reason = "53 bits fit")]
    pub fn uniform(self, place: u64) -> f64 {
        (self.bits(place) >> 11) as f64 / (1_u64 << 53) as f64
    }

    /// A number of the standard normal distribution (Box and Muller 1958).
    #[must_use]
    pub fn normal(self, place: u64) -> f64 {
        let radius = (-2.0 * (1.0 - self.uniform(2 * place)).ln()).sqrt();
        radius * (TAU * self.uniform(2 * place + 1)).cos()
    }

    /// The key as a number, for kernels of elsewhere.
    #[must_use]
    pub(crate) const fn value(self) -> u64 {
        self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn splitmix_is_that_of_its_authors() {
        // The first outputs for seed 1234567, as published with the reference implementation.
        let first: Vec<u64> = (0..3).map(|place| Key(1_234_567).bits(place)).collect();
        assert_eq!(
            first,
            [6_457_827_717_110_365_317, 3_203_168_211_198_807_973, 9_817_491_932_198_370_423]
        );
    }

    #[test]
    fn numbers_have_the_moments_of_their_distribution() {
        let key = Key::of_seed(7).named("layer").numbered(3);
        let count = 100_000_u32;
        let normals: Vec<f64> = (0..u64::from(count)).map(|place| key.normal(place)).collect();
        let moment =
            |power: i32| normals.iter().map(|x| x.powi(power)).sum::<f64>() / f64::from(count);
        // Five standard errors of each moment.
        let error = 5.0 / f64::from(count).sqrt();
        assert!(moment(1).abs() < error && (moment(2) - 1.0).abs() < error * 2_f64.sqrt());
        let uniform =
            (0..u64::from(count)).map(|place| key.uniform(place)).sum::<f64>() / f64::from(count);
        assert!((uniform - 0.5).abs() < error / 12_f64.sqrt());
    }

    #[test]
    fn keys_of_different_names_and_numbers_differ() {
        let root = Key::of_seed(1);
        let keys = [
            root,
            root.named("a"),
            root.named("b"),
            root.named("ab"),
            root.numbered(0),
            root.numbered(1),
        ];
        for (at, key) in keys.iter().enumerate() {
            assert!(!keys[..at].contains(key), "{at}");
        }
    }
}
