//! A sum of numbers ≥ 0 that does not depend on their order: exact until it is read.
//!
//! The numbers are added as integers to an accumulator that is as wide as f64's whole range. Integer addition is
//! associative, so the accumulators of several ranks, added word by word, are the accumulator of all numbers.
//! About ten instructions a number.
//!
//! Source: Kulisch 2013, "Computer Arithmetic and Validity", the long accumulator.

/// Bits of a word that hold a digit; the others leave room for carries of 2^31 additions.
const DIGIT_BITS: usize = 32;
const DIGIT: i64 = (1 << DIGIT_BITS) - 1;

/// Digits: 2^-1074 to 2^1024, and what 2^64 such numbers carry over.
const DIGITS: usize = 68;

/// The exponent of the lowest bit.
const LOWEST: i32 = -1074;

/// Where infinities and NaNs are counted.
const INFINITE: usize = DIGITS;
const NOT_A_NUMBER: usize = DIGITS + 1;

/// Words of an accumulator.
pub(crate) const WORDS: usize = DIGITS + 2;

/// Additions after which digits are carried over.
const CARRY_AFTER: u32 = 1 << 30;

/// An exact sum.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct ExactSum {
    words: [i64; WORDS],
    additions: u32,
}

impl Default for ExactSum {
    fn default() -> Self {
        Self { words: [0; WORDS], additions: 0 }
    }
}

impl ExactSum {
    /// Adds a number ≥ 0, infinite or not a number.
    #[expect(clippy::cast_possible_truncation, reason = "digits of a number that was cut for it")]
    pub(crate) fn add(&mut self, value: f64) {
        let bits = value.to_bits();
        let exponent = (bits >> 52) as usize & 0x7ff;
        let fraction = bits & ((1 << 52) - 1);
        if exponent == 0x7ff {
            self.words[if fraction == 0 { INFINITE } else { NOT_A_NUMBER }] += 1;
            return;
        }
        // Subnormal numbers have the exponent of the smallest normal ones, without the hidden bit.
        let (mantissa, place) = match exponent {
            0 => (fraction, 0),
            _ => (fraction | 1 << 52, exponent - 1),
        };
        let digits = u128::from(mantissa) << (place % DIGIT_BITS);
        let first = place / DIGIT_BITS;
        self.words[first] += digits as i64 & DIGIT;
        self.words[first + 1] += (digits >> DIGIT_BITS) as i64 & DIGIT;
        self.words[first + 2] += (digits >> (2 * DIGIT_BITS)) as i64;
        self.additions += 1;
        if self.additions >= CARRY_AFTER {
            self.carry();
        }
    }

    /// Takes the digits' carries to the next digits.
    fn carry(&mut self) {
        let mut carry = 0;
        for word in &mut self.words[..DIGITS] {
            let sum = *word + carry;
            *word = sum & DIGIT;
            carry = sum >> DIGIT_BITS;
        }
        self.additions = 0;
    }

    /// Adds another sum.
    pub(crate) fn take_in(&mut self, other: &Self) {
        self.carry();
        let mut other = other.clone();
        other.carry();
        self.words.iter_mut().zip(other.words).for_each(|(word, more)| *word += more);
        self.carry();
    }

    /// The words of the accumulator: those of several may be added, 2^30 of them.
    pub(crate) fn into_words(mut self) -> [i64; WORDS] {
        self.carry();
        self.words
    }

    /// The accumulator that has these words, or none where there are not [`WORDS`].
    pub(crate) fn of_words(words: &[i64]) -> Option<Self> {
        let mut sum = Self { words: words.try_into().ok()?, additions: 0 };
        sum.carry();
        Some(sum)
    }

