//! Mixing parts by weight: from which part the sample at a place comes, as a function of the place.
//!
//! Weights with a small common period become shares of its slots, given away by earliest deadline:
//! a part's n-th slot must lie between n · period / share and (n + 1) · period / share. So in every
//! prefix of the order a part has its share of samples, to less than one sample. Source: Baruah,
//! Cohen, Plaxton, Varvel, "Proportionate progress: a notion of fairness in resource allocation"
//! (1996), for one resource. All other weights are split by [`WeightTree`], without a period.
//! Frozen as [`VERSION`].

use super::weight_tree::WeightTree;
use crate::cast::{to_u64, to_usize};
use crate::error::{Error, Result};
use crate::random::RandomStream;

/// Version of the order of a mixture. It is part of a mixture's fingerprint.
pub(crate) const VERSION: u32 = 2;

/// The longest period that is written down.
const PERIOD_MAX: u32 = 65_536;

const PURPOSE: u64 = 0x7061_7274_0000_0001; // "part", version 1

/// A part of a mixture: how many samples it has, and its share.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct MixtureComponent {
    /// How many samples.
    pub samples: u64,
    /// Its share of all samples that are delivered, relative to the other parts' weights.
    pub weight: f64,
}

/// Which part has which place.
#[derive(Debug)]
pub(crate) struct Mixing {
    parts: Vec<MixedPart>,
    draws: Draws,
}

#[derive(Debug)]
enum Draws {
    Period(Vec<PeriodSlot>),
    Endless(WeightTree),
}

#[derive(Debug)]
pub(crate) struct MixedPart {
    pub(crate) first: u64,
    pub(crate) samples: u64,
}

#[derive(Debug)]
struct PeriodSlot {
    part: u32,
    /// Slots of the part in a period.
    share: u32,
    /// How many slots of the period the part has before this one.
    rank: u32,
}

/// What is drawn at a place.
#[derive(Debug)]
pub(crate) struct Drawn {
    pub(crate) part: usize,
    /// The number of the part's first sample in the mixture, and how many it has.
    pub(crate) first: u64,
    pub(crate) samples: u64,
    /// How often the whole part was drawn before, and the place in this round.
    pub(crate) round: u64,
    pub(crate) place: u64,
}

impl Mixing {
    pub(crate) fn new(parts: &[MixtureComponent]) -> Result<Self> {
        check(parts)?;
        let weights: Vec<f64> = parts.iter().map(|part| part.weight).collect();
        let draws = match period(&weights) {
            Some(shares) => Draws::Period(slots(&shares)),
            None => Draws::Endless(WeightTree::new(&weights).map_err(|part| {
                let reason = "it is below 2^-62 of the sum of all weights: leave the part out";
                Error::option("weight", parts[part].weight, reason)
            })?),
        };
        let mut mixed = Vec::with_capacity(parts.len());
        let mut first = 0;
        for part in parts {
            mixed.push(MixedPart { first, samples: part.samples });
            first += part.samples;
        }
        Ok(Mixing { parts: mixed, draws })
    }

    pub(crate) fn parts(&self) -> &[MixedPart] {
        &self.parts
    }

    /// What is drawn at place `place` of the endless order.
    pub(crate) fn at(&self, place: u128) -> Drawn {
        let narrow = |value: u128| u64::try_from(value).unwrap_or(u64::MAX);
        let (number, drawn) = match &self.draws {
            Draws::Period(slots) => {
                let period = slots.len() as u128;
                let slot = &slots[to_usize(narrow(place % period))];
                let of_periods = u128::from(narrow(place / period)) * u128::from(slot.share);
                (slot.part as usize, of_periods + u128::from(slot.rank))
            }
            Draws::Endless(shares) => {
                let (part, before) = shares.at(narrow(place));
                (part, u128::from(before))
            }
        };
        let part = &self.parts[number];
        let samples = u128::from(part.samples);
        Drawn {
            part: number,
            first: part.first,
            samples: part.samples,
            round: narrow(drawn / samples),
            place: narrow(drawn % samples),
        }
    }

    /// Where each part stands at a place of the endless order: how often it was drawn whole, and
    /// its place in this round. `counts` has a number for each part. Cost: the period, or so many
    /// steps as there are parts.
    pub(crate) fn before(
        &self,
        place: u128,
        counts: &mut [u64],
        mut each: impl FnMut(usize, u64, u64),
    ) {
        let narrow = |value: u128| u64::try_from(value).unwrap_or(u64::MAX);
        match &self.draws {
            Draws::Period(slots) => {
                let period = slots.len() as u128;
                let (periods, rest) = (narrow(place / period), to_usize(narrow(place % period)));
                counts.fill(0);
                for (number, slot) in slots.iter().enumerate() {
                    let drawn = periods.saturating_add(u64::from(number < rest));
                    let count = &mut counts[slot.part as usize];
                    *count = count.saturating_add(drawn);
                }
            }
            Draws::Endless(shares) => shares.before(narrow(place), counts),
        }
        for (number, (part, &count)) in self.parts.iter().zip(&*counts).enumerate() {
            each(number, count / part.samples, count % part.samples);
        }
    }

