//! What a rank holds of a bucket: all of it, or its segment.

use std::ops::Range;

use tch::{Kind, Tensor};

use super::flat::{self, Flat};
use super::pool::{Pool, Taken};
use crate::Result;

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
    /// This rank's segment of the parameters as they were before they were rounded, until an optimizer has taken a step from them.
    pub(crate) unrounded: Option<Flat>,
    /// The bucket's number with who gathers it, if somebody does.
    pub(super) gathered: usize,
}

impl Storage {
    /// Keeps what lies in this rank's `segment` of a parameter at `range` of the bucket: `values`, its elements one after the other.
    pub(super) fn keep_unrounded(
        &mut self,
        values: &Tensor,
        range: &Range<usize>,
        segment: &Range<usize>,
    ) -> Result<()> {
        if self.unrounded.is_none() {
            self.unrounded = Some(Flat::private(values.kind(), values.device(), segment.len())?);
        }
        let (start, end) = (range.start.max(segment.start), range.end.min(segment.end));
        let Some(flat) = self.unrounded.as_ref().filter(|_| start < end) else { return Ok(()) };
        let own = flat::part(values, &(start - range.start..end - range.start))?;
        let mut place = flat.range(&(start - segment.start..end - segment.start))?;
        Ok(tch::no_grad(|| place.f_copy_(&own).map(drop))?)
    }

    /// The memory in which the bucket's gradients are exchanged: a buffer of `pool`, or their own.
    pub(crate) fn exchanged<'a>(
        &'a self,
        pool: &'a Pool,
        taken: Option<Taken>,
    ) -> Option<&'a Flat> {
        match taken {
            Some(taken) => Some(pool.buffer(taken)),
            None => self.gradients.whole(),
        }
    }
}