    /// The sum, rounded to the nearest f64: NaN with a NaN in it, infinite where it or a number is too large.
    #[expect(clippy::cast_sign_loss, reason = "digits are ≥ 0")]
    #[expect(clippy::cast_precision_loss, reason = "the rounding that is meant")]
    pub(crate) fn value(&self) -> f64 {
        let mut carried = self.clone();
        carried.carry();
        let words = &carried.words;
        if words[NOT_A_NUMBER] > 0 {
            return f64::NAN;
        }
        if words[INFINITE] > 0 {
            return f64::INFINITY;
        }
        let Some(top) = (0..DIGITS).rev().find(|&at| words[at] != 0) else { return 0.0 };
        // Three digits are more than 64 bits; what is below only decides whether a tie is one.
        let bottom = top.saturating_sub(2);
        let digits = words[bottom..=top].iter().rev();
        let mut value = digits.fold(0_u128, |value, &word| value << DIGIT_BITS | word as u128);
        value |= u128::from(words[..bottom].iter().any(|&word| word != 0));
        let exponent = i32::try_from(bottom * DIGIT_BITS).unwrap_or(i32::MAX) + LOWEST;
        // In two steps: 2^-1074 by itself is no normal number, and 2^1000 times a large one none at all.
        let half = exponent / 2;
        (value as f64) * 2_f64.powi(half) * 2_f64.powi(exponent - half)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sum(values: impl IntoIterator<Item = f64>) -> ExactSum {
        let mut sum = ExactSum::default();
        values.into_iter().for_each(|value| sum.add(value));
        sum
    }

    #[test]
    fn single_numbers_come_back_as_they_were() {
        for value in [0.0, 1.0, 0.1, 3e300, f64::MAX, 1e-300, f64::MIN_POSITIVE, 5e-324, 1e-310] {
            assert_eq!(sum([value]).value().to_bits(), value.to_bits(), "{value:e}");
        }
        assert!(sum([1.0, f64::NAN, f64::INFINITY]).value().is_nan());
        assert_eq!(sum([1.0, f64::INFINITY]).value().to_bits(), f64::INFINITY.to_bits());
        assert_eq!(sum([f64::MAX, f64::MAX]).value().to_bits(), f64::INFINITY.to_bits());
    }

    #[test]
    fn small_numbers_are_not_lost_beside_large_ones() {
        let tiny = 2_f64.powi(-60);
        let mut all = vec![1.0];
        all.extend([tiny; 1 << 10]);
        assert_eq!(sum(all).value().to_bits(), (1.0 + 2_f64.powi(-50)).to_bits());
        // Just above half a unit in the last place: up; exactly half: to even.
        let half = f64::EPSILON / 2.0;
        assert_eq!(sum([1.0, half]).value().to_bits(), 1_f64.to_bits());
        assert_eq!(sum([1.0, half, 1e-300]).value().to_bits(), (1.0 + f64::EPSILON).to_bits());
    }

    #[test]
    fn the_order_and_the_parts_do_not_matter() {
        let mut state = 7_u64;
        let mut draw = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            f64::from_bits(state >> 2 & 0x3fff_ffff_ffff_ffff)
        };
        let values: Vec<f64> = (0..1000).map(|_| draw()).collect();
        let forward = sum(values.iter().copied());
        let backward = sum(values.iter().rev().copied());
        assert_eq!(forward.clone().into_words(), backward.into_words());
        for parts in [2, 3, 7] {
            let mut words = [0_i64; WORDS];
            for part in values.chunks(1000_usize.div_ceil(parts)) {
                let of_part = sum(part.iter().copied()).into_words();
                words.iter_mut().zip(of_part).for_each(|(word, other)| *word += other);
            }
            let together = ExactSum::of_words(&words).unwrap();
            assert_eq!(together.value().to_bits(), forward.value().to_bits());
            let mut added = ExactSum::default();
            let of_parts = values.chunks(parts).map(|part| sum(part.iter().copied()));
            of_parts.for_each(|part| added.take_in(&part));
            assert_eq!(added, together);
        }
        assert_eq!(ExactSum::of_words(&[1, 2]), None);
    }
}
