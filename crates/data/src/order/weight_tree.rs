//! Which part of a mixture has which place, for any weights: a binary tree whose leaves are the
//! parts.
//!
//! Of the first m samples that a node draws, round(m · left / (left + right)) come from its left
//! side, in whole numbers: there is no period, no table, and no drift however long the order is.
//! Weights are kept to 1 in 2^61 of their sum. In every prefix of the order a part has its share to
//! less than one sample if there are up to four parts: a leaf at depth 2 is off by half a sample at
//! most, and by its share of the half by which the node above is off. With more parts it is less
//! than two samples: there the tree is Huffman's, in which a part is at most half as heavy as the
//! node two levels above it, so that errors from above at least halve every second level.
//! Source: for the tree, Huffman, "A method for the construction of minimum-redundancy codes"
//! (1952).

/// The sum of the weights in whole numbers, nearly.
const WHOLE: f64 = 2_305_843_009_213_693_952.0;

/// Up to so many parts the tree has depth 2 at most.
const FLAT_MAX: usize = 4;

/// A tree over the parts.
#[derive(Debug)]
pub(crate) enum WeightTree {
    Part(u32),
    Split { left: Box<WeightTree>, right: Box<WeightTree>, weights: [u64; 2] },
}

impl WeightTree {
    /// `None` for a weight too small to be kept, with its number.
    pub(crate) fn new(weights: &[f64]) -> Result<Self, usize> {
        let sum: f64 = weights.iter().sum();
        let mut nodes = Vec::with_capacity(weights.len());
        for (part, weight) in weights.iter().enumerate() {
            let whole = whole(weight / sum * WHOLE);
            if whole == 0 {
                return Err(part);
            }
            nodes.push((whole, WeightTree::Part(u32::try_from(part).unwrap_or(u32::MAX))));
        }
        // Heaviest first; a stable sort, so that equal ones keep their order.
        nodes.sort_by_key(|&(weight, _)| std::cmp::Reverse(weight));
        if nodes.len() == FLAT_MAX {
            let mut ends = nodes.into_iter();
            let mut next = || ends.next().unwrap_or((1, WeightTree::Part(0)));
            let [first, second, third, fourth] = [next(), next(), next(), next()];
            nodes = vec![joined(first, fourth), joined(second, third)];
        }
        while nodes.len() > 1 {
            // The two lightest become one, which goes behind all that are as heavy.
            let (Some(light), Some(heavy)) = (nodes.pop(), nodes.pop()) else { break };
            let node = joined(heavy, light);
            let at = nodes.partition_point(|&(weight, _)| weight >= node.0);
            nodes.insert(at, node);
        }
        Ok(nodes.pop().map_or(WeightTree::Part(0), |(_, tree)| tree))
    }

    /// The part that place `place` is drawn from, and how often it was drawn from before.
    pub(crate) fn at(&self, place: u64) -> (usize, u64) {
        let (mut node, mut place) = (self, place);
        loop {
            match node {
                WeightTree::Part(part) => return (*part as usize, place),
                WeightTree::Split { left, right, weights } => {
                    let before = of_left(place, *weights);
                    if of_left(place.saturating_add(1), *weights) > before {
                        (node, place) = (left, before);
                    } else {
                        (node, place) = (right, place - before);
                    }
                }
            }
        }
    }

    /// How often each part was drawn from before a place.
    pub(crate) fn before(&self, place: u64, counts: &mut [u64]) {
        match self {
            WeightTree::Part(part) => counts[*part as usize] = place,
            WeightTree::Split { left, right, weights } => {
                let of_left = of_left(place, *weights);
                left.before(of_left, counts);
                right.before(place - of_left, counts);
            }
        }
    }
}

fn joined(heavy: (u64, WeightTree), light: (u64, WeightTree)) -> (u64, WeightTree) {
    let weights = [heavy.0, light.0];
    let (left, right) = (Box::new(heavy.1), Box::new(light.1));
    (heavy.0 + light.0, WeightTree::Split { left, right, weights })
}

/// How many of the first `count` are the left side's: rounded, halves up.
fn of_left(count: u64, [left, right]: [u64; 2]) -> u64 {
    // Weights sum up to 2^61 and a little: nothing overflows.
    let (left, sum) = (u128::from(left), u128::from(left) + u128::from(right));
    u64::try_from((2 * u128::from(count) * left + sum) / (2 * sum)).unwrap_or(u64::MAX)
}

#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "a share between 0 and 2^61"
)]
fn whole(share: f64) -> u64 {
    share.round() as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The largest distance between what a part has and its share, in any of the first prefixes
    /// from `start` on.
    fn error_max(weights: &[f64], start: u64, len: u64) -> f64 {
        let shares = WeightTree::new(weights).unwrap();
        let sum: f64 = weights.iter().sum();
        let mut drawn: Vec<Option<u64>> = vec![None; weights.len()];
        let mut error = 0.0_f64;
        for place in start..start + len {
            let (part, before) = shares.at(place);
            assert!(drawn[part].is_none_or(|count| count == before), "none is left out");
            drawn[part] = Some(before + 1);
            for (count, weight) in drawn.iter().zip(weights) {
                let Some(count) = count else { continue };
                #[expect(clippy::cast_precision_loss, reason = "far below 2^53")]
                let off = *count as f64 - (place + 1) as f64 * weight / sum;
                error = error.max(off.abs());
            }
        }
        error
    }

    #[test]
    fn up_to_four_parts_have_their_shares_to_less_than_one() {
        let (pi, e) = (std::f64::consts::PI, std::f64::consts::E);
        let cases: [&[f64]; 7] = [
            &[pi, e],
            &[1e-9, 1.0],
            &[pi, e, 1.0],
            &[1.0, 1e-3 * pi, 1e-6 * e],
            &[pi, e, 1.0, 0.1],
            &[1.0, pi * 1e-2, e * 1e-4, 1e-6],
            &[1.0, 1.0 + 1e-7, 1.0 + 2e-7, 1.0 + 3e-7],
        ];
        for weights in cases {
            for start in [0, 1 << 20, 3_000_000_001, 1 << 40] {
                let error = error_max(weights, start, 20_000);
                // The ideal has four roundings, in the sum, the product and the quotient: at 2^40
                // that is 2^-53 × 4 × 2^40.
                assert!(error < 1.0 + 1e-3, "{weights:?} from {start}: {error}");
            }
        }
    }

    #[test]
    fn many_parts_have_their_shares_to_less_than_two_however_long_the_order_is() {
        let weights: Vec<f64> = (1..40_u32).map(|n| f64::from(n).powf(1.7) + 0.123).collect();
        for start in [0, 1 << 20, 3_000_000_001, 1 << 40] {
            let error = error_max(&weights, start, 20_000);
            assert!(error < 2.0, "from {start}: {error}");
        }
    }

    #[test]
    fn the_lightest_part_comes_when_its_time_has_come() {
        let shares = WeightTree::new(&[1e-9, 1.0]).unwrap();
        let comes = (499_999_990..500_000_010).filter(|&place| shares.at(place).0 == 0).count();
        assert_eq!(comes, 1, "its first sample in the middle of its billion");
        assert_eq!(WeightTree::new(&[1e-30, 1.0]).unwrap_err(), 0);
    }
}
