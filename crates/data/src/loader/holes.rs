//! Samples that are left out because they are damaged, and what is read in their place.

use std::ops::Range;

use crate::error::{Error, Result};
use crate::fingerprint::Fingerprinter;
use crate::format::damage_list::merged;

/// Samples that are left out.
#[derive(Clone, Debug, Default)]
pub(crate) struct Holes {
    ranges: Vec<Range<u64>>,
    /// The first sample that is good.
    good: u64,
    sample_count: u64,
}

impl Holes {
    /// Ranges of samples out of `sample_count`.
    pub(crate) fn new(ranges: Vec<Range<u64>>, sample_count: u64) -> Result<Self> {
        let ranges = merged(ranges);
        let good = ranges.first().filter(|first| first.start == 0).map_or(0, |first| first.end);
        if good >= sample_count {
            let reason = "every sample is damaged: copy or prepare the data again";
            return Err(Error::option("on_damage", "skip", reason));
        }
        Ok(Holes { ranges, good, sample_count })
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.ranges.is_empty()
    }

    /// Says in few characters which samples they are: how many, and a fingerprint.
    pub(crate) fn summary(&self) -> String {
        if self.is_empty() {
            return "none".to_owned();
        }
        let count: u64 = self.ranges.iter().map(|range| range.end - range.start).sum();
        let sum = Fingerprinter::new("damaged samples 1");
        let sum = self.ranges.iter().fold(sum, |sum, r| sum.number(r.start).number(r.end));
        format!("{count} ({})", sum.finish())
    }

    /// What is read in place of a sample that is left out.
    #[inline]
    pub(crate) fn instead(&self, id: u64) -> Option<u64> {
        let at = self.ranges.partition_point(|range| range.end <= id);
        let range = self.ranges.get(at).filter(|range| range.contains(&id))?;
        Some(if range.end < self.sample_count { range.end } else { self.good })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_good_sample_stands_in_for_one_that_is_left_out() {
        let holes = Holes::new(vec![0..2, 5..6, 8..10], 10).unwrap();
        let instead: Vec<Option<u64>> = (0..10).map(|id| holes.instead(id)).collect();
        let (two, six) = (Some(2), Some(6));
        assert_eq!(instead, [two, two, None, None, None, six, None, None, two, two]);
        assert!(Holes::new(vec![0..4, 4..10], 10).is_err());
        assert!(Holes::default().instead(3).is_none());
    }
}
