//! One number for an order, to see at a glance that two runs or machines have the same.

use super::options::{Order, Tail};
use super::sampler::{Position, Sampler};
use crate::error::Result;
use crate::fingerprint::{Fingerprint, Fingerprinter};

impl Order {
    /// Samples that [`Order::hash`] looks at, at most.
    pub const HASHED_MAX: u64 = 1 << 20;

    /// A hash of the global order of so many samples: of the first 2^20 numbers that epoch 0
    /// delivers, or of all if there are fewer. It depends neither on ranks nor on threads or batch
    /// sizes, because the order does not.
    ///
    /// # Errors
    /// [`Error::TooFewSamples`](crate::Error::TooFewSamples) for no samples, and
    /// [`Error::InvalidOption`](crate::Error::InvalidOption) for empty blocks.
    pub fn hash(self, sample_count: u64, seed: u64) -> Result<Fingerprint> {
        let sampler = Sampler::new(sample_count, 1, seed, self, Tail::Wrap)?;
        let mut cursor = sampler.cursor();
        let mut sum = Fingerprinter::new("order 1").number(sample_count);
        for next_global_sample in 0..sample_count.min(Self::HASHED_MAX) {
            let place = Position { epoch: 0, next_global_sample };
            sum = sum.number(cursor.sample(place, 0).id);
        }
        Ok(sum.finish())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn orders_are_told_apart_and_stay_what_they_are() {
        let hash = |order: Order, count, seed| order.hash(count, seed).unwrap().to_string();
        let blocks = Order::Blocks { block: 100, window: 4 };
        let all = [
            hash(Order::Shuffled, 1000, 1),
            hash(Order::Shuffled, 1000, 2),
            hash(Order::Shuffled, 1001, 1),
            hash(Order::Sequential, 1000, 1),
            hash(blocks, 1000, 1),
        ];
        for (at, one) in all.iter().enumerate() {
            assert!(!all[..at].contains(one), "{all:?}");
        }
        // Frozen, as the order is: who compares two versions of this program must be able to.
        assert_eq!(all[0], "bd22d600743e0780");
    }
}
