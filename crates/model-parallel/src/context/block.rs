//! Attention of some queries to some keys, with what it takes to add it to that of others: the log-sum-exp of each query's scores.
//!
//! In f32 (f64 for inputs in f64), a few rows at a time, so that no matrix of all scores exists. Heads of queries that share their keys and values are rows of one product.
//!
//! # Source
//! Dao 2023, "FlashAttention-2": algorithms 1 and 2.

use phalanx_ddp_core::{amp, Result};
use tch::{Kind, Tensor};

use crate::layer::{Pass, Tokens};
use crate::tensor::{AttentionDropout, Places};

/// Scores that are in memory at once, in elements: 16 MiB in f32.
const SCORES_MAX: i64 = 4 << 20;

/// What scores are multiplied by, and whether a query meets keys up to its own place alone.
#[derive(Clone, Copy, Debug)]
pub(super) struct Scores {
    pub(super) scale: f64,
    pub(super) is_causal: bool,
}

/// What is dropped of a block's probabilities: where its queries and keys are in the sequence.
#[derive(Debug)]
pub(super) struct Drops {
    pub(super) dropout: AttentionDropout,
    pub(super) pass: Pass,
    pub(super) queries: Places,
    pub(super) keys: Places,
}

/// Outputs of queries and the log-sum-exp of their scores: `[batch, kv heads, group, queries, head_dim]` and `[…, queries, 1]`.
#[derive(Debug)]
pub(super) struct Attended {
    pub(super) output: Tensor,
    pub(super) lse: Tensor,
}

/// What a backward needs of queries besides keys: all `[batch, kv heads, group, queries, …]`.
#[derive(Debug)]
pub(super) struct Queries {
    pub(super) q: Tensor,
    /// Over all keys, `[…, 1]`.
    pub(super) lse: Tensor,
    /// Gradients of outputs.
    pub(super) gradient: Tensor,
    /// Σ gradient · output, `[…, 1]`.
    pub(super) delta: Tensor,
}

/// In which kind attention of inputs of `kind` is computed.
pub(super) fn computed_in(kind: Kind) -> Kind {
    if kind == Kind::Double {
        Kind::Double
    } else {
        Kind::Float
    }
}

/// `q` `[batch, kv heads, group, queries, head_dim]`, `k` and `v` `[batch, kv heads, keys, head_dim]`, all of the kind that is computed in.
pub(super) fn forward(
    q: &Tensor,
    both: [&Tensor; 2],
    scores: Scores,
    drops: Option<&Drops>,
) -> Result<Attended> {
    // What the backward computes again without autocast has to be the same.
    amp::without_autocast(q.device(), || attend(q, both, scores, drops))?
}

fn attend(
    q: &Tensor,
    [k, v]: [&Tensor; 2],
    scores: Scores,
    drops: Option<&Drops>,
) -> Result<Attended> {
    let (mut outputs, mut sums) = (Vec::new(), Vec::new());
    for (start, len) in runs(q, k) {
        let rows = Rows::of(q, (start, len), k, scores)?;
        let v = rows.keys_of(v)?;
        let scored = rows.scored(&rows.keys_of(k)?, scores)?;
        let lse = scored.f_logsumexp([-1_i64].as_slice(), true)?;
        // Of all scores is the sum, and dropped is what comes of them.
        let weights = kept(drops, &rows, scored.f_sub(&lse)?.f_exp()?)?;
        outputs.push(rows.unfolded(&weights.f_matmul(&v)?)?);
        sums.push(rows.unfolded(&lse)?);
    }
    Ok(Attended { output: Tensor::f_cat(&outputs, 3)?, lse: Tensor::f_cat(&sums, 3)? })
}

impl Attended {
    /// Adds what the same queries, from `start` on, got from other keys.
    pub(super) fn add(&mut self, start: i64, other: &Self) -> Result<()> {
        let len = other.lse.size()[3];
        let mut output = self.output.f_narrow(3, start, len)?;
        let mut lse = self.lse.f_narrow(3, start, len)?;
        let sum = lse.f_logaddexp(&other.lse)?;
        let own = output.f_mul(&lse.f_sub(&sum)?.f_exp()?)?;
        let added = other.output.f_mul(&other.lse.f_sub(&sum)?.f_exp()?)?;
        output.f_copy_(&own.f_add(&added)?)?;
        Ok(lse.f_copy_(&sum)?)
    }
}

