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
    /// What micro-batches have come to that were exchanged by themselves.
    pub(super) sums: Sums,
    /// This rank's segment of the parameters as they were before they were rounded, until an optimizer has taken a step from them.
    pub(crate) unrounded: Option<Flat>,
    /// The bucket's number with who gathers it, if somebody does.
    pub(super) gathered: usize,
}

/// This rank's segment of gradients that add up over micro-batches.
#[derive(Debug, Default)]
pub(super) struct Sums {
    /// Where gradients are of half precision: the sums in f32.
    wide: Option<Flat>,
    /// Whether there are some.
    is_begun: bool,
}

impl Storage {
    /// Bytes of gradients that are kept.
    pub(super) fn gradient_bytes(&self) -> usize {
        let wide = |flat: &Flat| flat.len() * flat.kind().elt_size_in_bytes();
        self.gradients.bytes() + self.sums.wide.as_ref().map_or(0, wide)
    }

    /// Whether micro-batches were exchanged that belong to the next exchange.
    pub(crate) fn has_sums(&self) -> bool {
        self.sums.is_begun
    }

    /// They are given up.
    pub(crate) fn forget_sums(&mut self) {
        self.sums.is_begun = false;
    }

    /// Takes this rank's segment of gradients that were exchanged: a micro-batch of several where there is no `factor`, else the last, or
    /// the only one. Sums of several become means by the factor.
    pub(crate) fn take_in(&mut self, reduced: &Tensor, factor: Option<f64>) -> Result<()> {
        let Held::Segment(kept) = &self.gradients else { return Ok(()) };
        let everything = 0..kept.len();
        let mut mean = kept.range(&everything)?;
        if factor.is_some() && !self.sums.is_begun {
            return Ok(tch::no_grad(|| mean.f_copy_(reduced).map(drop))?);
        }
        let is_half = matches!(kept.kind(), Kind::Half | Kind::BFloat16);
        if is_half && self.sums.wide.is_none() {
            self.sums.wide = Some(Flat::private(Kind::Float, kept.device(), kept.len())?);
        }
        let mut sum = self.sums.wide.as_ref().unwrap_or(kept).range(&everything)?;
        tch::no_grad(|| match self.sums.is_begun {
            true => sum.f_add_(reduced).map(drop),
            false => sum.f_copy_(reduced).map(drop),
        })?;
        self.sums.is_begun = factor.is_none();
        let Some(factor) = factor else { return Ok(()) };
        tch::no_grad(|| sum.f_mul_scalar_(factor).map(drop))?;
        match &self.sums.wide {
            Some(_) => Ok(tch::no_grad(|| mean.f_copy_(&sum).map(drop))?),
            None => Ok(()),
        }
    }

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
