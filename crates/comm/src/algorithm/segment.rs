//! Who does which part of a buffer. Pure.

use std::ops::Range;

/// The part `index` of `len` elements cut into `parts`, at multiples of `align` elements so that two
/// ranks never write the same cache line. The first parts are the longer ones; late ones may be empty.
pub(crate) fn share(len: usize, parts: usize, index: usize, align: usize) -> Range<usize> {
    let units = len.div_ceil(align);
    let (each, longer) = (units / parts, units % parts);
    let start = index * each + index.min(longer);
    let end = start + each + usize::from(index < longer);
    (start * align).min(len)..(end * align).min(len)
}

/// Cuts a range into pieces of at most `piece` elements, in order.
pub(crate) fn pieces(range: Range<usize>, piece: usize) -> impl Iterator<Item = Range<usize>> {
    let end = range.end;
    let piece = piece.max(1);
    range.step_by(piece).map(move |start| start..start.saturating_add(piece).min(end))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_cover_everything_once_and_in_order() {
        for len in [0, 1, 2, 3, 15, 16, 17, 1000, 10_007] {
            for parts in 1..9 {
                for align in [1, 4, 16] {
                    let shares: Vec<_> =
                        (0..parts).map(|index| share(len, parts, index, align)).collect();
                    assert_eq!(shares[0].start, 0);
                    assert_eq!(shares[parts - 1].end, len);
                    for pair in shares.windows(2) {
                        assert_eq!(pair[0].end, pair[1].start);
                        assert!(pair[0].end % align == 0 || pair[0].end == len);
                    }
                    let longest = shares.iter().map(ExactSizeIterator::len).max().unwrap();
                    assert!(longest <= len.div_ceil(align).div_ceil(parts) * align);
                }
            }
        }
    }

    #[test]
    fn pieces_cover_a_range() {
        assert_eq!(pieces(3..10, 3).collect::<Vec<_>>(), [3..6, 6..9, 9..10]);
        assert_eq!(pieces(3..3, 3).count(), 0);
    }
}
