//! What a hook sees of a bucket, and what it can do with it.

use std::ops::Range;

use phalanx_comm::{Backend, Group, Work};
use tch::{Device, Kind, Tensor};

use super::wire::{Pool, Wire};
use crate::shim;
use crate::store::flat::{Flat, Scale};
use crate::Result;

/// A parameter in a bucket.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Placed {
    /// Its name.
    pub name: String,
    /// Its shape.
    pub shape: Vec<i64>,
    /// Its strides: it is dense, but not always in the order of its dimensions.
    pub strides: Vec<i64>,
    /// Its elements of the bucket, in the order of its memory.
    pub range: Range<usize>,
}

impl Placed {
    /// Its elements of a flat tensor as long as the bucket.
    ///
    /// # Errors
    /// libtorch's own.
    pub fn of(&self, flat: &Tensor) -> Result<Tensor> {
        let (start, len) = as_i64(&self.range)?;
        Ok(flat.f_narrow(0, start, len)?)
    }

    /// As [`of`](Self::of), in its shape.
    ///
    /// # Errors
    /// libtorch's own.
    pub fn shaped(&self, flat: &Tensor) -> Result<Tensor> {
        Ok(self.of(flat)?.f_as_strided(&self.shape, &self.strides, None)?)
    }
}

/// Where the gradients are.
#[derive(Clone, Copy, Debug)]
pub(super) enum Memory<'a> {
    /// In flat storage, a range of it.
    Flat(&'a Flat, (usize, usize)),
    /// In memory of their own.
    Wire(&'a Wire),
}

/// What is known of a bucket.
#[derive(Clone, Copy, Debug)]
pub(super) struct Facts<'a> {
    pub(super) index: usize,
    pub(super) exchange: u64,
    pub(super) parameters: &'a [Placed],
    pub(super) scale: f64,
    pub(super) everywhere: bool,
    pub(super) tag: &'a str,
    pub(super) lost: Option<&'a Tensor>,
}

/// A bucket of gradients on its way: one flat memory, in which parameters lie one after the other with zeros between them.
#[derive(Debug)]
pub struct Bucket<'a> {
    pub(super) group: &'a mut Group,
    pub(super) pool: &'a mut Pool,
    pub(super) sent: &'a mut u64,
    pub(super) memory: Memory<'a>,
    pub(super) facts: Facts<'a>,
}

