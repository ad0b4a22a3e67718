//! Embeddings: of words, whose rows are cut over the ranks, and of positions, which every rank has whole.

use std::ops::Range;

use phalanx_ddp_core::autograd::Function;
use tch::{Kind, Tensor};

use super::cut;
use super::parallel::{TensorParallel, TOKENS};
use super::product::layer_name;
use super::shared::shared_all;
use crate::error::{Error, Result};
use crate::layer::{Builder, Init, Pass};

/// A table of words, of whose rows each rank has 1/n, or one more.
///
/// A rank looks up the words that it has; the sum over the ranks has all. [`cross_entropy`](super::cross_entropy) and [`logits`](super::logits) take the same
/// table, or another one of this kind, as the matrix from hidden states to words.
///
/// # Example
/// ```
/// use phalanx_model_parallel::layer::{Builder, Init};
/// use phalanx_model_parallel::tensor::{cross_entropy, TensorParallel, VocabEmbedding};
/// use tch::{nn, Device, Kind, Tensor};
///
/// let vs = nn::VarStore::new(Device::Cpu);
/// let builder = Builder::new(vs.root(), 1);
/// let tp = TensorParallel::alone()?;
/// let words = VocabEmbedding::new(&(&builder / "wte"), 50, 8, Init::Normal { std: 0.02 }, &tp)?;
/// let ids = Tensor::from_slice(&[1_i64, 49, 7, 7]).view([2, 2]);
/// let hidden = words.forward(&ids)?;
/// let loss = cross_entropy(&hidden, words.weight(), &ids, &tp)?; // a sum over 4 tokens
/// assert_eq!((hidden.size(), loss.kind()), (vec![2, 2, 8], Kind::Float));
/// # Ok::<(), phalanx_model_parallel::Error>(())
/// ```
#[derive(Debug)]
pub struct VocabEmbedding {
    weight: Tensor,
    first: i64,
    vocabulary: i64,
    name: String,
    tp: TensorParallel,
}

impl VocabEmbedding {
    /// A variable `weight`, of a table of `vocabulary` rows of `width`.
    ///
    /// # Errors
    /// [`Error::Indivisible`] with fewer rows than ranks; libtorch's own.
    pub fn new(
        builder: &Builder<'_>,
        vocabulary: i64,
        width: i64,
        init: Init,
        tp: &TensorParallel,
    ) -> Result<Self> {
        let name = layer_name(builder);
        if vocabulary < tp.size() {
            return Err(cut::indivisible(&name, "vocabulary", vocabulary, tp.size()));
        }
        let range = cut::uneven(vocabulary, (tp.rank(), tp.size()));
        let first = range.start;
        let weight = builder.part("weight", &[vocabulary, width], 0, vec![range], init)?;
        Ok(Self { weight, first, vocabulary, name, tp: tp.clone() })
    }

    /// The rows of the words `[batch, tokens]` (i64): `[batch, tokens, width]`, or with sequence parallelism the rank's own tokens' of them.
    ///
    /// # Errors
    /// [`Error::BadInput`]: a word outside of the vocabulary (on a GPU only libtorch's check of indices finds it, where there is one rank), or a number of tokens that cannot
    /// be cut; those of the group; libtorch's own.
    pub fn forward(&self, ids: &Tensor) -> Result<Tensor> {
        self.tp.check_tokens(&self.name, ids)?;
        check_words(&self.name, ids, self.vocabulary)?;
        let (rows, width) = (self.weight.size()[0], self.weight.size()[1]);
        let (local, is_mine) = local(ids, self.first, rows)?;
        let shape = [&ids.size()[..], &[width]].concat();
        let (tp, tag) = (self.tp.clone(), self.name.clone());
        let kept = (local.shallow_clone(), is_mine.shallow_clone());
        let mut outputs = Function::new("vocab_embedding").apply(
            &[&self.weight],
            |_, inputs| {
                let words = inputs[0].f_index_select(0, &local.f_flatten(0, -1)?)?;
                let words = words.f_view(shape.as_slice())?;
                let mine = masked(&tp, words, &is_mine)?;
                let sum = self.tp.start_sum(&mine, &format!("{tag}: words"))?.wait()?;
                Ok((vec![sum], kept))
            },
            {
                let (tp, tag) = (tp.clone(), format!("{tag}: gradients of words"));
                move |backward, gradients| {
                    let Some(gradient) = &gradients[0] else { return Ok(vec![None]) };
                    let (indices, mask) = backward.state;
                    let whole = tp.start_gather(gradient, &tag)?.wait()?;
                    let mine = masked(&tp, whole, mask)?.f_contiguous()?;
                    let of_rows =
                        Tensor::f_embedding_dense_backward(&mine, indices, rows, -1, false)?;
                    Ok(vec![Some(of_rows)])
                }
            },
        )?;
        Ok(outputs.swap_remove(0))
    }

