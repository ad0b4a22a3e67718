//! All tokens of some heads, instead of some tokens of all.
//!
//! Two all-to-alls forward and two backward: queries, keys and values together, and outputs. Between them attention is libtorch's own.

use phalanx_ddp_core::autograd::Function;
use phalanx_ddp_core::collective::{Pending, TensorGroup};
use phalanx_ddp_core::Result as DdpResult;
use tch::Tensor;

use super::ring::{check, plain};
use super::Sequence;
use crate::error::{Error, Result};
use crate::layer::Pass;
use crate::mesh::Axis;
use crate::tensor::{Attend, AttentionDropout};

/// Attention over sequences that are cut over ranks, each of which computes some heads.
///
/// # Example
/// ```
/// use phalanx_comm::{Group, GroupOptions};
/// use phalanx_ddp_core::collective::TensorGroup;
/// use phalanx_model_parallel::context::{HeadsAttention, Order, Sequence};
/// use tch::{Device, Kind, Tensor};
///
/// let cp = TensorGroup::new(Group::single(GroupOptions::default())?); // or the mesh's group of Axes::CP
/// let attention = HeadsAttention::new("h.0.attn", Sequence::new(cp, Order::Consecutive), true);
/// let random = || Tensor::randn([1, 4, 6, 16], (Kind::Float, Device::Cpu));
/// assert_eq!(attention.attend(&random(), &random(), &random())?.size(), [1, 4, 6, 16]);
/// # Ok::<(), phalanx_model_parallel::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct HeadsAttention {
    name: String,
    sequence: Sequence,
    is_causal: bool,
    dropout: Option<AttentionDropout>,
}

impl HeadsAttention {
    /// `name` is the layer's, for errors and calls. Any order of tokens is right; [`Consecutive`](super::Order::Consecutive) is not put in order on the way.
    #[must_use]
    pub fn new(name: &str, sequence: Sequence, is_causal: bool) -> Self {
        Self { name: name.to_owned(), sequence, is_causal, dropout: None }
    }

    /// As [`RingAttention::with_dropout`](super::RingAttention::with_dropout). Matrices of all scores of the rank's heads are in memory then.
    #[must_use]
    pub fn with_dropout(self, dropout: Option<AttentionDropout>) -> Self {
        Self { dropout, ..self }
    }

    /// As [`RingAttention::attend`](super::RingAttention::attend); the kernel is libtorch's, in the inputs' kind.
    ///
    /// # Errors
    /// [`Error::Indivisible`] where ranks do not divide heads, those of queries or of keys, with the sizes of `cp` that do; [`Error::BadInput`]; those of the group; libtorch's own.
    pub fn attend(&self, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Tensor> {
        Attend::attend(self, q, k, v, &Pass::evaluation())
    }

    fn check_heads(&self, heads: i64, kv_heads: i64) -> Result<()> {
        let divides = |ranks: usize, len: i64| i64::try_from(ranks).is_ok_and(|n| len % n == 0);
        let ranks = self.sequence.group().world_size();
        let (what, len) = match (divides(ranks, heads), divides(ranks, kv_heads)) {
            (true, true) => return Ok(()),
            (false, _) => ("heads", heads),
            (true, false) => ("heads of keys and values", kv_heads),
        };
        let most = usize::try_from(kv_heads).unwrap_or(1);
        let possible = (1..=most).filter(|&n| divides(n, heads) && divides(n, kv_heads)).collect();
        Err(Error::Indivisible {
            layer: self.name.clone(),
            what,
            len,
            axis: Axis::Cp,
            ranks,
            possible,
        })
    }

    /// `tokens` are a rank's.
    fn turn(&self, tokens: i64) -> Result<Turn> {
        let ranks = self.sequence.ranks();
        let places = self.sequence.places(tokens * ranks)?;
        let positions = match &places {
            Some(_) => Some(self.sequence.gathered_positions(tokens * ranks)?),
            None => None,
        };
        let group = self.sequence.group().clone();
        Ok(Turn { name: self.name.clone(), group, ranks, places, positions })
    }
}

impl Attend for HeadsAttention {
    fn is_causal(&self) -> bool {
        self.is_causal
    }

    fn dropout(&self) -> Option<AttentionDropout> {
        self.dropout
    }