    /// Each part is shuffled for itself.
    pub(crate) fn seed_of(seed: u64, part: usize) -> u64 {
        RandomStream::keyed(PURPOSE, &[seed, to_u64(part)]).next()
    }
}

fn check(parts: &[MixtureComponent]) -> Result<()> {
    if parts.len() > 1024 {
        return Err(Error::option("parts", parts.len(), "a mixture has at most 1024 parts"));
    }
    for part in parts {
        if !(part.weight > 0.0 && part.weight.is_finite()) {
            return Err(Error::option("weight", part.weight, "weights are positive numbers"));
        }
        if part.samples == 0 {
            return Err(Error::option("parts", 0, "a part without samples cannot be drawn from"));
        }
    }
    let sum: f64 = parts.iter().map(|part| part.weight).sum();
    if !sum.is_finite() {
        return Err(Error::option(
            "weight",
            sum,
            "the sum of all weights is no number: divide them",
        ));
    }
    Ok(())
}

/// Weights as slots of the smallest common period, if there is a small one. As 0.7 and 0.1 are no
/// binary fractions, a share may be off by a billionth of a slot.
#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "shares lie between 0 and 65 536"
)]
fn period(weights: &[f64]) -> Option<Vec<u32>> {
    let sum: f64 = weights.iter().sum();
    let ideal = |period: u32| weights.iter().map(move |weight| weight / sum * f64::from(period));
    let is_exact = |period: &u32| {
        ideal(*period).all(|share| share > 0.5 && (share - share.round()).abs() < 1e-9)
    };
    let period = (1..=PERIOD_MAX).find(is_exact)?;
    Some(ideal(period).map(|share| share.round() as u32).collect())
}