    /// This rank's rows of the table.
    pub fn weight(&self) -> &Tensor {
        &self.weight
    }
}

/// Rows that are another rank's are zero here.
fn masked(tp: &TensorParallel, rows: Tensor, is_mine: &Tensor) -> phalanx_ddp_core::Result<Tensor> {
    if tp.ranks() == 1 {
        return Ok(rows);
    }
    Ok(rows.f_mul(&is_mine.f_unsqueeze(-1)?.f_to_kind(rows.kind())?)?)
}

/// Words as rows of the part that begins at `first`, and which are in it. The others are row 0.
pub(super) fn local(ids: &Tensor, first: i64, rows: i64) -> Result<(Tensor, Tensor)> {
    let local = ids.f_sub_scalar(first)?;
    let is_mine = local.f_ge(0)?.f_logical_and(&local.f_lt(rows)?)?;
    let local = local.f_mul(&is_mine.f_to_kind(Kind::Int64)?)?;
    Ok((local, is_mine))
}

/// An error if a word is not in the vocabulary. On a GPU it would have to wait for the values, and is left out.
pub(super) fn check_words(layer: &str, ids: &Tensor, vocabulary: i64) -> Result<()> {
    let bad = |actual: String| Error::BadInput {
        layer: layer.to_owned(),
        actual,
        expected: format!("[batch, tokens] of words from 0 to {}", vocabulary - 1),
    };
    if ids.kind() != Kind::Int64 || ids.dim() != 2 {
        return Err(bad(format!("an input of shape {:?} and kind {:?}", ids.size(), ids.kind())));
    }
    if ids.device() != tch::Device::Cpu || ids.numel() == 0 {
        return Ok(());
    }
    let (least, most) = (i64::try_from(ids.f_min()?)?, i64::try_from(ids.f_max()?)?);
    match least < 0 || most >= vocabulary {
        true => Err(bad(format!("words from {least} to {most}"))),
        false => Ok(()),
    }
}

/// A table of positions, which every rank has whole.
#[derive(Debug)]
pub struct PositionEmbedding {
    weight: Tensor,
    name: String,
    tp: TensorParallel,
}

impl PositionEmbedding {
    /// A variable `weight`, of a table of `count` rows of `width`.
    ///
    /// # Errors
    /// libtorch's own.
    pub fn new(
        builder: &Builder<'_>,
        count: i64,
        width: i64,
        init: Init,
        tp: &TensorParallel,
    ) -> Result<Self> {
        let weight = builder.whole("weight", &[count, width], init)?;
        Ok(Self { weight, name: layer_name(builder), tp: tp.clone() })
    }

    /// The rows of the positions of [`Pass::tokens`], `tokens` of them: `[tokens, width]`, or with sequence parallelism the rank's own tokens' of them.
    ///
    /// # Errors
    /// [`Error::BadInput`] with more tokens than rows; those of the group; libtorch's own.
    pub fn forward(&self, tokens: i64, pass: &Pass) -> Result<Tensor> {
        let count = self.weight.size()[0];
        let all = pass.tokens.part(0, tokens)?;
        if let Some(run) = all.iter().find(|run| run.end > count) {
            return Err(Error::BadInput {
                layer: self.name.clone(),
                actual: format!("tokens up to position {}", run.end - 1),
                expected: format!("positions up to {}", count - 1),
            });
        }
        if !self.tp.cuts_tokens() {
            return rows(&self.weight, &all);
        }
        let probe = self.weight.f_detach()?.f_narrow(0, 0, tokens)?.f_unsqueeze(0)?;
        self.tp.check_tokens(&self.name, &probe)?;
        debug_assert_eq!(probe.size().get(1), Some(&tokens), "dimension {TOKENS}");
        let each = tokens / self.tp.size();
        let weight = shared_all(&[&self.weight], &self.tp, &self.name)?.swap_remove(0);
        rows(&weight, &pass.tokens.part(self.tp.rank() * each, each)?)
    }
}

/// Rows of a table, one run behind the other.
fn rows(table: &Tensor, runs: &[Range<i64>]) -> Result<Tensor> {
    let run = |run: &Range<i64>| table.f_narrow(0, run.start, run.end - run.start);
    match runs {
        [one] => Ok(run(one)?),
        _ => {
            let all: Vec<Tensor> = runs.iter().map(run).collect::<std::result::Result<_, _>>()?;
            Ok(Tensor::f_cat(&all, 0)?)
        }
    }
}