/// The gradient of queries, of keys and of values, in the shapes of `queries.q`, `k` and `v`.
pub(super) fn backward(
    queries: &Queries,
    [k, v]: [&Tensor; 2],
    scores: Scores,
    drops: Option<&Drops>,
) -> Result<(Tensor, Tensor, Tensor)> {
    let mut of_q = Vec::new();
    let (of_k, of_v) = (k.f_zeros_like()?, v.f_zeros_like()?);
    for (start, len) in runs(&queries.q, k) {
        let rows = Rows::of(&queries.q, (start, len), k, scores)?;
        let (k, v) = (rows.keys_of(k)?, rows.keys_of(v)?);
        let part = |tensor: &Tensor| folded(&tensor.f_narrow(3, start, len)?);
        let (lse, gradient) = (part(&queries.lse)?, part(&queries.gradient)?);
        let weights = rows.scored(&k, scores)?.f_sub(&lse)?.f_exp()?;
        let of_kept = gradient.f_matmul(&v.f_transpose(-2, -1)?)?;
        let of_weights = kept(drops, &rows, of_kept)?;
        let of_scores = of_weights.f_sub(&part(&queries.delta)?)?.f_mul(&weights)?;
        let of_scores = of_scores.f_mul_scalar(scores.scale)?;
        of_q.push(rows.unfolded(&of_scores.f_matmul(&k)?)?);
        let transposed = of_scores.f_transpose(-2, -1)?;
        add(rows.keys_of(&of_k)?, &transposed.f_matmul(&rows.q)?)?;
        let weights = kept(drops, &rows, weights)?;
        add(rows.keys_of(&of_v)?, &weights.f_transpose(-2, -1)?.f_matmul(&gradient)?)?;
    }
    Ok((Tensor::f_cat(&of_q, 3)?, of_k, of_v))
}

/// Probabilities, or their gradients, less what is dropped.
fn kept(drops: Option<&Drops>, rows: &Rows, weights: Tensor) -> Result<Tensor> {
    match drops {
        Some(drops) => Ok(weights.f_mul(&drops.factors(rows, &weights)?)?),
        None => Ok(weights),
    }
}

impl Drops {
    /// What each of the rows' probabilities is multiplied by.
    fn factors(&self, rows: &Rows, weights: &Tensor) -> Result<Tensor> {
        let [batch, kv_heads, group, queries, _] = rows.shape[..] else {
            return Err(phalanx_ddp_core::Error::BackwardAbandoned);
        };
        let places = [
            self.dropout.heads(kv_heads * group),
            Tokens::of(&self.queries)?.part(rows.start, queries)?,
            Tokens::of(&self.keys)?.part(0, rows.keys)?,
        ];
        let mask = self.dropout.dropout.mask(batch, &self.pass, &places).like(weights)?;
        // Heads that share keys are neighbours.
        Ok(mask.f_view(weights.size().as_slice())?)
    }
}

/// Adds to a view.
pub(super) fn add(mut view: Tensor, term: &Tensor) -> Result<()> {
    Ok(view.f_add_(term).map(drop)?)
}

/// Some queries at a time: where they start, and how many. Shapes alone decide.
fn runs(q: &Tensor, k: &Tensor) -> Vec<(i64, i64)> {
    let (shape, keys) = (q.size(), k.size()[2]);
    let of_query = shape[..3].iter().product::<i64>() * keys;
    let each = (SCORES_MAX / of_query.max(1)).max(1);
    let queries = shape[3];
    let starts = (0..).map(|at| at * each).take_while(|start| *start < queries);
    starts.map(|start| (start, each.min(queries - start))).collect()
}

/// Queries of all heads that share keys, as rows of one matrix.
struct Rows {
    /// `[batch, kv heads, group · queries, head_dim]`.
    q: Tensor,
    start: i64,
    shape: Vec<i64>,
    /// Keys that any of them meets: the first so many.
    keys: i64,
}

