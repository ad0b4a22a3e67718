//! Who computes which samples of a global batch: pure arithmetic on ranges.

use std::num::NonZeroUsize;
use std::ops::Range;

use crate::error::{Error, Result};

/// Part `index` of `count` contiguous parts of `0..len`: sizes differ by at most one, the first
/// parts are the larger ones.
///
/// # Panics
/// If `index` is not below `count`.
pub(crate) fn part(len: usize, index: usize, count: usize) -> Range<usize> {
    assert!(index < count, "part {index} of {count}");
    let (size, larger) = (len / count, len % count);
    let start = index * size + index.min(larger);
    start..start + size + usize::from(index < larger)
}

/// The slice of each global batch that a rank computes, counted within the global batch.
///
/// Rank r takes the r-th contiguous slice. The world size need not divide the global batch: slices
/// are cut by [`part`], so the first `global_batch % world_size` ranks hold one sample more. Each
/// rank holds at least one.
///
/// # Errors
/// [`Error::InvalidOption`] if the rank is not below the world size, or the global batch has fewer
/// samples than there are ranks.
pub(crate) fn rank_slice(
    rank: usize,
    world_size: usize,
    global_batch: usize,
) -> Result<Range<usize>> {
    if rank >= world_size {
        let reason = format!("it must be below the world size of {world_size}");
        return Err(Error::option("rank", rank, reason));
    }
    if global_batch < world_size {
        let reason = format!("{world_size} ranks need at least one sample each");
        return Err(Error::option("global_batch", global_batch, reason));
    }
    Ok(part(global_batch, rank, world_size))
}

/// How a rank's slice is cut into micro-batches.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum MicroBatch {
    /// The whole slice at once.
    #[default]
    Whole,
    /// At most so many samples each: all have this size but the last, which holds what is left.
    Size(NonZeroUsize),
    /// So many parts, cut as ranks are: world size n with one part is world size 1 with n parts.
    Count(NonZeroUsize),
}

impl MicroBatch {
    /// How many micro-batches a slice of `len` samples has.
    pub(crate) fn count(self, len: usize) -> usize {
        match self {
            MicroBatch::Whole => len.min(1),
            MicroBatch::Size(size) => len.div_ceil(size.get()),
            MicroBatch::Count(count) => count.get().min(len),
        }
    }

    /// Micro-batch `index` of a slice of `len` samples, counted within the slice; empty if there is
    /// no such one.
    pub(crate) fn nth(self, len: usize, index: usize) -> Range<usize> {
        if index >= self.count(len) {
            return len..len;
        }
        match self {
            MicroBatch::Whole => 0..len,
            MicroBatch::Size(size) => index * size.get()..((index + 1) * size.get()).min(len),
            MicroBatch::Count(count) => part(len, index, count.get()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cut(micro_batch: MicroBatch, len: usize) -> Vec<Range<usize>> {
        (0..micro_batch.count(len)).map(|index| micro_batch.nth(len, index)).collect()
    }

    #[test]
    fn parts_are_contiguous_complete_and_even() {
        for len in 0..60 {
            for count in 1..9 {
                let parts: Vec<_> = (0..count).map(|i| part(len, i, count)).collect();
                let joined: Vec<usize> = parts.iter().cloned().flatten().collect();
                assert_eq!(joined, (0..len).collect::<Vec<_>>());
                assert!(parts
                    .windows(2)
                    .all(|p| p[0].len() == p[1].len() || p[0].len() == p[1].len() + 1));
                assert!(parts[0].len() - parts[count - 1].len() <= 1);
            }
        }
    }

    #[test]
    fn micro_batches_cover_the_slice_in_order() {
        for len in 1..40 {
            for n in 1..9 {
                let n = NonZeroUsize::new(n).unwrap();
                for by in [MicroBatch::Whole, MicroBatch::Size(n), MicroBatch::Count(n)] {
                    let ranges = cut(by, len);
                    assert!(ranges.iter().all(|range| !range.is_empty()));
                    let joined: Vec<usize> = ranges.into_iter().flatten().collect();
                    assert_eq!(joined, (0..len).collect::<Vec<_>>(), "{by:?} of {len}");
                }
            }
        }
    }

    #[test]
    fn four_ranks_once_are_one_rank_four_times() {
        let four = NonZeroUsize::new(4).unwrap();
        for global_batch in 4..40 {
            let ranks: Vec<_> = (0..4).map(|r| rank_slice(r, 4, global_batch).unwrap()).collect();
            let alone = rank_slice(0, 1, global_batch).unwrap();
            assert_eq!(cut(MicroBatch::Count(four), alone.len()), ranks);
        }
    }

    #[test]
    fn ranks_without_samples_are_refused() {
        assert!(rank_slice(0, 4, 3).unwrap_err().to_string().contains("at least one sample"));
        assert!(rank_slice(4, 4, 8).unwrap_err().to_string().contains("below the world size"));
    }
}
