//! Collectives of tensors: a [`TensorGroup`] takes and gives tensors where a [`Group`] takes memory.
//!
//! It is what layers stand on that talk to other ranks in their forward and backward: clones of it share one process group, and any
//! thread of this rank may call it, libtorch's backward threads too. Nothing here is differentiable: a custom
//! function ([`crate::autograd`]) calls one collective in its forward and another in its backward.
//!
//! Tensors are copied to registered memory, which is kept for the next call of their kind, and results are tensors of their own. Sums are in rank
//! order: every rank gets the same bits.

mod arrange;
mod message;
mod pending;

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use phalanx_comm::{Group, Work};
use tch::{Device, Kind, Tensor};

pub use message::{MessageCall, Receiving, Sending, StartedMessage};
pub use pending::Pending;

use crate::store::flat::{Flat, Scale};
use crate::{shim, Error, Result};

/// A process group whose collectives take tensors.
///
/// Every rank calls the same collectives with the same shapes in the same order; `tag` names the call (the layer, say), and ranks whose
/// tags differ are out of step. In a group of one rank nothing is copied.
///
/// # Example
/// ```
/// use phalanx_comm::{Group, GroupOptions};
/// use phalanx_ddp_core::collective::TensorGroup;
/// use tch::{Device, Kind, Tensor};
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let group = TensorGroup::new(Group::single(GroupOptions::default())?);
/// let x = Tensor::ones([2, 3], (Kind::Float, Device::Cpu));
/// let sum = group.all_reduce(&x, "example")?; // with n ranks: n everywhere
/// assert_eq!(sum.size(), [2, 3]);
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug)]
pub struct TensorGroup {
    inner: Arc<Mutex<Inner>>,
    rank: usize,
    world_size: usize,
}

#[derive(Debug)]
struct Inner {
    group: Group,
    /// Registered memory that no collective is using.
    free: Vec<Flat>,
}

impl TensorGroup {
    /// Takes a group for itself.
    #[must_use]
    pub fn new(group: Group) -> Self {
        let (rank, world_size) = (group.rank(), group.world_size());
        let inner = Inner { group, free: Vec::new() };
        Self { inner: Arc::new(Mutex::new(inner)), rank, world_size }
    }

    /// This rank in the group.
    #[must_use]
    pub fn rank(&self) -> usize {
        self.rank
    }

    /// How many ranks it has.
    #[must_use]
    pub fn world_size(&self) -> usize {
        self.world_size
    }

    /// The sum over the ranks. Shape and kind (floating point) as `tensor`'s.
    ///
    /// # Errors
    /// [`Error::UnsupportedKind`]; those of the group; libtorch's own.
    pub fn all_reduce(&self, tensor: &Tensor, tag: &str) -> Result<Tensor> {
        self.start_all_reduce(tensor, tag)?.wait()
    }

    /// As [`all_reduce`](Self::all_reduce), which goes on while the caller computes.
    ///
    /// # Errors
    /// As [`all_reduce`](Self::all_reduce).
    pub fn start_all_reduce(&self, tensor: &Tensor, tag: &str) -> Result<Pending> {
        if self.world_size == 1 {
            return Ok(Pending::ready(tensor.f_detach()?));
        }
        let shape = tensor.size();
        let (kind, device, len) = (tensor.kind(), tensor.device(), tensor.numel());
        self.start(
            (kind, device, len),
            tag,
            |flat| copy(&flat.range(&(0..len))?.f_view(shape.as_slice())?, tensor),
            |flat, group| flat.all_reduce(group, 0..len, Scale(1.0)),
            {
                let shape = shape.clone();
                move |flat| Ok(flat.range(&(0..len))?.f_view(shape.as_slice())?.f_detach_copy()?)
            },
        )
    }