    fn attend(&self, q: &Tensor, k: &Tensor, v: &Tensor, pass: &Pass) -> Result<Tensor> {
        check(&self.name, [q, k, v])?;
        let mut dropout = self.dropout.filter(|_| pass.train);
        if self.sequence.ranks() == 1 {
            return plain([q, k, v], self.is_causal, (dropout, pass));
        }
        self.check_heads(q.size()[1], k.size()[1])?;
        let turn = self.turn(q.size()[2])?;
        let [all_q, all_k, all_v] = turn.to_heads([q, k, v])?;
        if let Some(dropout) = &mut dropout {
            dropout.first_head += self.sequence.rank() * all_q.size()[1];
        }
        let all = [&all_q, &all_k, &all_v];
        Ok(turn.to_tokens(&plain(all, self.is_causal, (dropout, pass))?)?)
    }
}

/// What an exchange there and back needs to know.
#[derive(Debug)]
struct Turn {
    name: String,
    group: TensorGroup,
    ranks: i64,
    /// By position in the sequence: its place among gathered tokens.
    places: Option<Tensor>,
    /// By place: its position.
    positions: Option<Tensor>,
}

impl Clone for Turn {
    fn clone(&self) -> Self {
        Self {
            name: self.name.clone(),
            group: self.group.clone(),
            ranks: self.ranks,
            places: self.places.as_ref().map(Tensor::shallow_clone),
            positions: self.positions.as_ref().map(Tensor::shallow_clone),
        }
    }
}

impl Turn {
    /// Queries, keys and values of own tokens → of own heads.
    fn to_heads(&self, own: [&Tensor; 3]) -> DdpResult<[Tensor; 3]> {
        let (there, back) = (self.clone(), self.clone());
        let outputs = Function::new("heads of all tokens").apply(
            &own,
            move |_, inputs| {
                let outputs = there.tokens_together(inputs, "queries, keys and values")?;
                let like = outputs.iter().map(|o| (o.size(), (o.kind(), o.device()))).collect();
                Ok((outputs, like))
            },
            move |backward, gradients| {
                let whole = defined(gradients, backward.state)?;
                let whole: Vec<&Tensor> = whole.iter().collect();
                let all = back.heads_together(&whole, "gradients of q, k and v")?;
                Ok(all.into_iter().map(Some).collect())
            },
        )?;
        <[Tensor; 3]>::try_from(outputs)
            .map_err(|_three| phalanx_ddp_core::Error::BackwardAbandoned)
    }

    /// Outputs of own heads → of own tokens.
    fn to_tokens(&self, output: &Tensor) -> DdpResult<Tensor> {
        let (there, back) = (self.clone(), self.clone());
        let mut outputs = Function::new("tokens of all heads").apply(
            &[output],
            move |_, inputs| {
                let outputs = there.heads_together(inputs, "outputs")?;
                let like = outputs.iter().map(|o| (o.size(), (o.kind(), o.device()))).collect();
                Ok((outputs, like))
            },
            move |backward, gradients| {
                let whole = defined(gradients, backward.state)?;
                let whole: Vec<&Tensor> = whole.iter().collect();
                let all = back.tokens_together(&whole, "gradients of outputs")?;
                Ok(all.into_iter().map(Some).collect())
            },
        )?;
        outputs.pop().ok_or(phalanx_ddp_core::Error::BackwardAbandoned)
    }

    /// `[batch, heads, tokens / n, d]` → `[batch, heads / n, tokens, d]`.
    fn tokens_together(&self, tensors: &[&Tensor], what: &str) -> DdpResult<Vec<Tensor>> {
        let start = |tensor: &&Tensor| {
            let shape = tensor.size();
            let split = [shape[0], self.ranks, shape[1] / self.ranks, shape[2], shape[3]];
            self.start(&tensor.f_detach()?.f_reshape(split)?.f_movedim_int(1, 0)?, what)
        };
        let started: Vec<Pending> = tensors.iter().map(start).collect::<DdpResult<_>>()?;
        let finish = |pending: Pending| {
            // [n, batch, heads / n, tokens / n, d], by whose tokens they are.
            let tokens = pending.wait()?.f_movedim_int(0, 2)?.f_flatten(2, 3)?;
            reordered(&tokens, self.places.as_ref())
        };
        started.into_iter().map(finish).collect()
    }

    /// `[batch, heads / n, tokens, d]` → `[batch, heads, tokens / n, d]`.
    fn heads_together(&self, tensors: &[&Tensor], what: &str) -> DdpResult<Vec<Tensor>> {
        let start = |tensor: &&Tensor| {
            let tokens = reordered(&tensor.f_detach()?, self.positions.as_ref())?;
            let shape = tokens.size();
            let split = [shape[0], shape[1], self.ranks, shape[2] / self.ranks, shape[3]];
            self.start(&tokens.f_reshape(split)?.f_movedim_int(2, 0)?, what)
        };
        let started: Vec<Pending> = tensors.iter().map(start).collect::<DdpResult<_>>()?;
        // [n, batch, heads / n, tokens / n, d], by whose heads they were.
        let finish = |pending: Pending| Ok(pending.wait()?.f_movedim_int(0, 1)?.f_flatten(1, 2)?);
        started.into_iter().map(finish).collect()
    }

    fn start(&self, parts: &Tensor, what: &str) -> DdpResult<Pending> {
        self.group.start_all_to_all(parts, &format!("{}: {what}", self.name))
    }
}

/// Tokens (dimension 2) in another order.
fn reordered(tensor: &Tensor, order: Option<&Tensor>) -> DdpResult<Tensor> {
    match order {
        Some(order) => Ok(tensor.f_index_select(2, &order.f_to_device(tensor.device())?)?),
        None => Ok(tensor.shallow_clone()),
    }
}

/// Shape, kind and device of each output, for the zeros that stand in for a gradient that nobody has made.
type Like = Vec<(Vec<i64>, (tch::Kind, tch::Device))>;

/// Gradients, and zeros where there is none: other ranks wait for them all the same.
fn defined(gradients: &[Option<Tensor>], like: &Like) -> DdpResult<Vec<Tensor>> {
    let one = |(gradient, (shape, at)): (&Option<Tensor>, &(Vec<i64>, _))| match gradient {
        Some(gradient) => Ok(gradient.shallow_clone()),
        None => Ok(Tensor::f_zeros(shape.as_slice(), *at)?),
    };
    gradients.iter().zip(like).map(one).collect()
}
