//! The order of an epoch as a function: position → sample, a bijection that is never written down.
//!
//! A generalised Feistel network over pairs (left, right) of numbers below `side` = ⌈√n⌉: each
//! round replaces (left, right) by (right, left + F(right) mod side), which is invertible whatever
//! F is. The domain side² exceeds n by at most 2√n + 1, and positions that fall outside n walk on
//! along their cycle until they are inside, which keeps the bijection. Cost: 6 rounds, some 15 to
//! 25 ns an index, no memory, whatever n is.
//!
//! Frozen as [`VERSION`]: any change of an output is a new version, because saved positions refer
//! to it.
//! Source: Black and Rogaway, "Ciphers with arbitrary finite domains" (CT-RSA 2002), methods 2
//! (cycle-walking) and 3.

use crate::random::{below, high_half, RandomStream};

/// Version of the order. It is part of every saved loader state.
pub const VERSION: u32 = 1;

/// Luby and Rackoff need four rounds for pseudo-randomness; two more pay for the plain round
/// function.
const ROUNDS: usize = 6;

const PURPOSE: u64 = 0x6F72_6465_7200_0001; // "order", version 1

/// The largest domain: `side` must fit 32 bits.
const LEN_MAX: u64 = 1 << 62;

/// A permutation of `0..len`, chosen by seed and epoch.
#[derive(Clone, Debug)]
pub struct Permutation {
    len: u64,
    side: u32,
    keys: [u64; ROUNDS],
}

impl Permutation {
    /// The permutation of `0..len` that belongs to `seed` and `epoch`.
    ///
    /// # Panics
    /// If `len` exceeds 2^62.
    pub fn new(len: u64, seed: u64, epoch: u64) -> Self {
        assert!(len <= LEN_MAX, "a permutation of {len} samples: 2^62 is the limit");
        let root = len.isqrt();
        let side = if root * root < len { root + 1 } else { root };
        let mut stream = RandomStream::keyed(PURPOSE, &[seed, epoch, len]);
        let side = u32::try_from(side).expect("the root of at most 2^62 fits 32 bits");
        Permutation { len, side, keys: std::array::from_fn(|_| stream.next()) }
    }

    /// How many positions there are.
    pub(crate) fn len(&self) -> u64 {
        self.len
    }

    /// The sample at `position`.
    ///
    /// # Panics
    /// If `position` is not below `len`.
    pub fn at(&self, position: u64) -> u64 {
        assert!(position < self.len, "position {position} of {}", self.len);
        let mut value = self.permute(position);
        while value >= self.len {
            value = self.permute(value);
        }
        value
    }

    /// One pass of the network over the whole domain `0..side²`.
    fn permute(&self, value: u64) -> u64 {
        let side = u64::from(self.side);
        let (mut left, mut right) = (value / side, value % side);
        for key in self.keys {
            let sum = left + u64::from(below(round(right, key), self.side));
            (left, right) = (right, if sum >= side { sum - side } else { sum });
        }
        left * side + right
    }
}

fn round(right: u64, key: u64) -> u32 {
    let mixed = (right ^ key).wrapping_mul(0x9E37_79B9_7F4A_7C15);
    high_half((mixed ^ (mixed >> 29)).wrapping_mul(0xBF58_476D_1CE4_E5B9))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn is_bijection(len: u64, seed: u64, epoch: u64) -> bool {
        let order = Permutation::new(len, seed, epoch);
        let mut seen = vec![false; usize::try_from(len).unwrap()];
        for position in 0..len {
            let slot = &mut seen[usize::try_from(order.at(position)).unwrap()];
            if std::mem::replace(slot, true) {
                return false;
            }
        }
        true
    }

    #[test]
    fn every_length_up_to_700_is_permuted() {
        for len in 0..=700 {
            assert!(is_bijection(len, 7, len), "length {len}");
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(48))]
        #[test]
        fn any_length_seed_and_epoch_give_a_bijection(
            len in 1_u64..60_000, seed in any::<u64>(), epoch in any::<u64>()
        ) {
            prop_assert!(is_bijection(len, seed, epoch));
        }

        #[test]
        fn positions_of_huge_domains_stay_inside(
            len in 1_u64..=LEN_MAX, seed in any::<u64>(), part in 0.0..1.0_f64
        ) {
            #[expect(clippy::cast_precision_loss, clippy::cast_possible_truncation,
                     clippy::cast_sign_loss, reason = "any position will do")]
            let position = ((len as f64 * part) as u64).min(len - 1);
            prop_assert!(Permutation::new(len, seed, 0).at(position) < len);
        }
    }

    #[test]
    fn the_order_is_frozen() {
        let order = Permutation::new(1_000, 42, 3);
        let first: Vec<u64> = (0..8).map(|i| order.at(i)).collect();
        assert_eq!(first, FROZEN, "version {VERSION} of the order changed: make a new version");
    }

    const FROZEN: [u64; 8] = [903, 755, 158, 224, 807, 816, 274, 35];

    #[test]
    fn neighbours_land_far_apart_as_in_a_random_order() {
        let len = 100_000_u64;
        for epoch in 0..4 {
            let order = Permutation::new(len, 1, epoch);
            let sum: u64 = (1..len).map(|i| order.at(i).abs_diff(order.at(i - 1))).sum();
            #[expect(clippy::cast_precision_loss, reason = "a statistic")]
            let mean = sum as f64 / (len - 1) as f64 / len as f64;
            assert!((mean - 1.0 / 3.0).abs() < 0.005, "mean distance {mean}");
        }
    }

    #[test]
    fn epochs_and_seeds_give_unrelated_orders() {
        let len = 10_000;
        let fixed =
            |a: &Permutation, b: &Permutation| (0..len).filter(|&i| a.at(i) == b.at(i)).count();
        let first = Permutation::new(len, 5, 0);
        // One position in `len` agrees by chance: more than 10 of them has a probability of 1e-8.
        assert!(fixed(&first, &Permutation::new(len, 5, 1)) <= 10);
        assert!(fixed(&first, &Permutation::new(len, 6, 0)) <= 10);
    }

    #[test]
    fn few_samples_still_change_places_between_epochs() {
        for len in 2..10 {
            let mut orders: Vec<Vec<u64>> = (0..64)
                .map(|epoch| {
                    let order = Permutation::new(len, 1, epoch);
                    (0..len).map(|i| order.at(i)).collect()
                })
                .collect();
            orders.sort();
            orders.dedup();
            let all: usize = (1..=usize::try_from(len).unwrap()).product();
            assert!(orders.len() >= all.min(40) * 3 / 4, "{} orders of {len}", orders.len());
        }
    }
}