impl Rows {
    fn of(q: &Tensor, (start, len): (i64, i64), k: &Tensor, scores: Scores) -> Result<Self> {
        let part = q.f_narrow(3, start, len)?;
        let keys = if scores.is_causal { start + len } else { k.size()[2] };
        Ok(Self { q: folded(&part)?, start, shape: part.size(), keys })
    }

    /// A view of those keys (or values, or their gradients).
    fn keys_of(&self, of_keys: &Tensor) -> Result<Tensor> {
        Ok(of_keys.f_narrow(2, 0, self.keys)?)
    }

    /// `[batch, kv heads, group · queries, keys]`: −∞ where they do not meet.
    fn scored(&self, k: &Tensor, scores: Scores) -> Result<Tensor> {
        let mut scored = self.q.f_matmul(&k.f_transpose(-2, -1)?)?;
        scored = scored.f_mul_scalar_(scores.scale)?;
        if !scores.is_causal {
            return Ok(scored);
        }
        let len = self.shape[3];
        let at = (Kind::Bool, scored.device());
        // Query i of these, which is start + i of the block, does not meet keys behind it.
        let later = Tensor::f_ones([len, self.keys], at)?.f_triu(self.start + 1)?;
        let mut shape = self.shape.clone();
        shape[4] = self.keys;
        let mut by_query = scored.f_view(shape.as_slice())?;
        by_query = by_query.f_masked_fill_(&later, f64::NEG_INFINITY)?;
        Ok(by_query.f_view(scored.size().as_slice())?)
    }

    /// Rows as queries of heads again.
    fn unfolded(&self, rows: &Tensor) -> Result<Tensor> {
        let mut shape = self.shape.clone();
        shape[4] = rows.size()[3];
        Ok(rows.f_view(shape.as_slice())?)
    }
}

/// `[batch, kv heads, group, queries, n]` → `[batch, kv heads, group · queries, n]`.
fn folded(queries: &Tensor) -> Result<Tensor> {
    Ok(queries.f_flatten(2, 3)?)
}

#[cfg(test)]
mod tests {
    use tch::Device;

    use super::*;

    /// More scores than are in memory at once; in f64, of tokens whose scores are at most 1.
    #[test]
    fn queries_that_are_taken_in_runs_attend_alike() {
        let (tokens, dim) = (2100_i64, 4_i64);
        let values = |seed: i64| {
            let at = Tensor::arange(tokens * dim, (Kind::Double, Device::Cpu)) + seed * 1000;
            (at * 12.9898).sin().view([1, 1, tokens, dim]) * 0.5
        };
        let (q, k, v, gradient) = (values(1), values(2), values(3), values(4));
        let grouped = |tensor: &Tensor| tensor.unsqueeze(2);
        assert!(runs(&grouped(&q), &k).len() > 1);
        let leaves = [&q, &k, &v].map(|tensor| tensor.copy().set_requires_grad(true));
        let [lq, lk, lv] = &leaves;
        let none = None::<&Tensor>;
        let plain = Tensor::scaled_dot_product_attention(lq, lk, lv, none, 0.0, true, 0.5, false);
        (&plain * &gradient).sum(Kind::Double).backward();
        let scores = Scores { scale: 0.5, is_causal: true };
        let attended = forward(&grouped(&q), [&k, &v], scores, None).expect("libtorch");
        let delta = (&plain.detach() * &gradient).sum_dim_intlist(-1, true, Kind::Double);
        let (lse, delta) = (attended.lse, grouped(&delta));
        let queries = Queries { q: grouped(&q), lse, gradient: grouped(&gradient), delta };
        let (of_q, of_k, of_v) = backward(&queries, [&k, &v], scores, None).expect("libtorch");
        // Sums over all tokens, of terms below 1.
        let bound = f64::EPSILON * 2100.0 * 2100.0;
        let pairs = [
            (attended.output, plain.detach()),
            (of_q, lq.grad()),
            (of_k, lk.grad()),
            (of_v, lv.grad()),
        ];
        for (actual, expected) in pairs {
            let off = (actual.view_as(&expected) - expected).abs().max().double_value(&[]);
            assert!(off <= bound, "{off:.1e} off");
        }
    }
}
