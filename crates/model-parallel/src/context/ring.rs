//! Keys and values go round; queries stay.
//!
//! In n steps each rank meets the keys and values of all n, from its own on backwards; n − 1 times it sends on what it has to the next rank while it computes with it. The backward sends them round
//! once more and, behind them, the sums of their gradients, which each rank adds to: n times, so that they end where they belong. Probabilities are computed again from the saved
//! log-sum-exp. Sums are in the order of the ring, the same every time.

use phalanx_ddp_core::autograd::Function;
use phalanx_ddp_core::collective::{Receiving, Sending, TensorGroup};
use phalanx_ddp_core::Result as DdpResult;
use tch::Tensor;

use super::block::{self, Attended, Drops, Queries, Scores};
use super::pieces::Piece;
use super::{Order, Sequence};
use crate::error::{Error, Result};
use crate::layer::Pass;
use crate::tensor::{run, Attend, AttentionDropout, Places};

/// Attention over sequences that are cut over ranks, by a ring.
///
/// # Example
/// ```
/// use phalanx_comm::{Group, GroupOptions};
/// use phalanx_ddp_core::collective::TensorGroup;
/// use phalanx_model_parallel::context::{Order, RingAttention, Sequence};
/// use tch::{Device, Kind, Tensor};
///
/// let cp = TensorGroup::new(Group::single(GroupOptions::default())?); // or the mesh's group of Axes::CP
/// let attention = RingAttention::new("h.0.attn", Sequence::new(cp, Order::Balanced), true);
/// let random = |heads| Tensor::randn([1, heads, 6, 16], (Kind::Float, Device::Cpu));
/// let (q, k, v) = (random(4), random(2), random(2)); // two heads of queries for each of keys
/// assert_eq!(attention.attend(&q, &k, &v)?.size(), [1, 4, 6, 16]);
/// # Ok::<(), phalanx_model_parallel::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct RingAttention {
    name: String,
    sequence: Sequence,
    is_causal: bool,
    dropout: Option<AttentionDropout>,
}

impl RingAttention {
    /// `name` is the layer's, for errors and calls.
    #[must_use]
    pub fn new(name: &str, sequence: Sequence, is_causal: bool) -> Self {
        Self { name: name.to_owned(), sequence, is_causal, dropout: None }
    }

    /// Drops probabilities in training, the same as one rank would with all tokens ([`Attention::dropout`](crate::tensor::Attention::dropout)).
    #[must_use]
    pub fn with_dropout(self, dropout: Option<AttentionDropout>) -> Self {
        Self { dropout, ..self }
    }

    /// `q` `[batch, heads, tokens, head_dim]`, `k` and `v` `[batch, kv heads, tokens, head_dim]` of this rank's tokens → the output, as `q`. Scores are divided by √`head_dim`. Collective, and so is the backward.
    ///
    /// Computes in f32 (f64 for inputs in f64), and rounds the output once. Besides inputs and output it has one block of keys and values that comes while another is used, and 16 MiB of
    /// scores or those of one query of each head; a backward has their gradients in f32 as well.
    ///
    /// # Errors
    /// [`Error::BadInput`] before anything is sent; those of the group; libtorch's own.
    pub fn attend(&self, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Tensor> {
        Attend::attend(self, q, k, v, &Pass::evaluation())
    }

    fn in_turn([q, k, v]: [&Tensor; 3], turn: Turn) -> Result<Tensor> {
        let mut outputs = Function::new("ring attention").apply(
            &[q, k, v],
            |saving, inputs| {
                let queries = inputs[0];
                let Attended { output, lse } = turn.forward(queries, inputs[1], inputs[2])?;
                let output = output.f_view(queries.size().as_slice())?.f_to_kind(queries.kind())?;
                for tensor in inputs.iter().copied().chain([&output, &lse]) {
                    saving.save(tensor);
                }
                Ok((vec![output], turn))
            },
            |backward, gradients| {
                let [own @ .., output, lse] = &backward.saved[..] else {
                    return Err(phalanx_ddp_core::Error::BackwardAbandoned);
                };
                // Other ranks wait for this one, whether its outputs were used or not.
                let gradient = match &gradients[0] {
                    Some(gradient) => gradient.shallow_clone(),
                    None => output.f_zeros_like()?,
                };
                let all = backward.state.backward(own, [output, lse, &gradient])?;
                Ok(all.into_iter().map(Some).collect())
            },
        )?;
        outputs.pop().ok_or_else(|| phalanx_ddp_core::Error::BackwardAbandoned.into())
    }
}

impl Attend for RingAttention {
    fn is_causal(&self) -> bool {
        self.is_causal
    }

