//! The largest of many values, by magnitude. Pure.

/// Bits of a magnitude that the first pass counts by: exponent and 8 bits more.
const COUNTED_BITS: u32 = 16;
const SHIFT: u32 = 31 - COUNTED_BITS;

/// The places of the `count` values of largest magnitude, in ascending order; of equal ones the first. What is not finite is largest of all.
///
/// Two passes over the values: magnitudes are counted by their upper bits, which says in which class the smallest that is taken lies; then all above
/// that class are taken, and of the class itself, sorted, as many as are left. O(n + c log c) with c values in the class.
///
/// # Panics
/// If there are more than 2³² values: no bucket has.
#[expect(clippy::cast_possible_truncation, reason = "16 bits; places are below 2^32")]
pub(super) fn largest(values: &[f32], count: usize) -> Vec<u32> {
    assert!(u32::try_from(values.len()).is_ok(), "places of 32 bits");
    let count = count.min(values.len());
    if count == 0 {
        return Vec::new();
    }
    let mut counts = vec![0_usize; 1 << COUNTED_BITS];
    for value in values {
        counts[(magnitude(*value) >> SHIFT) as usize] += 1;
    }
    let mut above = 0;
    let mut class = counts.len() - 1;
    while above + counts[class] < count {
        above += counts[class];
        class -= 1;
    }
    let (mut places, mut candidates) = (Vec::with_capacity(count), Vec::new());
    for (place, value) in values.iter().enumerate() {
        let magnitude = magnitude(*value);
        let of = (magnitude >> SHIFT) as usize;
        if of > class {
            places.push(place as u32);
        } else if of == class {
            candidates.push((!magnitude, place as u32));
        }
    }
    let wanted = count - above;
    if wanted < candidates.len() {
        let _split = candidates.select_nth_unstable(wanted);
        candidates.truncate(wanted);
    }
    places.extend(candidates.into_iter().map(|(_, place)| place));
    places.sort_unstable();
    places
}

/// In the order of absolute values; NaN is above infinity.
fn magnitude(value: f32) -> u32 {
    value.to_bits() & (u32::MAX >> 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn by_sorting(values: &[f32], count: usize) -> Vec<u32> {
        let mut places: Vec<u32> = (0..u32::try_from(values.len()).unwrap()).collect();
        places.sort_by_key(|&place| (!magnitude(values[place as usize]), place));
        places.truncate(count);
        places.sort_unstable();
        places
    }

    #[test]
    fn it_takes_what_sorting_would() {
        let mut state = 1_u32;
        let mut random = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            state
        };
        for len in [1_usize, 2, 63, 1000, 5000] {
            for kind in 0..3 {
                let values: Vec<f32> = (0..len)
                    .map(|_| match kind {
                        0 => f32::from_bits(random()), // all magnitudes, NaN and infinities
                        1 => f32::from(i16::try_from(random() % 7).unwrap() - 3), // many ties
                        _ => 1.0 + f32::from_bits(random() >> 20) * 1e30, // one class
                    })
                    .collect();
                for count in [0, 1, 2, len / 3, len - 1, len, len + 5] {
                    assert_eq!(
                        largest(&values, count),
                        by_sorting(&values, count),
                        "{len} {count}"
                    );
                }
            }
        }
    }
}
