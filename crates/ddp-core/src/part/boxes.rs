//! A box of a part is boxes of the whole tensor: one for each range of the cut that it touches. Pure.

use phalanx_checkpoint::Extent;

use crate::Cut;

/// A box as both sides see it: in the indices of the part, and in those of the whole. They have the same lengths.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Both {
    pub(crate) part: Extent,
    pub(crate) whole: Extent,
}

impl Both {
    /// Where a box that lies in `whole` is in the part.
    pub(crate) fn in_part(&self, inside: &Extent) -> Extent {
        let starts = inside.start().iter().zip(self.whole.start()).zip(self.part.start());
        let start: Vec<u64> = starts.map(|((at, whole), part)| at - whole + part).collect();
        Extent::new(&start, inside.len())
    }
}

/// The boxes of the whole that a box of a part is, in the order of the part; of a tensor that is not cut it is itself.
pub(crate) fn boxes(cut: Option<&Cut>, extent: &Extent) -> Vec<Both> {
    let same = |whole: Extent| Both { part: extent.clone(), whole };
    let Some(cut) = cut else { return vec![same(extent.clone())] };
    if extent.is_empty() {
        return vec![same(Extent::whole(&shape(cut)))];
    }
    let dim = cut.dim();
    let (from, until) = (extent.start()[dim], extent.start()[dim] + extent.len()[dim]);
    let with = |start: u64, len: u64| {
        let (mut starts, mut lens) = (extent.start().to_vec(), extent.len().to_vec());
        starts[dim] = start;
        lens[dim] = len;
        Extent::new(&starts, &lens)
    };
    let mut found = Vec::new();
    let mut before = 0;
    for range in cut.ranges() {
        let (start, len) = (number(range.start), number(range.end - range.start));
        let (first, last) = (from.max(before), until.min(before + len));
        if first < last {
            let part = with(first, last - first);
            found.push(Both { part, whole: with(start + first - before, last - first) });
        }
        before += len;
    }
    found
}

/// Shape of the whole.
pub(crate) fn shape(cut: &Cut) -> Vec<u64> {
    cut.shape().iter().map(|&len| number(len)).collect()
}

fn number(value: i64) -> u64 {
    u64::try_from(value).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_element_of_a_part_is_one_of_the_whole() {
        // Columns 1, 2, 6 and 4 of 3 by 7: element (row, column) has the number 7 row + column.
        let cut = Cut::new(&[3, 7], 1, vec![1..3, 6..7, 4..5]);
        let columns = [1, 2, 6, 4];
        for row in 0..3 {
            for (from, until) in (0..4).flat_map(|from| (from + 1..=4).map(move |to| (from, to))) {
                let extent = Extent::new(&[row, from], &[3 - row, until - from]);
                let found = boxes(Some(&cut), &extent);
                let mut seen = Vec::new();
                for both in &found {
                    assert_eq!(both.part.len(), both.whole.len());
                    assert!(both.whole.fits(&[3, 7]) && both.part.fits(&[3, 4]));
                    assert_eq!(both.in_part(&both.whole), both.part);
                    let (start, len) = (both.whole.start()[1], both.whole.len()[1]);
                    assert_eq!(both.part.start()[0], both.whole.start()[0]);
                    seen.extend(start..start + len);
                }
                let expected = &columns[usize::try_from(from).unwrap()..];
                assert_eq!(seen, expected[..seen.len()]);
                assert_eq!(seen.len() as u64, until - from);
            }
        }
    }

    #[test]
    fn what_is_not_cut_is_itself() {
        let extent = Extent::new(&[2], &[3]);
        assert_eq!(boxes(None, &extent), [Both { part: extent.clone(), whole: extent }]);
        let nothing = Cut::new(&[4, 0], 0, vec![2..3, 3..4]);
        let found = boxes(Some(&nothing), &Extent::whole(&[2, 0]));
        assert_eq!(found[0].whole, Extent::whole(&[4, 0]));
    }
}
