//! Tokens of a shard as `i64`.

/// Tokens that are worked on at once: one pass reads, compares and writes them with vector
/// instructions.
const LANES: usize = 16;

/// Writes little-endian tokens to `out`, of the same length; gives the largest.
#[inline]
pub(super) fn widen_u16(tokens: &[[u8; 2]], out: &mut [i64]) -> u16 {
    let ((many, rest), (many_out, rest_out)) =
        (tokens.as_chunks::<LANES>(), out.as_chunks_mut::<LANES>());
    let mut largest = [0_u16; LANES];
    for (from, to) in many.iter().zip(many_out) {
        for lane in 0..LANES {
            let token = u16::from_le_bytes(from[lane]);
            largest[lane] = largest[lane].max(token);
            to[lane] = i64::from(token);
        }
    }
    let mut last = 0;
    for (from, to) in rest.iter().zip(rest_out) {
        let token = u16::from_le_bytes(*from);
        last = last.max(token);
        *to = i64::from(token);
    }
    largest.into_iter().fold(last, u16::max)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_of_any_number_are_widened() {
        for len in 0..70_u16 {
            let tokens: Vec<[u8; 2]> =
                (0..len).map(|at| (at.wrapping_mul(40_503) ^ 0x8001).to_le_bytes()).collect();
            let expected: Vec<i64> =
                tokens.iter().map(|le| i64::from(u16::from_le_bytes(*le))).collect();
            let mut out = vec![-1; tokens.len()];
            let largest = widen_u16(&tokens, &mut out);
            assert_eq!(out, expected);
            assert_eq!(i64::from(largest), expected.iter().copied().max().unwrap_or(0));
        }
    }
}
