//! Mixing parts by weight: from which part the sample at a place comes, as a function of the place.
//!
//! Weights become shares of a period of slots. Slots are given away by earliest deadline: a part's n-th slot must lie
//! between n · period / share and (n + 1) · period / share. So in every prefix of the order a part has its share of samples,
//! to less than one sample. Source: Baruah, Cohen, Plaxton, Varvel, "Proportionate progress: a notion of fairness in
//! resource allocation" (1996), for one resource.

use crate::cast::{to_u64, to_usize};
use crate::error::{Error, Result};
use crate::random::Stream;
use crate::samples::Part;

/// Weights that are fractions with a denominator up to this are kept as they are.
const EXACT_MAX: u32 = 4096;
/// The period for other weights: they are rounded to 1/65 536.
const PERIOD: u32 = 65_536;

const PURPOSE: u64 = 0x7061_7274_0000_0001; // "part", version 1

/// Which part has which slot.
#[derive(Debug)]
pub(crate) struct Mixing {
    parts: Vec<MixedPart>,
    slots: Vec<Slot>,
}

#[derive(Debug)]
pub(crate) struct MixedPart {
    first: u64,
    samples: u64,
    /// Slots of a period.
    share: u32,
}

#[derive(Debug)]
struct Slot {
    part: u32,
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
    pub(crate) fn new(parts: &[Part]) -> Result<Self> {
        let shares = shares(parts)?;
        let mut mixed = Vec::with_capacity(parts.len());
        let mut first = 0;
        for (part, share) in parts.iter().zip(&shares) {
            mixed.push(MixedPart { first, samples: part.samples, share: *share });
            first += part.samples;
        }
        Ok(Mixing { parts: mixed, slots: slots(&shares) })
    }

    pub(crate) fn parts(&self) -> &[MixedPart] {
        &self.parts
    }

    /// What is drawn at place `place` of the endless order.
    pub(crate) fn at(&self, place: u128) -> Drawn {
        let period = self.slots.len() as u128;
        let narrow = |value: u128| u64::try_from(value).unwrap_or(u64::MAX);
        let (periods, slot) =
            (narrow(place / period), &self.slots[to_usize(narrow(place % period))]);
        let number = slot.part as usize;
        let part = &self.parts[number];
        let drawn = u128::from(periods) * u128::from(part.share) + u128::from(slot.rank);
        let samples = u128::from(part.samples);
        Drawn {
            part: number,
            first: part.first,
            samples: part.samples,
            round: narrow(drawn / samples),
            place: narrow(drawn % samples),
        }
    }

    /// Each part is shuffled for itself.
    pub(crate) fn seed_of(seed: u64, part: usize) -> u64 {
        Stream::keyed(PURPOSE, &[seed, to_u64(part)]).next()
    }
}

/// Weights as slots of a common period.
#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "shares lie between 0 and 65 536"
)]
fn shares(parts: &[Part]) -> Result<Vec<u32>> {
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
    let ideal = |period: u32| parts.iter().map(move |part| part.weight / sum * f64::from(period));
    let is_exact = |period: &u32| {
        ideal(*period).all(|share| share > 0.5 && (share - share.round()).abs() < 1e-6)
    };
    if let Some(period) = (1..=EXACT_MAX).find(is_exact) {
        return Ok(ideal(period).map(|share| share.round() as u32).collect());
    }
    // Largest remainders; every part has at least one slot.
    let ideal: Vec<f64> = ideal(PERIOD).collect();
    let mut shares: Vec<u32> = ideal.iter().map(|share| (share.floor() as u32).max(1)).collect();
    let mut by_remainder: Vec<usize> = (0..shares.len()).collect();
    by_remainder.sort_by(|&a, &b| ideal[b].fract().total_cmp(&ideal[a].fract()).then(a.cmp(&b)));
    let given: u32 = shares.iter().sum();
    for &part in by_remainder.iter().take(PERIOD.saturating_sub(given) as usize) {
        shares[part] += 1;
    }
    Ok(shares)
}

/// Gives the slots of a period away.
fn slots(shares: &[u32]) -> Vec<Slot> {
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
        slots.push(Slot { part: u32::try_from(part).unwrap_or(0), rank: next[part] });
        next[part] += 1;
    }
    slots
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mixing(weights: &[f64]) -> Mixing {
        let parts: Vec<Part> = weights.iter().map(|&weight| Part { samples: 10, weight }).collect();
        Mixing::new(&parts).unwrap()
    }

    #[test]
    fn at_every_place_each_part_has_its_share_to_less_than_one() {
        let cases: [&[f64]; 7] = [
            &[1.0, 1.0],
            &[0.7, 0.2, 0.1],
            &[3.0, 1.0, 1.0, 2.0],
            &[1.0, 1000.0],
            &[std::f64::consts::PI, std::f64::consts::E, 1.0],
            &[1e-9, 1.0],
            &[5.0, 5.0, 5.0, 5.0, 5.0, 5.0, 5.0],
        ];
        for weights in cases {
            let mixing = mixing(weights);
            let period = mixing.slots.len() as u64;
            let mut drawn = vec![0_u64; weights.len()];
            for place in 0..(2 * period).min(140_000) {
                drawn[mixing.at(place.into()).part] += 1;
                for (part, &count) in mixing.parts.iter().zip(&drawn) {
                    let ideal = (place + 1) * u64::from(part.share);
                    assert!((count * period).abs_diff(ideal) < period, "{weights:?} at {place}");
                }
            }
        }
        assert_eq!(mixing(&[0.7, 0.2, 0.1]).slots.len(), 10, "fractions are kept as they are");
    }

    #[test]
    fn a_part_is_drawn_in_rounds_of_all_its_samples() {
        let parts = [Part { samples: 3, weight: 2.0 }, Part { samples: 100, weight: 1.0 }];
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
    fn weights_that_cannot_be_are_refused() {
        for weight in [0.0, -1.0, f64::NAN, f64::INFINITY] {
            let parts = [Part { samples: 3, weight }, Part { samples: 3, weight: 1.0 }];
            assert!(Mixing::new(&parts).is_err(), "{weight}");
        }
    }
}