    /// The ranks' tensors one behind the other along `dim`, in rank order: shape as `tensor`'s, but `world_size` times as long there. Of any kind.
    ///
    /// # Errors
    /// [`Error::BadInput`] without such a dimension; those of the group; libtorch's own.
    pub fn all_gather(&self, tensor: &Tensor, dim: i64, tag: &str) -> Result<Tensor> {
        self.start_all_gather(tensor, dim, tag)?.wait()
    }

    /// As [`all_gather`](Self::all_gather), which goes on while the caller computes.
    ///
    /// # Errors
    /// As [`all_gather`](Self::all_gather).
    pub fn start_all_gather(&self, tensor: &Tensor, dim: i64, tag: &str) -> Result<Pending> {
        let dim = arrange::dimension(tensor, dim, tag)?;
        if self.world_size == 1 {
            return Ok(Pending::ready(tensor.f_detach()?));
        }
        let (carried, back) = arrange::carried(tensor)?;
        let (rank, world_size, len) = (self.rank, self.world_size, carried.numel());
        let (shape, total) = (carried.size(), len * world_size);
        self.start(
            (carried.kind(), carried.device(), total),
            tag,
            |flat| {
                copy(&flat.range(&(rank * len..(rank + 1) * len))?.f_view_as(&carried)?, &carried)
            },
            |flat, group| flat.all_gather(group, 0..total),
            move |flat| {
                let all = flat.range(&(0..total))?;
                back.undo(&arrange::joined(&all, world_size, &shape, dim)?)
            },
        )
    }

    /// This rank's part of the sum over the ranks: `tensor` is cut into `world_size` equal parts along `dim`, and part r is rank r's.
    ///
    /// # Errors
    /// [`Error::BadInput`] if it cannot be cut so; as [`all_reduce`](Self::all_reduce).
    pub fn reduce_scatter(&self, tensor: &Tensor, dim: i64, tag: &str) -> Result<Tensor> {
        self.start_reduce_scatter(tensor, dim, tag)?.wait()
    }

    /// As [`reduce_scatter`](Self::reduce_scatter), which goes on while the caller computes.
    ///
    /// # Errors
    /// As [`reduce_scatter`](Self::reduce_scatter).
    pub fn start_reduce_scatter(&self, tensor: &Tensor, dim: i64, tag: &str) -> Result<Pending> {
        let dim = arrange::dimension(tensor, dim, tag)?;
        let parts = arrange::parts(tensor, self.world_size, dim, tag)?;
        if self.world_size == 1 {
            return Ok(Pending::ready(tensor.f_detach()?));
        }
        let (rank, total) = (self.rank, tensor.numel());
        let (stacked, part) = (parts.size(), parts.size()[1..].to_vec());
        let len = total / self.world_size;
        self.start(
            (tensor.kind(), tensor.device(), total),
            tag,
            |flat| copy(&flat.range(&(0..total))?.f_view(stacked.as_slice())?, &parts),
            |flat, group| flat.reduce_scatter(group, 0..total, Scale(1.0)),
            move |flat| {
                let mine = flat.range(&(rank * len..(rank + 1) * len))?;
                Ok(mine.f_view(part.as_slice())?.f_detach_copy()?)
            },
        )
    }

    /// Cuts `tensor` into `world_size` equal parts along its first dimension, gives part r to rank r, and returns what came from the ranks, in rank
    /// order: shape and kind (any) as `tensor`'s.
    ///
    /// # Errors
    /// [`Error::BadInput`] if it cannot be cut so; those of the group; libtorch's own.
    pub fn all_to_all(&self, tensor: &Tensor, tag: &str) -> Result<Tensor> {
        self.start_all_to_all(tensor, tag)?.wait()
    }

