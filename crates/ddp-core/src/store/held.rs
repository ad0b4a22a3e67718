//! What a rank has of each bucket.

use std::ops::Range;

use tch::Kind;

use super::flat::Flat;

/// What a rank has of a bucket's parameters or gradients.
#[derive(Debug)]
pub(crate) enum Held {
    /// All of it.
    Whole(Flat),
    /// Its segment.
    Segment(Flat),
}

impl Held {
    /// Where elements of the bucket that are this rank's lie: `range` in the bucket, `segment` in its segment.
    pub(crate) fn at(&self, range: &Range<usize>, segment: &Range<usize>) -> (&Flat, Range<usize>) {
        match self {
            Self::Whole(flat) => (flat, range.clone()),
            Self::Segment(flat) => (flat, segment.clone()),
        }
    }

    /// All of it, if it is here.
    pub(crate) fn whole(&self) -> Option<&Flat> {
        match self {
            Self::Whole(flat) => Some(flat),
            Self::Segment(_) => None,
        }
    }

    fn flat(&self) -> &Flat {
        let (Self::Whole(flat) | Self::Segment(flat)) = self;
        flat
    }

    /// Its kind.
    pub(crate) fn kind(&self) -> Kind {
        self.flat().kind()
    }

    /// Its bytes.
    pub(crate) fn bytes(&self) -> usize {
        self.flat().len() * self.kind().elt_size_in_bytes()
    }
}

/// A bucket's parameters, and their gradients, which may be of another kind.
#[derive(Debug)]
pub(crate) struct Storage {
    pub(crate) parameters: Held,
    pub(crate) gradients: Held,
    /// The bucket's number with who gathers it, if somebody does.
    pub(super) gathered: usize,
}