    fn dropout(&self) -> Option<AttentionDropout> {
        self.dropout
    }

    fn attend(&self, q: &Tensor, k: &Tensor, v: &Tensor, pass: &Pass) -> Result<Tensor> {
        let scale = check(&self.name, [q, k, v])?;
        let dropout = self.dropout.filter(|_| pass.train);
        if self.sequence.ranks() == 1 {
            return plain([q, k, v], self.is_causal, (dropout, pass));
        }
        let tokens = q.size()[2];
        let chunks = self.sequence.order().chunks_each();
        if tokens % chunks != 0 {
            return Err(Error::BadInput {
                layer: self.name.clone(),
                actual: format!("{tokens} tokens on a rank"),
                expected: format!("a multiple of {chunks}, as Sequence::cut gives it"),
            });
        }
        let turn = Turn {
            name: self.name.clone(),
            group: self.sequence.group().clone(),
            order: self.sequence.order(),
            chunk: tokens / chunks,
            scores: Scores { scale, is_causal: self.is_causal },
            drops: dropout.map(|dropout| (dropout, *pass)),
        };
        Self::in_turn([q, k, v], turn)
    }
}

/// Attention of one rank that has all tokens, by libtorch.
pub(super) fn plain(
    [q, k, v]: [&Tensor; 3],
    is_causal: bool,
    (dropout, pass): (Option<AttentionDropout>, &Pass),
) -> Result<Tensor> {
    if let Some(dropout) = dropout {
        let tokens = run(0, q.size()[2]);
        return dropout.attend([q, k, v], is_causal, (pass, &tokens));
    }
    let is_grouped = q.size()[1] != k.size()[1];
    let mask = None::<&Tensor>;
    Ok(Tensor::f_scaled_dot_product_attention(q, k, v, mask, 0.0, is_causal, None, is_grouped)?)
}

/// An error unless shapes belong together; the scale of scores.
#[expect(clippy::cast_precision_loss, reason = "heads have few dimensions")]
pub(super) fn check(layer: &str, [q, k, v]: [&Tensor; 3]) -> Result<f64> {
    let shapes = [q.size(), k.size(), v.size()];
    let [of_q, of_k, of_v] = &shapes;
    let is_alike = of_q.len() == 4
        && of_k.len() == 4
        && of_k == of_v
        && of_q[0] == of_k[0]
        && of_q[2..] == of_k[2..]
        && of_k[1] > 0
        && of_q[1] % of_k[1] == 0;
    let kinds = [q.kind(), k.kind(), v.kind()];
    if is_alike && kinds[0] == kinds[1] && kinds[1] == kinds[2] {
        return Ok(1.0 / (of_q[3] as f64).sqrt());
    }
    Err(Error::BadInput {
        layer: layer.to_owned(),
        actual: format!("queries {of_q:?}, keys {of_k:?} and values {of_v:?} of kinds {kinds:?}"),
        expected: "[batch, heads, tokens, head_dim] of one kind, with as many heads of keys as of values and a multiple of that of queries"
            .to_owned(),
    })
}

/// One attention over the ring.
#[derive(Debug)]
struct Turn {
    name: String,
    group: TensorGroup,
    order: Order,
    /// Tokens of a chunk.
    chunk: i64,
    scores: Scores,
    /// What is dropped, in training.
    drops: Option<(AttentionDropout, Pass)>,
}

/// A tensor that goes to the next rank, and the one that comes from the rank before.
struct Passing {
    sending: Vec<Sending>,
    receiving: Vec<Receiving>,
}

impl Passing {
    fn wait(self) -> DdpResult<Tensor> {
        let came = self.receiving.into_iter().next().map(Receiving::wait);
        self.sending.into_iter().try_for_each(Sending::wait)?;
        came.unwrap_or(Err(phalanx_ddp_core::Error::BackwardAbandoned))
    }
}

impl Turn {
    fn forward(&self, q: &Tensor, k: &Tensor, v: &Tensor) -> DdpResult<Attended> {
        let kind = block::computed_in(q.kind());
        let q = grouped(&q.f_to_kind(kind)?, k.size()[1])?;
        let mut held = Tensor::f_stack(&[k, v], 0)?;
        let mut sum: Option<Attended> = None;
        for step in 0..self.ranks() {
            let next = self.pass_on(&held, step, "keys and values")?;
            let all = held.f_to_kind(kind)?;
            for piece in self.pieces(step) {
                let [queries, keys] = self.tokens(&piece);
                let [some_k, some_v] = halves(&all.f_narrow(3, keys.0, keys.1)?)?;
                let scores = Scores { is_causal: piece.is_causal, ..self.scores };
                let some_q = q.f_narrow(3, queries.0, queries.1)?;
                let drops = self.drops(step, &piece);
                let both = [&some_k, &some_v];
                let attended = block::forward(&some_q, both, scores, drops.as_ref())?;
                match &mut sum {
                    Some(sum) => sum.add(queries.0, &attended)?,
                    // The first are the rank's own keys, which all of its queries meet.
                    None => sum = Some(attended),
                }
            }
            if let Some(next) = next {
                held = next.wait()?;
            }
        }
        sum.ok_or(phalanx_ddp_core::Error::BackwardAbandoned)
    }

