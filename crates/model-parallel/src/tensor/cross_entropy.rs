//! The loss over a vocabulary that is cut: each rank has the logits of its words, some tokens at a time.
//!
//! For a chunk of tokens a rank computes its logits, their maximum m, the sum s of exp(logit − m), and the target's logit if it has it. These three
//! numbers a token are gathered, and give every rank the same logarithm of the whole sum: log Σᵣ sᵣ exp(mᵣ − m) + m. The gradient is known up to the factor that backward
//! brings, softmax − one at the target, so the forward also computes what the hidden states and the weight get, and no logits are kept. That
//! costs three products in all; the sum over ranks of the hidden states' gradient is the backward's.
//!
//! # Source
//! Shoeybi et al. 2019, section 3; Hsu et al. 2024, "Liger Kernel" (gradients in the forward).

use std::ops::Range;

use phalanx_ddp_core::amp;
use phalanx_ddp_core::autograd::Function;
use phalanx_ddp_core::collective::Pending;
use tch::{Kind, Tensor};

use super::embedding::local;
use super::parallel::TensorParallel;
use super::product::{flat, wide};
use crate::error::{Error, Result};
use crate::layer::none;
use crate::layer::Deferred;

/// The target of a token that has none, as in PyTorch.
pub const IGNORED: i64 = -100;

/// Logits at once: 128 MiB of f32. With fewer tokens at a time the weight's gradient, as large as the weight, would be read and written
/// more often than it takes to compute.
const LOGITS_MAX: i64 = 1 << 25;

/// The sum of the tokens' losses: a scalar in f32 (f64 of f64), the same on all ranks of the group. Under autocast its products are computed in
/// the kind of that.
///
/// It computes the gradients as well where they are recorded, and keeps them for the backward: as much memory as hidden states and weight.
///
/// # Shapes
/// `hidden` `[batch, tokens(/n), width]`, `weight` (the rank's rows of a [`VocabEmbedding`](super::VocabEmbedding)'s table, or of one like it) `[words, width]`, `targets` `[batch, tokens]` of i64, whole on
/// every rank; [`IGNORED`] is no target.
///
/// # Errors
/// [`Error::BadInput`] (targets outside of the vocabulary are found on the CPU); those of the group; libtorch's own.
pub fn cross_entropy(
    hidden: &Tensor,
    weight: &Tensor,
    targets: &Tensor,
    tp: &TensorParallel,
) -> Result<Tensor> {
    let words = words(weight, tp)?;
    check(hidden, weight, targets, (&words, tp))?;
    let wants = (is_recorded(hidden)?, is_recorded(weight)?);
    let at_once = (LOGITS_MAX / words.most().max(1)).max(1);
    let kind = amp::autocast_kind(weight.device())?.unwrap_or(weight.kind());
    let head = Head { tp: tp.clone(), first: words.mine.start, at_once, kind, wants };
    let deferred = Deferred::active();
    let leaf = weight.shallow_clone();
    let mut outputs = Function::new("cross_entropy").apply(
        &[hidden, weight],
        |saving, inputs| {
            let whole = tp.start_gather(inputs[0], "cross-entropy: hidden states")?.wait()?;
            let (flat, targets) = (flat(&whole)?, targets.f_flatten(0, -1)?);
            let found = amp::without_autocast(weight.device(), || {
                head.forward(&flat, inputs[1], &targets)
            })??;
            let none = || Tensor::f_zeros([0], (Kind::Float, weight.device()));
            let of_hidden = match found.of_hidden {
                Some(of_hidden) => of_hidden.f_view_as(&whole)?,
                None => none()?,
            };
            saving.save(&of_hidden);
            saving.save(&found.of_weight.map_or_else(none, Ok)?);
            Ok((vec![found.loss], (head, leaf)))
        },
        move |backward, gradients| {
            let (needs, (rank, variable)) = (&backward.needs_input_grad, backward.state);
            let Some(scale) = &gradients[0] else { return Ok(none(needs.len())) };
            // Most often it is 1. A GPU would have to wait for it.
            let is_one = scale.device() == tch::Device::Cpu
                && scale.f_double_value(&[])?.to_bits() == 1.0_f64.to_bits();
            let scaled = |saved: &Tensor| match is_one {
                true => Ok(saved.shallow_clone()),
                false => saved.f_mul(&scale.f_to_kind(saved.kind())?),
            };
            let of_hidden = match needs[0] {
                true => {
                    let scaled = scaled(&backward.saved[0])?;
                    Some(rank.tp.start_sum(&scaled, "cross-entropy: gradient of hidden states")?)
                }
                false => None,
            };
            let mut of_weight = match needs[1] {
                true => Some(scaled(&backward.saved[1])?),
                false => None,
            };
            if let (Some(deferred), Some(gradient)) =
                (&deferred, of_weight.take_if(|_| deferred.is_some()))
            {
                let variable = variable.shallow_clone();
                deferred.leave(move || Ok(vec![(variable, gradient)]));
            }
            Ok(vec![of_hidden.map(Pending::wait).transpose()?, of_weight])
        },
    )?;
    Ok(outputs.swap_remove(0))
}

