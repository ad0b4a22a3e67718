//! Which tokens of a sequence a rank has, and how they come together again.

use phalanx_ddp_core::collective::TensorGroup;
use tch::{Device, Kind, Tensor};

use super::Order;
use crate::error::{Error, Result};
use crate::layer::Tokens;

/// Sequences that are cut over a group of ranks. Clones share the group.
///
/// # Example
/// ```
/// use phalanx_comm::{Group, GroupOptions};
/// use phalanx_ddp_core::collective::TensorGroup;
/// use phalanx_model_parallel::context::{Order, Sequence};
/// use tch::Tensor;
///
/// let cp = TensorGroup::new(Group::single(GroupOptions::default())?); // or the mesh's group of Axes::CP
/// let sequence = Sequence::new(cp, Order::Balanced);
/// let ids = Tensor::from_slice(&[5_i64, 3, 1, 4]).unsqueeze(0);
/// let mine = sequence.cut(&ids, 1)?; // of 2 ranks the first would have 5 and 4
/// assert_eq!(mine.size(), [1, 4]);
/// assert_eq!(Vec::<i64>::try_from(sequence.positions(4)?)?, [0, 1, 2, 3]);
/// assert!(sequence.join(&mine, 1)?.equal(&ids));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug)]
pub struct Sequence {
    group: TensorGroup,
    order: Order,
}

impl Sequence {
    /// Sequences over the ranks of `group`.
    #[must_use]
    pub fn new(group: TensorGroup, order: Order) -> Self {
        Self { group, order }
    }

    /// The ranks.
    #[must_use]
    pub fn group(&self) -> &TensorGroup {
        &self.group
    }

    /// Which of them has which tokens.
    #[must_use]
    pub(crate) fn order(&self) -> Order {
        self.order
    }

    pub(super) fn ranks(&self) -> i64 {
        i64::try_from(self.group.world_size()).unwrap_or(i64::MAX)
    }

    pub(super) fn rank(&self) -> i64 {
        i64::try_from(self.group.rank()).unwrap_or(0)
    }

    /// This rank's tokens of `tensor`, which has all of them in dimension `dim`: ids, targets, positions. Differentiable; a view or a copy.
    ///
    /// # Errors
    /// [`Error::BadInput`] for a length that cannot be cut, with the nearest that can; libtorch's own.
    pub fn cut(&self, tensor: &Tensor, dim: i64) -> Result<Tensor> {
        let len = length(tensor, dim)?;
        let chunk = self.chunk(len)?;
        if self.ranks() == 1 {
            return Ok(tensor.shallow_clone());
        }
        let chunks = self.order.chunks(self.rank(), self.ranks());
        let parts: std::result::Result<Vec<Tensor>, _> =
            chunks.iter().map(|at| tensor.f_narrow(dim, at * chunk, chunk)).collect();
        Ok(Tensor::f_cat(&parts?, dim)?)
    }

    /// `[len / ranks]`, i64, on the host: where this rank's tokens are in sequences of `len` tokens.
    ///
    /// # Errors
    /// As [`cut`](Self::cut).
    pub fn positions(&self, len: i64) -> Result<Tensor> {
        self.cut(&Tensor::f_arange(len, (Kind::Int64, Device::Cpu))?, 0)
    }

    /// This rank's tokens of sequences of `len`, as layers know them ([`Pass::tokens`](crate::layer::Pass::tokens)).
    ///
    /// # Errors
    /// As [`cut`](Self::cut).
    pub fn tokens(&self, len: i64) -> Result<Tokens> {
        let chunk = self.chunk(len)?;
        if self.ranks() == 1 {
            return Ok(Tokens::default());
        }
        let chunks = self.order.chunks(self.rank(), self.ranks());
        Tokens::of(&chunks.iter().map(|at| at * chunk..(at + 1) * chunk).collect::<Vec<_>>())
    }

    /// All ranks' tokens, in the order of the sequence, from each rank's own in dimension `dim`. Collective; not differentiable.
    ///
    /// # Errors
    /// [`Error::BadInput`]; those of the group; libtorch's own.
    pub fn join(&self, tensor: &Tensor, dim: i64) -> Result<Tensor> {
        let len = length(tensor, dim)? * self.ranks();
        self.chunk(len)?;
        let gathered = self.group.all_gather(tensor, dim, "tokens of a sequence")?;
        match self.places(len)? {
            None => Ok(gathered),
            Some(places) => {
                Ok(gathered.f_index_select(dim, &places.f_to_device(tensor.device())?)?)
            }
        }
    }

    /// By position in the sequence, where its token is when the ranks' are one behind the other; `None` where it is there already.
    pub(super) fn places(&self, len: i64) -> Result<Option<Tensor>> {
        if self.ranks() == 1 || self.order == Order::Consecutive {
            return Ok(None);
        }
        Ok(Some(self.gathered_positions(len)?.f_argsort(0, false)?))
    }

    /// The positions of the ranks' tokens one behind the other.
    pub(super) fn gathered_positions(&self, len: i64) -> Result<Tensor> {
        let chunk = self.chunk(len)?;
        let chunks = (0..self.ranks()).flat_map(|rank| self.order.chunks(rank, self.ranks()));
        let positions: Vec<i64> = chunks.flat_map(|at| at * chunk..(at + 1) * chunk).collect();
        Ok(Tensor::f_from_slice(&positions)?)
    }

    /// The tokens of a chunk of sequences of `len`.
    fn chunk(&self, len: i64) -> Result<i64> {
        let chunks = self.ranks() * self.order.chunks_each();
        if self.ranks() == 1 || len % chunks == 0 {
            return Ok(len / chunks);
        }
        let below = len / chunks * chunks;
        let near = if below > 0 { format!("{below} or ") } else { String::new() };
        Err(Error::BadInput {
            layer: "context parallelism".to_owned(),
            actual: format!("a sequence of {len} tokens for {} ranks", self.ranks()),
            expected: format!("a multiple of {chunks}, as {near}{} is", below + chunks),
        })
    }
}

fn length(tensor: &Tensor, dim: i64) -> Result<i64> {
    let shape = tensor.size();
    let counted = if dim < 0 { dim + i64::try_from(shape.len()).unwrap_or(0) } else { dim };
    let len = usize::try_from(counted).ok().and_then(|at| shape.get(at).copied());
    len.ok_or_else(|| Error::BadInput {
        layer: "context parallelism".to_owned(),
        actual: format!("a tensor of shape {shape:?}"),
        expected: format!("one with a dimension {dim}"),
    })
}