    /// The gradients of q, k and v.
    fn backward(
        &self,
        own: &[Tensor],
        [output, lse, gradient]: [&Tensor; 3],
    ) -> DdpResult<Vec<Tensor>> {
        let [q, k, v] = own else { return Err(phalanx_ddp_core::Error::BackwardAbandoned) };
        let (kind, heads) = (block::computed_in(q.kind()), k.size()[1]);
        let by_heads = |tensor: &Tensor| grouped(&tensor.f_to_kind(kind)?, heads);
        let (grouped_q, gradient) = (by_heads(q)?, by_heads(gradient)?);
        let delta = by_heads(output)?.f_mul(&gradient)?.f_sum_dim_intlist(
            [-1_i64].as_slice(),
            true,
            None,
        )?;
        let of_q = grouped_q.f_zeros_like()?;
        let all = Queries { q: grouped_q, lse: lse.shallow_clone(), gradient, delta };
        let mut held = Tensor::f_stack(&[k, v], 0)?;
        let mut coming: Option<Passing> = None;
        for step in 0..self.ranks() {
            let next = self.pass_on(&held, step, "keys and values, backward")?;
            let both = held.f_to_kind(kind)?;
            let added = both.f_zeros_like()?;
            for piece in self.pieces(step) {
                self.add_piece((step, &piece), &all, &both, (&of_q, &added))?;
            }
            // What those before have added came meanwhile.
            let sum = match coming {
                Some(coming) => coming.wait()?.f_add(&added)?,
                None => added,
            };
            coming = Some(self.exchange(&sum, "their gradients")?);
            if let Some(next) = next {
                held = next.wait()?;
            }
        }
        let home = coming.ok_or(phalanx_ddp_core::Error::BackwardAbandoned)?.wait()?;
        let [of_k, of_v] = halves(&home)?;
        let of_q = of_q.f_view(q.size().as_slice())?.f_to_kind(q.kind())?;
        Ok(vec![of_q, of_k.f_to_kind(k.kind())?, of_v.f_to_kind(v.kind())?])
    }