    /// As [`all_to_all`](Self::all_to_all), which goes on while the caller computes.
    ///
    /// # Errors
    /// As [`all_to_all`](Self::all_to_all).
    pub fn start_all_to_all(&self, tensor: &Tensor, tag: &str) -> Result<Pending> {
        let dim = arrange::dimension(tensor, 0, tag)?;
        arrange::divisible(tensor, self.world_size, dim, tag)?;
        if self.world_size == 1 {
            return Ok(Pending::ready(tensor.f_detach()?));
        }
        let (carried, back) = arrange::carried(tensor)?;
        let (kind, device, total) = (carried.kind(), carried.device(), carried.numel());
        let shape = carried.size();
        let second = match device.is_cuda() {
            true => Some(self.memory((kind, device, total), tag)?),
            false => None,
        };
        let flat = self.memory((kind, device, total), tag)?;
        copy(&flat.range(&(0..total))?.f_view_as(&carried)?, &carried)?;
        // Registered memory may be longer than the message; the call is for all of it.
        let work =
            self.call(&flat, tag, |flat, group| flat.all_to_all_of(group, second.as_ref(), total))?;
        let flats = std::iter::once(flat).chain(second).collect();
        let take =
            move |done: &Flat| back.undo(&done.range(&(0..total))?.f_view(shape.as_slice())?);
        Ok(Pending::started(work, flats, self.clone(), Box::new(take)))
    }

    /// Ends the group: every rank gets an error with this reason.
    pub fn abort(&self, reason: &str) {
        self.lock().group.abort(reason);
    }

    /// The error that ended the group.
    #[must_use]
    pub fn failure(&self) -> Option<Error> {
        self.lock().group.failure().map(Error::from)
    }

    /// Runs `body` with the process group: for small calls of one's own. They are in one order with those of tensors.
    pub fn with_group<T>(&self, body: impl FnOnce(&mut Group) -> T) -> T {
        body(&mut self.lock().group)
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        // A panic in between leaves a group that is still good, or that says what it is.
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn start(
        &self,
        of: (Kind, Device, usize),
        tag: &str,
        fill: impl FnOnce(&Flat) -> Result<()>,
        call: impl FnOnce(&Flat, &mut Group) -> Result<Work<'static>>,
        take: impl FnOnce(&Flat) -> Result<Tensor> + Send + 'static,
    ) -> Result<Pending> {
        let flat = self.memory(of, tag)?;
        fill(&flat)?;
        let work = self.call(&flat, tag, call)?;
        Ok(Pending::started(work, vec![flat], self.clone(), Box::new(take)))
    }

    fn call(
        &self,
        flat: &Flat,
        tag: &str,
        call: impl FnOnce(&Flat, &mut Group) -> Result<Work<'static>>,
    ) -> Result<Work<'static>> {
        let stream = shim::current_stream(flat.device())?;
        let group = &mut self.lock().group;
        group.set_stream(stream);
        group.tagged(tag);
        call(flat, group)
    }

    /// Registered memory of at least so many elements. Collective where there is none: the ranks call alike, so that all have it or none.
    fn memory(&self, (kind, device, len): (Kind, Device, usize), tag: &str) -> Result<Flat> {
        let inner = &mut *self.lock();
        let is_alike = |flat: &Flat| flat.kind() == kind && flat.device() == device;
        let fitting =
            inner.free.iter().enumerate().filter(|(_, flat)| is_alike(flat) && flat.len() >= len);
        if let Some((at, _)) = fitting.min_by_key(|(_, flat)| flat.len()) {
            return Ok(inner.free.swap_remove(at));
        }
        // What is too small now was big enough before: it makes room.
        inner.free.retain(|flat| !is_alike(flat));
        inner.group.tagged(tag);
        Flat::registered(&mut inner.group, kind, device, len)
    }

    /// Memory that a collective has done with.
    fn give_back(&self, flats: Vec<Flat>) {
        self.lock().free.extend(flats);
    }
}

fn copy(target: &Tensor, source: &Tensor) -> Result<()> {
    let mut target = target.shallow_clone();
    Ok(tch::no_grad(|| target.f_copy_(&source.f_detach()?).map(drop))?)
}
