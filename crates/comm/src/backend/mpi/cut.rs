//! Who reduces which part of a buffer, and in which pieces. Pure.
//!
//! Three shapes. *Everyone*: every rank gets all buffers and reduces all of it, in one round (two ranks:
//! no more bytes than any other way). *Root*: one rank does. *Segments*: rank r reduces segment r,
//! `2 (n − 1) / n` of the buffer's bytes for an all-reduce, in two rounds. A piece is what is under way
//! at a time of what each rank reduces.

use std::ops::Range;

/// What a rank has in memory for one piece, over all peers.
const STAGED_BYTES: usize = 8 << 20;
const PIECE_BYTES_MIN: usize = 64 << 10;
const PIECE_BYTES_MAX: usize = 2 << 20;
/// Bounds the tags of a call.
pub(super) const PIECES_MAX: usize = 2048;
/// Segments start on cache lines.
const LINE: usize = 64;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum CutShape {
    Everyone,
    Root(usize),
    Segments,
}

/// A buffer of `bytes`, cut.
#[derive(Debug, Clone, Copy)]
pub(super) struct ReductionCut {
    shape: CutShape,
    bytes: usize,
    /// From segment to segment.
    stride: usize,
    piece: usize,
}

impl ReductionCut {
    /// The whole buffer, for everyone or for the root.
    pub(super) fn whole(shape: CutShape, bytes: usize, ranks: usize) -> Self {
        Self { shape, bytes, stride: bytes, piece: piece_bytes(bytes, ranks) }
    }

    /// Segments of `stride` bytes, the last ones shorter or empty.
    pub(super) fn segments(bytes: usize, stride: usize, ranks: usize) -> Self {
        Self { shape: CutShape::Segments, bytes, stride, piece: piece_bytes(stride, ranks) }
    }

    /// Segments of our own choice, of whole lines.
    pub(super) fn even(bytes: usize, ranks: usize) -> Self {
        Self::segments(bytes, bytes.div_ceil(ranks).next_multiple_of(LINE), ranks)
    }

    pub(super) fn pieces(&self) -> usize {
        self.stride.min(self.bytes).div_ceil(self.piece)
    }

    /// What `rank` reduces in a piece.
    pub(super) fn part(&self, rank: usize, piece: usize) -> Range<usize> {
        let segment = match self.shape {
            CutShape::Everyone => 0..self.bytes,
            CutShape::Root(root) if root == rank => 0..self.bytes,
            CutShape::Root(_) => return 0..0,
            CutShape::Segments => rank * self.stride..(rank + 1) * self.stride,
        };
        let end = segment.end.min(self.bytes);
        let from = (segment.start + piece * self.piece).min(end);
        from..(from + self.piece).min(end)
    }
}

/// A multiple of a line, so that pieces hold whole elements.
fn piece_bytes(of: usize, ranks: usize) -> usize {
    let staged = STAGED_BYTES / ranks.max(1);
    let few = of.div_ceil(PIECES_MAX);
    staged.clamp(PIECE_BYTES_MIN, PIECE_BYTES_MAX).max(few).next_multiple_of(LINE)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every byte is reduced by whom it should be, once.
    #[test]
    fn parts_cover_the_buffer_once() {
        for ranks in [1, 2, 3, 4, 7, 100] {
            for bytes in [0, 8, 64, 1000 * 8, (5 << 20) + 8, 3 << 20] {
                for cut in [
                    ReductionCut::even(bytes, ranks),
                    ReductionCut::segments(bytes, bytes.div_ceil(ranks), ranks),
                ] {
                    let mut parts: Vec<Range<usize>> = (0..ranks)
                        .flat_map(|rank| (0..cut.pieces()).map(move |piece| cut.part(rank, piece)))
                        .filter(|part| !part.is_empty())
                        .collect();
                    parts.sort_by_key(|part| part.start);
                    let covered = parts.iter().fold(0, |end, part| {
                        assert_eq!(part.start, end, "{ranks} ranks, {bytes} bytes");
                        part.end
                    });
                    assert_eq!(covered, bytes, "{ranks} ranks");
                    assert!(cut.pieces() <= PIECES_MAX);
                }
                for (shape, rank) in [(CutShape::Everyone, ranks - 1), (CutShape::Root(0), 0)] {
                    let cut = ReductionCut::whole(shape, bytes, ranks);
                    let length: usize = (0..cut.pieces()).map(|p| cut.part(rank, p).len()).sum();
                    assert_eq!(length, bytes);
                }
            }
        }
        let cut = ReductionCut::whole(CutShape::Root(1), 100, 3);
        assert!(cut.part(0, 0).is_empty());
    }

    #[test]
    fn huge_buffers_have_few_pieces_and_small_counts() {
        for bytes in [1_usize << 33, 1 << 37] {
            let cut = ReductionCut::even(bytes, 2);
            assert!(cut.pieces() <= PIECES_MAX);
            assert!(i32::try_from(cut.part(0, 0).len()).is_ok(), "{bytes}");
        }
    }
}