/// The logits of all words, on every rank: for sampling. Nothing is recorded.
///
/// # Shapes
/// As [`cross_entropy`]'s; the result is `[batch, tokens, vocabulary]`.
///
/// # Errors
/// As [`cross_entropy`].
pub fn logits(hidden: &Tensor, weight: &Tensor, tp: &TensorParallel) -> Result<Tensor> {
    let _unrecorded = tch::no_grad_guard();
    let words = words(weight, tp)?;
    let whole = tp.start_gather(hidden, "logits: hidden states")?.wait()?;
    let mine = whole.f_linear::<&Tensor>(weight, None)?;
    if tp.ranks() == 1 {
        return Ok(mine);
    }
    // Ranks have as many words or one more: gathered as if all had the most.
    let most = words.most();
    let missing = most - weight.size()[0];
    let padded = mine.f_constant_pad_nd([0, missing])?;
    let all = tp.group.all_gather(&padded, -1, "logits")?;
    let mut parts = Vec::new();
    for (rank, count) in (0_i64..).zip(&words.counts) {
        parts.push(all.f_narrow(-1, rank * most, *count)?);
    }
    Ok(Tensor::f_cat(&parts, -1)?)
}

/// Who has which words.
struct Words {
    counts: Vec<i64>,
    mine: Range<i64>,
}

impl Words {
    /// The most that a rank has.
    fn most(&self) -> i64 {
        self.counts.iter().copied().max().unwrap_or(0)
    }
}

/// The ranks tell each other how many they have.
fn words(weight: &Tensor, tp: &TensorParallel) -> Result<Words> {
    let mine = weight.size().first().copied().unwrap_or(0);
    let counts = match tp.ranks() {
        1 => vec![mine],
        _ => {
            let told = tp.group.with_group(|group| {
                group.tagged("cross-entropy: words");
                group.all_gather_bytes(&mine.to_le_bytes())
            })?;
            let count = |bytes: &Vec<u8>| bytes.as_slice().try_into().map_or(0, i64::from_le_bytes);
            told.iter().map(count).collect()
        }
    };
    let start = counts.iter().take(tp.group.rank()).sum();
    Ok(Words { counts, mine: start..start + mine })
}

fn check(
    hidden: &Tensor,
    weight: &Tensor,
    targets: &Tensor,
    (words, tp): (&Words, &TensorParallel),
) -> Result<()> {
    let vocabulary: i64 = words.counts.iter().sum();
    let (of_hidden, of_weight, of_targets) = (hidden.size(), weight.size(), targets.size());
    let ranks = if tp.cuts_tokens() { tp.size() } else { 1 };
    let fits = of_hidden.len() == 3
        && of_weight.len() == 2
        && of_hidden[2] == of_weight[1]
        && of_targets == [of_hidden[0], of_hidden[1] * ranks];
    let bad = |actual: String, expected: String| Error::BadInput {
        layer: "cross-entropy".to_owned(),
        actual,
        expected,
    };
    if !fits || targets.kind() != Kind::Int64 {
        let actual = format!(
            "hidden states {of_hidden:?}, weight {of_weight:?}, targets {of_targets:?} of {:?}",
            targets.kind()
        );
        let expected = "[batch, tokens(/n), width], [words, width], [batch, tokens] of Int64";
        return Err(bad(actual, expected.to_owned()));
    }
    if targets.device() != tch::Device::Cpu || targets.numel() == 0 {
        return Ok(());
    }
    let in_range = targets.f_ge(0)?.f_logical_and(&targets.f_lt(vocabulary)?)?;
    let is_good = in_range.f_logical_or(&targets.f_eq(IGNORED)?)?;
    if is_good.f_all()?.f_int64_value(&[])? == 1 {
        return Ok(());
    }
    let (least, most) = (i64::try_from(targets.f_min()?)?, i64::try_from(targets.f_max()?)?);
    Err(bad(
        format!("targets from {least} to {most}"),
        format!("0 to {}, or {IGNORED} for none", vocabulary - 1),
    ))
}

/// Whether a gradient of it will be asked for: a view requires one only where autograd records.
fn is_recorded(tensor: &Tensor) -> Result<bool> {
    Ok(tensor.f_view_as(tensor)?.requires_grad())
}

/// The rank's part of the head.
#[derive(Debug)]
struct Head {
    tp: TensorParallel,
    /// The first of its words.
    first: i64,
    /// Tokens of a chunk, the same on all ranks.
    at_once: i64,
    /// In which products are computed: the weight's, or autocast's.
    kind: Kind,
    /// Whether gradients of hidden states and weight are wanted.
    wants: (bool, bool),
}

