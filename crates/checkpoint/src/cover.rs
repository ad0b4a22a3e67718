//! Whether boxes cover a tensor exactly once. Pure.
//!
//! Boxes that are disjoint and have as many elements together as the tensor cover it. Disjoint is checked by a sweep along the
//! dimension with most different starts: boxes are compared with those that begin before they end. A thousand ranks' shards take
//! a few thousand comparisons; boxes that were made up to take many more are refused, so that a hostile manifest costs little.

use crate::extent::Extent;

/// Comparisons that are made, at most: some 0.1 s of them.
const COMPARISONS_MAX: usize = 1 << 24;

/// What is wrong with boxes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Flaw {
    /// These two share elements.
    Overlap(usize, usize),
    /// So many elements are in none.
    Missing(u64),
    /// Too many of them lie across each other to be compared.
    Tangled,
}

/// Whether boxes of a tensor, none of them empty, cover its elements exactly once.
pub(crate) fn check(elements: u64, boxes: &[&Extent]) -> Result<(), Flaw> {
    let mut order: Vec<usize> = (0..boxes.len()).collect();
    let mut budget = COMPARISONS_MAX;
    if let Some(along) = sweep_dimension(boxes) {
        order.sort_by_key(|&at| boxes[at].start()[along]);
        for (n, &one) in order.iter().enumerate() {
            let end = boxes[one].start()[along] + boxes[one].len()[along];
            for &other in &order[n + 1..] {
                budget = budget.checked_sub(1).ok_or(Flaw::Tangled)?;
                if boxes[other].start()[along] >= end {
                    break;
                }
                if boxes[one].overlaps(boxes[other]) {
                    return Err(Flaw::Overlap(one.min(other), one.max(other)));
                }
            }
        }
    } else if boxes.len() > 1 {
        return Err(Flaw::Overlap(0, 1));
    }
    let covered = boxes.iter().map(|one| one.elements()).sum();
    let missing = elements.saturating_sub(covered);
    if missing > 0 {
        return Err(Flaw::Missing(missing));
    }
    Ok(())
}

/// The dimension with most different starts; none where there are no dimensions.
fn sweep_dimension(boxes: &[&Extent]) -> Option<usize> {
    let dimensions = boxes.first()?.start().len();
    (0..dimensions).max_by_key(|&at| {
        let mut starts: Vec<u64> = boxes.iter().map(|one| one.start()[at]).collect();
        starts.sort_unstable();
        starts.dedup();
        starts.len()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn checked(elements: u64, boxes: &[Extent]) -> Result<(), Flaw> {
        check(elements, &boxes.iter().collect::<Vec<_>>())
    }

    #[test]
    fn a_pinwheel_covers_and_its_flaws_are_named() {
        // No straight cut goes through these five.
        let mut pinwheel = vec![
            Extent::new(&[0, 0], &[1, 2]),
            Extent::new(&[0, 2], &[2, 1]),
            Extent::new(&[2, 1], &[1, 2]),
            Extent::new(&[1, 0], &[2, 1]),
            Extent::new(&[1, 1], &[1, 1]),
        ];
        assert_eq!(checked(9, &pinwheel), Ok(()));
        assert_eq!(checked(9, &pinwheel[..4]), Err(Flaw::Missing(1)));
        pinwheel[4] = Extent::new(&[1, 1], &[1, 2]);
        assert_eq!(checked(9, &pinwheel), Err(Flaw::Overlap(1, 4)));
        assert_eq!(checked(1, &[Extent::whole(&[])]), Ok(()));
        assert_eq!(checked(1, &[]), Err(Flaw::Missing(1)));
        assert_eq!(checked(1, &[Extent::whole(&[]), Extent::whole(&[])]), Err(Flaw::Overlap(0, 1)));
    }

    #[test]
    fn boxes_that_would_take_for_ever_are_refused() {
        let bars = (0..8000).map(|n| Extent::new(&[n, n / 2, n % 2], &[1 << 20, 1, 1]));
        let boxes: Vec<Extent> = bars.collect();
        assert_eq!(checked(1 << 40, &boxes), Err(Flaw::Tangled));
    }
}