impl Bucket<'_> {
    /// Its number, the same on every rank. The layout changes at most once, after the first exchange, and when variables are unfrozen: what is
    /// kept for later exchanges belongs to parameters, by name.
    #[must_use]
    pub fn index(&self) -> usize {
        self.facts.index
    }

    /// How many exchanges this hook has made before; it goes on where a saved state ended.
    #[must_use]
    pub fn exchange(&self) -> u64 {
        self.facts.exchange
    }

    /// What lies in it, in its order.
    #[must_use]
    pub fn parameters(&self) -> &[Placed] {
        self.facts.parameters
    }

    /// The factor that makes the sum over all ranks the mean: 1/P, or 1/Σ weights.
    #[must_use]
    pub fn scale(&self) -> f64 {
        self.facts.scale
    }

    /// By what a rank's gradients are multiplied to be of the mean's size: P · scale, which is 1 unless they are weighted.
    #[must_use]
    #[expect(clippy::cast_precision_loss, reason = "world sizes are far below 2^53")]
    pub(crate) fn factor(&self) -> f64 {
        let (ranks, scale) = (self.world_size() as f64, self.scale());
        // As exact as the division that made the scale. Where nothing was weighed gradients are zero, whatever the factor.
        let is_plain = scale == 0.0 || (scale - 1.0 / ranks).abs() == 0.0;
        if is_plain {
            1.0
        } else {
            ranks * scale
        }
    }

    /// Elements of a flat tensor.
    ///
    /// # Errors
    /// libtorch's own.
    pub(crate) fn part(&self, flat: &Tensor, range: &Range<usize>) -> Result<Tensor> {
        let (start, len) = as_i64(range)?;
        Ok(flat.f_narrow(0, start, len)?)
    }

    /// Whether every rank needs the mean of the whole bucket; else each one its [`segment`](Self::segment).
    #[must_use]
    pub(crate) fn is_everywhere(&self) -> bool {
        self.facts.everywhere
    }

    /// What this rank needs the mean of: elements of the bucket.
    #[must_use]
    pub fn segment(&self) -> Range<usize> {
        if self.facts.everywhere {
            return 0..self.len();
        }
        self.segment_of(self.rank())
    }

    /// The part of `rank` among `world_size` equal ones: whole blocks of 1024 elements.
    #[must_use]
    pub(crate) fn segment_of(&self, rank: usize) -> Range<usize> {
        let len = self.len() / self.world_size();
        rank * len..(rank + 1) * len
    }

    /// Where what is lost of this rank's gradients is to be added, flat, in f32, if anybody wants it: see [`Lossy`](super::Lossy).
    #[must_use]
    pub fn lost(&self) -> Option<Tensor> {
        self.facts.lost.map(Tensor::shallow_clone)
    }

    /// Elements, a multiple of 1024 · `world_size`.
    #[must_use]
    pub fn len(&self) -> usize {
        match self.memory {
            Memory::Flat(_, (start, end)) => end - start,
            Memory::Wire(wire) => wire.len(),
        }
    }

    /// Whether it has no elements.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// In which kind the gradients are.
    #[must_use]
    pub fn kind(&self) -> Kind {
        match self.memory {
            Memory::Flat(flat, _) => flat.kind(),
            Memory::Wire(wire) => wire.tensor().kind(),
        }
    }

    /// Where they are.
    #[must_use]
    pub fn device(&self) -> Device {
        match self.memory {
            Memory::Flat(flat, _) => flat.device(),
            Memory::Wire(wire) => wire.tensor().device(),
        }
    }

    /// The gradients, flat, in their memory.
    ///
    /// # Errors
    /// libtorch's own.
    pub fn gradients(&self) -> Result<Tensor> {
        match self.memory {
            Memory::Flat(flat, (start, end)) => flat.range(&(start..end)),
            Memory::Wire(wire) => Ok(wire.tensor().shallow_clone()),
        }
    }

    /// How many ranks there are.
    #[must_use]
    pub fn world_size(&self) -> usize {
        self.group.world_size()
    }

    /// Which one this is.
    #[must_use]
    pub fn rank(&self) -> usize {
        self.group.rank()
    }

    /// Memory to send and receive in, where the gradients are: of an earlier use, or new. Collective.
    ///
    /// # Errors
    /// [`Error::UnsupportedKind`](crate::Error::UnsupportedKind); those of the group.
    pub fn take(&mut self, kind: Kind, len: usize) -> Result<Wire> {
        let device = self.device();
        self.pool.take(self.group, (kind, device, len))
    }

    /// Keeps memory for the next exchange. All ranks in the same order.
    pub fn put_back(&mut self, wire: Wire) {
        self.pool.put_back(wire);
    }

    /// Starts to replace a wire on every rank by the sum over the ranks, in rank order (in f32 for halves), times `scale`. `what` names it in
    /// messages.
    ///
    /// # Errors
    /// [`Error::UnsupportedKind`](crate::Error::UnsupportedKind) for integers; those of the group.
    pub fn all_reduce(&mut self, what: &str, wire: &Wire, scale: f64) -> Result<Work<'static>> {
        self.tag(what);
        *self.sent += 2 * self.share(wire.bytes());
        wire.reduce(self.group, scale, true)
    }

    /// Starts to fill every segment of a wire of `world_size` segments from the rank of that number.
    ///
    /// # Errors
    /// Those of the group.
    pub fn all_gather(&mut self, what: &str, wire: &Wire) -> Result<Work<'static>> {
        self.tag(what);
        *self.sent += self.share(wire.bytes());
        wire.all_gather(self.group)
    }

    /// Starts to send segment r of a wire to rank r; see [`arrived`](Self::arrived).
    ///
    /// # Errors
    /// Those of the group.
    pub fn all_to_all(&mut self, what: &str, wire: Wire) -> Result<Crossing> {
        *self.sent += self.share(wire.bytes());
        let second = match self.device().is_cuda() {
            true => Some(self.take(wire.tensor().kind(), wire.len())?),
            false => None,
        };
        self.tag(what);
        let work = wire.all_to_all(self.group, second.as_ref())?;
        Ok(Crossing { first: wire, second, work })
    }

    /// Waits for what [`all_to_all`](Self::all_to_all) has started: segment r of the wire is what rank r has sent to this one.
    ///
    /// # Errors
    /// Those of the group.
    pub fn arrived(&mut self, crossing: Crossing) -> Result<Wire> {
        let Crossing { first, second, work } = crossing;
        self.wait(work)?;
        let Some(second) = second else { return Ok(first) };
        self.put_back(first);
        Ok(second)
    }

    /// Starts the plain reduction of the gradients in their place, times `scale`: to all, or to each rank its segment.
    ///
    /// # Errors
    /// Those of the group.
    pub fn reduce_in_place(&mut self, scale: f64) -> Result<Work<'static>> {
        self.tag("");
        let everywhere = self.facts.everywhere;
        let bytes = self.len() * self.kind().elt_size_in_bytes();
        *self.sent += self.share(bytes) * if everywhere { 2 } else { 1 };
        match self.memory {
            Memory::Flat(flat, (start, end)) if everywhere => {
                flat.all_reduce(self.group, start..end, Scale(scale))
            }
            Memory::Flat(flat, (start, end)) => {
                flat.reduce_scatter(self.group, start..end, Scale(scale))
            }
            Memory::Wire(wire) => wire.reduce(self.group, scale, everywhere),
        }
    }

    /// Where gradients lie in f32 in memory that the ranks share: as [`reduce_in_place`](Self::reduce_in_place), with each one rounded to
    /// bf16 as it is read, and their mean. Nothing is copied.
    pub(super) fn reduce_as_bf16(&mut self) -> Result<Option<Work<'static>>> {
        let Memory::Flat(flat, (start, end)) = self.memory else { return Ok(None) };
        let is_near = self.group.backend() == Backend::Host && self.group.shares_memory();
        if !is_near || self.kind() != Kind::Float || self.device().is_cuda() {
            return Ok(None);
        }
        self.tag("");
        let everywhere = self.facts.everywhere;
        *self.sent += self.share(self.len() * 2) * if everywhere { 2 } else { 1 };
        flat.reduce_as_bf16(self.group, start..end, (Scale(self.facts.scale), everywhere)).map(Some)
    }

    /// Where gradients in half precision lie in a wire and ranks on several machines: starts to send segment r of them to rank r.
    pub(super) fn cross_in_place(&mut self) -> Result<Option<Work<'static>>> {
        let is_half = matches!(self.kind(), Kind::Half | Kind::BFloat16);
        let is_far = self.group.backend() == Backend::Host && !self.group.shares_memory();
        let Memory::Wire(wire) = self.memory else { return Ok(None) };
        if !is_half || !is_far || self.device().is_cuda() {
            return Ok(None);
        }
        self.tag("to the ranks that add");
        *self.sent += self.share(wire.bytes());
        wire.all_to_all(self.group, None).map(Some)
    }

    /// Starts to send this rank's segment of the wire to all, where all need it.
    pub(super) fn gather_in_place(&mut self) -> Result<Option<Work<'static>>> {
        let Memory::Wire(wire) = self.memory else { return Ok(None) };
        if !self.facts.everywhere {
            return Ok(None);
        }
        self.tag("means");
        *self.sent += self.share(wire.bytes());
        wire.all_gather(self.group).map(Some)
    }

    /// Waits for a collective; on a GPU the current stream does.
    ///
    /// # Errors
    /// Those of the collective.
    pub fn wait(&self, work: Work<'static>) -> Result<()> {
        Ok(work.wait_on(shim::current_stream(self.device())?)?)
    }

    /// The same bucket for a hook inside of this one: with gradients in `wire`, and another factor.
    #[must_use]
    pub(crate) fn over<'b>(&'b mut self, wire: &'b Wire, scale: f64) -> Bucket<'b> {
        Bucket {
            group: &mut *self.group,
            pool: &mut *self.pool,
            sent: &mut *self.sent,
            memory: Memory::Wire(wire),
            facts: Facts { scale, ..self.facts },
        }
    }

    /// The same bucket for a hook inside of this one: with another factor, and with a place for what is lost.
    #[must_use]
    pub(crate) fn losing<'b>(&'b mut self, lost: &'b Tensor, scale: f64) -> Bucket<'b> {
        Bucket {
            group: &mut *self.group,
            pool: &mut *self.pool,
            sent: &mut *self.sent,
            memory: self.memory,
            facts: Facts { scale, lost: Some(lost), ..self.facts },
        }
    }

    /// What a rank sends of a buffer of which each rank keeps one segment.
    fn share(&self, bytes: usize) -> u64 {
        share(bytes, self.world_size())
    }

    fn tag(&mut self, what: &str) {
        match what {
            "" => self.group.tagged(self.facts.tag),
            what => self.group.tagged(&format!("{}, {what}", self.facts.tag)),
        };
    }
}

/// Segments on their way to the ranks they are for.
#[derive(Debug)]
pub struct Crossing {
    first: Wire,
    /// On GPUs: where they arrive.
    second: Option<Wire>,
    work: Work<'static>,
}

/// (P − 1)/P of `bytes`.
pub(super) fn share(bytes: usize, world_size: usize) -> u64 {
    (bytes - bytes / world_size) as u64
}

pub(super) fn as_i64(range: &Range<usize>) -> Result<(i64, i64)> {
    let convert = |value: usize| {
        i64::try_from(value).map_err(|_too_long| crate::Error::TooLarge { elements: value })
    };
    Ok((convert(range.start)?, convert(range.len())?))
}