/// Gives the slots of a period away.
fn slots(shares: &[u32]) -> Vec<PeriodSlot> {
    let period: u32 = shares.iter().sum();
    let mut next = vec![0_u32; shares.len()];
    let mut slots = Vec::with_capacity(period as usize);
    for slot in 0..u64::from(period) {
        let due = |(part, (&share, &rank)): (usize, (&u32, &u32))| {
            let (share, rank) = (u64::from(share), u64::from(rank));
            let released = rank * u64::from(period) / share <= slot && rank < share;
            let deadline = ((rank + 1) * u64::from(period)).div_ceil(share);
            released.then_some((deadline, part))
        };
        let chosen = shares.iter().zip(&next).enumerate().filter_map(due).min();
        // Shares sum up to the period, so somebody is always due.
        let part = chosen.map_or(0, |(_, part)| part);
        let (number, share) = (u32::try_from(part).unwrap_or(0), shares[part]);
        slots.push(PeriodSlot { part: number, share, rank: next[part] });
        next[part] += 1;
    }
    slots
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mixing(weights: &[f64]) -> Mixing {
        let parts: Vec<MixtureComponent> =
            weights.iter().map(|&weight| MixtureComponent { samples: 10, weight }).collect();
        Mixing::new(&parts).unwrap()
    }

    #[test]
    fn at_every_place_each_part_has_its_share_to_less_than_one() {
        let cases: [(&[f64], Option<usize>); 8] = [
            (&[1.0, 1.0], Some(2)),
            (&[0.7, 0.2, 0.1], Some(10)),
            (&[3.0, 1.0, 1.0, 2.0], Some(7)),
            (&[1.0, 1000.0], Some(1001)),
            (&[0.35, 0.25, 0.2, 0.1, 0.06, 0.04], Some(100)),
            (&[5.0, 5.0, 5.0, 5.0, 5.0, 5.0, 5.0], Some(7)),
            (&[std::f64::consts::PI, std::f64::consts::E, 1.0], None),
            (&[1e-9, 1.0], None),
        ];
        for (weights, period) in cases {
            let mixing = mixing(weights);
            let sum: f64 = weights.iter().sum();
            let slots = match &mixing.draws {
                Draws::Period(slots) => Some(slots.len()),
                Draws::Endless(_) => None,
            };
            assert_eq!(slots, period, "{weights:?}");
            let mut drawn = vec![0.0; weights.len()];
            for place in 0..140_000_u32 {
                drawn[mixing.at(place.into()).part] += 1.0;
                for (count, weight) in drawn.iter().zip(weights) {
                    // The weights that were given, not what has become of them.
                    let ideal = f64::from(place + 1) * weight / sum;
                    let off: f64 = count - ideal;
                    // Less than one, by more than the three roundings of the ideal: 140 000 × 3 ×
                    // 2^-53.
                    assert!(off.abs() < 1.0 - 1e-9, "{weights:?} at {place}: {off}");
                }
            }
        }
    }

    #[test]
    fn the_order_is_frozen() {
        let frozen = |weights: &[f64], start: u128| -> Vec<usize> {
            let mixing = mixing(weights);
            (start..start + 16).map(|place| mixing.at(place).part).collect()
        };
        let irrational = [std::f64::consts::PI, std::f64::consts::E, 1.0, 0.1, 0.7];
        let all = [
            frozen(&[0.7, 0.2, 0.1], 0),
            frozen(&[3.0, 1.0, 1.0, 2.0], 5),
            frozen(&irrational, 0),
            frozen(&irrational, 1 << 40),
        ];
        let mixing = mixing(&irrational);
        let drawn = (1_000_000..1_000_004).map(|place| mixing.at(place));
        let drawn: Vec<(u64, u64)> = drawn.map(|drawn| (drawn.round, drawn.place)).collect();
        let seeds = [Mixing::seed_of(7, 0), Mixing::seed_of(7, 1)];
        assert_eq!(
            (all, drawn, seeds),
            (FROZEN.map(Vec::from), FROZEN_DRAWN.to_vec(), FROZEN_SEEDS),
            "version {VERSION} of the order changed: make a new version"
        );
    }

    const FROZEN: [[usize; 16]; 4] = [
        [0, 0, 0, 1, 0, 0, 1, 0, 0, 2, 0, 0, 0, 1, 0, 0],
        [2, 3, 0, 3, 0, 1, 0, 2, 3, 0, 3, 0, 1, 0, 2, 3],
        [1, 0, 2, 0, 1, 4, 0, 1, 0, 1, 0, 2, 1, 0, 4, 0],
        [2, 0, 1, 0, 4, 1, 0, 1, 0, 2, 1, 0, 4, 0, 1, 0],
    ];
    const FROZEN_DRAWN: [(u64, u64); 4] = [(41013, 6), (35487, 3), (41013, 7), (9138, 5)];
    const FROZEN_SEEDS: [u64; 2] = [3_267_845_355_159_802_488, 14_080_132_603_893_527_558];

    #[test]
    fn a_part_is_drawn_in_rounds_of_all_its_samples() {
        let parts = [
            MixtureComponent { samples: 3, weight: 2.0 },
            MixtureComponent { samples: 100, weight: 1.0 },
        ];
        let mixing = Mixing::new(&parts).unwrap();
        let mut of_first = Vec::new();
        for place in 0..18 {
            let drawn = mixing.at(place);
            if drawn.part == 0 {
                of_first.push((drawn.round, drawn.place));
            } else {
                assert_eq!(drawn.first, 3);
            }
        }
        let expected: Vec<(u64, u64)> = (0..12).map(|n| (n / 3, n % 3)).collect();
        assert_eq!(of_first, expected);
    }

    #[test]
    fn where_each_part_stands_is_what_was_drawn_before() {
        let irrational = [std::f64::consts::PI, std::f64::consts::E, 1.0, 0.1, 0.7];
        let cases: [&[f64]; 3] = [&[0.7, 0.2, 0.1], &[3.0, 1.0, 1.0, 2.0], &irrational];
        for weights in cases {
            let (mixing, mut counts) = (mixing(weights), vec![0; weights.len()]);
            for start in [0_u128, 5, 12_345, 1 << 40] {
                let mut stands = vec![(0, 0); weights.len()];
                mixing.before(start, &mut counts, |part, round, place| {
                    stands[part] = (round, place);
                });
                for place in start..start + 100 {
                    let drawn = mixing.at(place);
                    let (round, own) = &mut stands[drawn.part];
                    assert_eq!((drawn.round, drawn.place), (*round, *own), "{weights:?} {place}");
                    (*round, *own) = if *own == 9 { (*round + 1, 0) } else { (*round, *own + 1) };
                }
            }
        }
    }

    #[test]
    fn weights_that_cannot_be_are_refused() {
        for weight in [0.0, -1.0, f64::NAN, f64::INFINITY] {
            let parts = [
                MixtureComponent { samples: 3, weight },
                MixtureComponent { samples: 3, weight: 1.0 },
            ];
            assert!(Mixing::new(&parts).is_err(), "{weight}");
        }
        let says = |weights: &[f64], expected: &str| {
            let parts: Vec<MixtureComponent> =
                weights.iter().map(|&weight| MixtureComponent { samples: 3, weight }).collect();
            let error = Mixing::new(&parts).unwrap_err().to_string();
            assert!(error.contains(expected), "{error}");
        };
        says(&[1e-30, 1.0], "2^-62 of the sum");
        says(&[f64::MAX; 3], "divide them");
    }
}