/// What the forward leads to: gradients are those of the sum of losses.
struct Found {
    loss: Tensor,
    of_hidden: Option<Tensor>,
    of_weight: Option<Tensor>,
}

impl Head {
    /// `hidden` `[tokens, width]`, `targets` `[tokens]`.
    fn forward(
        &self,
        hidden: &Tensor,
        weight: &Tensor,
        targets: &Tensor,
    ) -> phalanx_ddp_core::Result<Found> {
        let tokens = hidden.size()[0];
        let (weight, like) = (weight.f_to_kind(self.kind)?, weight);
        let mut found = Found {
            loss: Tensor::f_zeros([], (wide(self.kind), hidden.device()))?,
            of_hidden: self.wants.0.then(|| hidden.f_empty_like()).transpose()?,
            of_weight: None,
        };
        let mut start = 0;
        while start < tokens {
            let len = self.at_once.min(tokens - start);
            let chunk = hidden.f_narrow(0, start, len)?.f_to_kind(self.kind)?;
            let of_chunk = self.chunk(&chunk, &weight, &targets.f_narrow(0, start, len)?)?;
            drop(found.loss.f_add_(&of_chunk.0)?);
            if let Some(of_hidden) = &found.of_hidden {
                let mut rows = of_hidden.f_narrow(0, start, len)?;
                rows.f_copy_(&of_chunk.1.f_matmul(&weight)?)?;
            }
            if self.wants.1 {
                let rows = of_chunk.1.f_tr()?;
                found.of_weight = Some(match found.of_weight.take() {
                    None => rows.f_matmul(&chunk)?.f_to_kind(like.kind())?,
                    Some(mut sum) if sum.kind() == self.kind => sum.f_addmm_(&rows, &chunk)?,
                    Some(mut sum) => sum.f_add_(&rows.f_matmul(&chunk)?)?,
                });
            }
            start += len;
        }
        Ok(found)
    }

    /// The loss of some tokens, and the gradient of their logits (where gradients are wanted).
    fn chunk(
        &self,
        hidden: &Tensor,
        weight: &Tensor,
        targets: &Tensor,
    ) -> phalanx_ddp_core::Result<(Tensor, Tensor)> {
        let kind = weight.kind();
        let mut logits = hidden.f_linear::<&Tensor>(weight, None)?.f_to_kind(wide(kind))?;
        let (index, is_mine) = local(targets, self.first, weight.size()[0])?;
        let (index, is_mine) = (index.f_unsqueeze(1)?, is_mine.f_to_kind(wide(kind))?);
        let target = logits.f_gather(1, &index, false)?.f_squeeze_dim(1)?.f_mul(&is_mine)?;
        let most = logits.f_amax([1_i64].as_slice(), true)?;
        drop(logits.f_sub_(&most)?.f_exp_()?);
        let sum = logits.f_sum_dim_intlist([1_i64].as_slice(), false, None)?;
        let most = most.f_squeeze_dim(1)?;
        let (log_sum, target) = self.whole(&most, &sum, &target)?;
        let counts = targets.f_ne(IGNORED)?.f_to_kind(wide(kind))?;
        let loss = log_sum.f_sub(&target)?.f_mul(&counts)?.f_sum(None::<Kind>)?;
        if self.wants == (false, false) {
            return Ok((loss, logits));
        }
        let factor = most.f_sub(&log_sum)?.f_exp()?.f_mul(&counts)?;
        let mut gradient = logits.f_mul_(&factor.f_unsqueeze(1)?)?;
        drop(gradient.f_scatter_add_(1, &index, &is_mine.f_neg()?.f_unsqueeze(1)?)?);
        Ok((loss, gradient.f_to_kind(kind)?))
    }

    /// The logarithm of the sum over all words, and the logit of the target.
    fn whole(
        &self,
        most: &Tensor,
        sum: &Tensor,
        target: &Tensor,
    ) -> phalanx_ddp_core::Result<(Tensor, Tensor)> {
        if self.tp.ranks() == 1 {
            return Ok((sum.f_log()?.f_add(most)?, target.shallow_clone()));
        }
        let mine = Tensor::f_stack(&[most, sum, target], 0)?.f_unsqueeze(0)?;
        let all = self.tp.group.all_gather(&mine, 0, "cross-entropy: sums")?;
        let of_ranks = |row: i64| all.f_select(1, row);
        let over_all = of_ranks(0)?.f_amax([0_i64].as_slice(), false)?;
        let scaled = of_ranks(0)?.f_sub(&over_all)?.f_exp()?.f_mul(&of_ranks(1)?)?;
        let log_sum = scaled.f_sum_dim_intlist([0_i64].as_slice(), false, None)?.f_log()?;
        let of_target = of_ranks(2)?.f_sum_dim_intlist([0_i64].as_slice(), false, None)?;
        Ok((log_sum.f_add(&over_all)?, of_target))
    }
}
