//! How well an order is shuffled, as two numbers.

use std::fmt;

use super::options::{Order, Tail};
use super::sampler::Sampler;
use crate::cast::to_u64;
use crate::error::Result;

/// Pairs of neighbours that are looked at.
const PAIRS: u64 = 1 << 16;
const BINS: usize = 1024;

/// How far an order is from a full shuffle, seen at places next to each other: 1 is as good as one,
/// 0 is no shuffle.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Quality {
    /// The mean distance in the data of two samples that follow each other, divided by that of a
    /// full shuffle.
    pub distance: f64,
    /// The entropy of these distances, divided by that of a full shuffle: low if few distances
    /// occur.
    pub entropy: f64,
}

impl fmt::Display for Quality {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "distance {:.2}, entropy {:.2} of a full shuffle", self.distance, self.entropy)
    }
}

impl Order {
    /// The quality of this order for so many samples, from 65 536 places.
    ///
    /// # Errors
    /// [`Error::TooFewSamples`](crate::Error::TooFewSamples) for no samples, and
    /// [`Error::InvalidOption`](crate::Error::InvalidOption) for empty blocks.
    #[expect(clippy::cast_precision_loss, reason = "a measure")]
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "bins are few")]
    pub fn quality(self, sample_count: u64, seed: u64) -> Result<Quality> {
        let sampler = Sampler::new(sample_count, 1, seed, self, Tail::Wrap)?;
        let mut cursor = sampler.cursor();
        let pairs = PAIRS.min(sample_count.saturating_sub(1)).max(1);
        let (mut sum, mut bins) = (0.0, [0_u64; BINS]);
        for pair in 0..pairs {
            // Evenly over the epoch.
            let place = (u128::from(pair) * u128::from(sample_count) / u128::from(pairs)) as u64;
            let (one, other) =
                (cursor.at(0, place).id, cursor.at(0, (place + 1) % sample_count).id);
            let distance = one.abs_diff(other) as f64 / sample_count as f64;
            sum += distance;
            bins[((distance * BINS as f64) as usize).min(BINS - 1)] += 1;
        }
        let shares = bins.iter().map(|&count| count as f64 / pairs as f64);
        // The distance of two random points of 0..1 has the density 2 (1 − x).
        let side = 1.0 / to_u64(BINS) as f64;
        let ideal = (0..BINS).map(|bin| side * 2.0 * (1.0 - (bin as f64 + 0.5) * side));
        let mean = sum / pairs as f64;
        Ok(Quality { distance: mean * 3.0, entropy: entropy(shares) / entropy(ideal) })
    }
}

fn entropy(shares: impl Iterator<Item = f64>) -> f64 {
    0.0 - shares.filter(|&share| share > 0.0).map(|share| share * share.ln()).sum::<f64>()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn full_blocked_and_no_shuffle_are_told_apart() {
        let quality = |order: Order| order.quality(1_000_000, 3).unwrap();
        let full = quality(Order::Shuffled);
        assert!((full.distance - 1.0).abs() < 0.02 && (full.entropy - 1.0).abs() < 0.02, "{full}");
        let none = quality(Order::Sequential);
        assert!(none.distance < 0.001 && none.entropy < 0.001, "{none}");
        let good = quality(Order::Blocks { block: 1000, window: 50 });
        let bad = quality(Order::Blocks { block: 1000, window: 2 });
        assert!(good.distance > 0.9 && good.entropy > 0.9, "{good}");
        assert!(bad.distance < 0.8 && bad.entropy < 0.9, "{bad}");
    }
}