    /// Adds a piece's gradients to those of queries, and of keys and values.
    fn add_piece(
        &self,
        (step, piece): (i64, &Piece),
        all: &Queries,
        held: &Tensor,
        (of_q, of_held): (&Tensor, &Tensor),
    ) -> DdpResult<()> {
        let [queries, keys] = self.tokens(piece);
        let of_queries = |tensor: &Tensor| tensor.f_narrow(3, queries.0, queries.1);
        let of_keys = |tensor: &Tensor| tensor.f_narrow(3, keys.0, keys.1);
        let some = Queries {
            q: of_queries(&all.q)?,
            lse: of_queries(&all.lse)?,
            gradient: of_queries(&all.gradient)?,
            delta: of_queries(&all.delta)?,
        };
        let [k, v] = halves(&of_keys(held)?)?;
        let scores = Scores { is_causal: piece.is_causal, ..self.scores };
        let drops = self.drops(step, piece);
        let (added_q, added_k, added_v) = block::backward(&some, [&k, &v], scores, drops.as_ref())?;
        block::add(of_queries(of_q)?, &added_q)?;
        block::add(of_keys(of_held)?, &Tensor::f_stack(&[added_k, added_v], 0)?)
    }

    fn ranks(&self) -> i64 {
        i64::try_from(self.group.world_size()).unwrap_or(i64::MAX)
    }

    /// This rank, and whose keys it has in this step.
    fn meeting(&self, step: i64) -> (i64, i64) {
        let (rank, ranks) = (i64::try_from(self.group.rank()).unwrap_or(0), self.ranks());
        (rank, (rank + ranks - step) % ranks)
    }

    /// What there is to compute in this step.
    fn pieces(&self, step: i64) -> Vec<Piece> {
        self.order.pieces(self.meeting(step), self.ranks(), self.scores.is_causal)
    }

    /// What is dropped of a piece of this step.
    fn drops(&self, step: i64, piece: &Piece) -> Option<Drops> {
        let (dropout, pass) = self.drops?;
        let (rank, owner) = self.meeting(step);
        let places = |of: i64, chunks: &std::ops::Range<i64>| -> Places {
            let of_rank = (0..).zip(self.order.chunks(of, self.ranks()));
            let own = of_rank.filter(|(at, _)| chunks.contains(at));
            own.map(|(_, chunk)| chunk * self.chunk..(chunk + 1) * self.chunk).collect()
        };
        let (queries, keys) = (places(rank, &piece.queries), places(owner, &piece.keys));
        Some(Drops { dropout, pass, queries, keys })
    }

    /// A piece's queries and keys: where they begin, and how many.
    fn tokens(&self, piece: &Piece) -> [(i64, i64); 2] {
        let run = |chunks: &std::ops::Range<i64>| {
            (chunks.start * self.chunk, (chunks.end - chunks.start) * self.chunk)
        };
        [run(&piece.queries), run(&piece.keys)]
    }

    /// Sends what this rank holds on, if the next has not had it yet.
    fn pass_on(&self, held: &Tensor, step: i64, what: &str) -> DdpResult<Option<Passing>> {
        match step + 1 < self.ranks() {
            true => Ok(Some(self.exchange(held, what)?)),
            false => Ok(None),
        }
    }

    fn exchange(&self, tensor: &Tensor, what: &str) -> DdpResult<Passing> {
        let (rank, ranks) = (self.group.rank(), self.group.world_size());
        let shape = tensor.size();
        let sends = [(tensor, (rank + 1) % ranks)];
        let receives = [(shape.as_slice(), (rank + ranks - 1) % ranks)];
        let tag = format!("{}: {what}", self.name);
        let at = (tensor.kind(), tensor.device());
        let (sending, receiving) = self.group.start_messages(&sends, &receives, at, &tag)?;
        Ok(Passing { sending, receiving })
    }
}

/// `[batch, heads, tokens, n]` → `[batch, kv heads, group, tokens, n]`.
fn grouped(queries: &Tensor, kv_heads: i64) -> DdpResult<Tensor> {
    let shape = queries.size();
    let split = [shape[0], kv_heads, shape[1] / kv_heads, shape[2], shape[3]];
    Ok(queries.f_reshape(split)?)
}

/// Keys and values that stand one behind the other.
fn halves(both: &Tensor) -> DdpResult<[Tensor; 2]> {
    Ok([both.f_select(0, 0)?, both.f_select(0, 1)?])
}
