//! Products with exchanges beside them: while some rows are on their way to the other ranks, or from them, the next are multiplied.
//!
//! A product whose sum over the ranks is wanted sends each run of rows as soon as it is there; one of rows that the other ranks have asks for all runs at once, and multiplies each
//! when it came. Which runs, [`Rows`] says.

use std::ops::Range;

use phalanx_ddp_core::collective::Pending;
use phalanx_ddp_core::Result;
use tch::{Kind, Tensor};

use super::parallel::{Later, TensorParallel};
use super::rows::{Chunks, Rows};

/// What rows are multiplied with.
#[derive(Debug)]
pub(super) struct Factor {
    /// `[in, out]`.
    pub(super) matrix: Tensor,
    /// Added to each row.
    pub(super) bias: Option<Tensor>,
    /// The kind that rows are brought to before, where it may be another one.
    pub(super) kind: Option<Kind>,
}

impl Factor {
    fn outputs(&self) -> i64 {
        self.matrix.size().get(1).copied().unwrap_or(0)
    }

    /// The product of `rows` in `target`, which is new or, if it `adds`, has another one.
    fn multiply(&self, rows: &Tensor, target: &Tensor, adds: bool) -> Result<()> {
        drop(match (&self.bias, adds) {
            (_, true) => target.shallow_clone().f_addmm_(rows, &self.matrix)?,
            (None, false) => rows.f_mm_out(target, &self.matrix)?,
            (Some(bias), false) => bias.f_addmm_out(target, rows, &self.matrix)?,
        });
        Ok(())
    }

    /// The same of `[batch, parts, tokens, …]`.
    fn multiply_all(&self, rows: &Tensor, target: &Tensor, adds: bool) -> Result<()> {
        let mut rows = flat(rows)?;
        if let Some(kind) = self.kind {
            rows = rows.f_to_kind(kind)?;
        }
        if target.is_contiguous() {
            return self.multiply(&rows, &flat(target)?, adds);
        }
        let product = match adds {
            true => flat(target)?,
            false => {
                let like = (target.kind(), target.device());
                Tensor::f_empty([rows.size()[0], self.outputs()], like)?
            }
        };
        self.multiply(&rows, &product, adds)?;
        Ok(target.shallow_clone().f_copy_(&product.f_view_as(target)?)?)
    }
}

/// Products of a layer, cut so, with a name for what they exchange.
#[derive(Clone, Copy, Debug)]
pub(super) struct Beside<'a> {
    pub(super) tp: &'a TensorParallel,
    pub(super) chunks: Chunks,
    pub(super) tag: &'a str,
}

impl Beside<'_> {
    /// Starts the sum over the ranks of the products, added up, of inputs of one shape: of all tokens, or of the rank's own.
    pub(super) fn start_sum(&self, products: &[(&Tensor, Factor)]) -> Result<Summing> {
        let Some((first, of_first)) = products.first() else {
            return Err(phalanx_ddp_core::Error::BackwardAbandoned);
        };
        let (mut shape, outputs) = (first.size(), of_first.outputs());
        let parts = if self.tp.cuts_tokens() { self.tp.size() } else { 1 };
        let four = self.four(&shape, parts);
        let rows = Rows::new([four[0], four[1], four[2]], self.chunks);
        let kind = of_first.kind.unwrap_or(first.kind());
        let mut pending = Vec::new();
        for (number, runs) in rows.exchanges.iter().enumerate() {
            let over = Rows::over(runs);
            let mut of_exchange = [four[0], four[1], four[2], outputs];
            of_exchange[place(rows.dim)] = over.end - over.start;
            let product = Tensor::f_empty(of_exchange, (kind, first.device()))?;
            for (at, (x, factor)) in products.iter().enumerate() {
                let x = x.f_detach()?.f_reshape([four[0], four[1], four[2], width(x)])?;
                for run in runs {
                    let target = within(&product, rows.dim, run, over.start)?;
                    factor.multiply_all(&within(&x, rows.dim, run, 0)?, &target, at > 0)?;
                }
            }
            let [batch, _, tokens, _] = of_exchange;
            let product = product.f_view([batch, four[1] * tokens, outputs])?;
            let tag = self.tag(number, rows.exchanges.len());
            pending.push(self.tp.start_sum(&product, &tag)?);
        }
        if let Some(last) = shape.last_mut() {
            *last = outputs;
        }
        if parts > 1 {
            shape[1] /= parts;
        }
        Ok(Summing { pending, dim: rows.dim.min(1), shape })
    }

    /// Starts to gather the tokens of which each rank has a part; without sequence parallelism they are here.
    pub(super) fn start_gather(&self, mine: &Tensor) -> Result<Gathering> {
        let shape = mine.size();
        if !self.tp.cuts_tokens() {
            let four = self.four(&shape, 1);
            let rows = Rows::new([four[0], four[1], four[2]], Chunks::ONE);
            let here = vec![Later::Here(mine.f_detach()?.f_reshape(four)?)];
            return Ok(Gathering { coming: here, rows, four, shape });
        }
        let parts = self.tp.size();
        let mut whole = shape.clone();
        whole[1] *= parts;
        let four = self.four(&whole, parts);
        let rows = Rows::new([four[0], four[1], four[2]], self.chunks);
        let mut coming = Vec::new();
        for (number, runs) in rows.exchanges.iter().enumerate() {
            let some = within(mine, rows.dim.min(1), &Rows::over(runs), 0)?;
            let tag = self.tag(number, rows.exchanges.len());
            coming.push(self.tp.start_gather(&some, &tag)?);
        }
        Ok(Gathering { coming, rows, four, shape: whole })
    }

    /// `[batch, parts, tokens, width]`; where no tokens are cut all rows are one sequence.
    fn four(&self, shape: &[i64], parts: i64) -> [i64; 4] {
        let last = shape.last().copied().unwrap_or(1);
        match self.tp.cuts_tokens() && shape.len() == 3 {
            true => [shape[0], parts, shape[1] / parts, last],
            false => [1, 1, shape.iter().rev().skip(1).product(), last],
        }
    }

    fn tag(&self, number: usize, count: usize) -> String {
        match count {
            1 => self.tag.to_owned(),
            _ => format!("{}, part {} of {count}", self.tag, number + 1),
        }
    }
}

/// Sums that are under way.
#[derive(Debug)]
#[must_use = "sums that are not waited for have no result"]
pub(super) struct Summing {
    pending: Vec<Pending>,
    dim: i64,
    shape: Vec<i64>,
}

impl Summing {
    pub(super) fn wait(self) -> Result<Tensor> {
        let mut sums = Vec::new();
        for pending in self.pending {
            sums.push(pending.wait()?);
        }
        let sum = match sums.as_slice() {
            [one] => one.shallow_clone(),
            _ => Tensor::f_cat(&sums, self.dim)?,
        };
        Ok(sum.f_view(self.shape.as_slice())?)
    }
}

/// Rows that are on their way.
#[derive(Debug)]
#[must_use = "rows that are not waited for are lost"]
pub(super) struct Gathering {
    coming: Vec<Later>,
    rows: Rows,
    four: [i64; 4],
    /// Of all rows.
    shape: Vec<i64>,
}

impl Gathering {
    /// All rows, and their products with each factor. What came is multiplied while the rest comes.
    pub(super) fn multiplied(self, factors: &[Factor]) -> Result<(Tensor, Vec<Tensor>)> {
        let Self { coming, rows, four, shape } = self;
        let count = coming.len();
        let (mut whole, mut products): (Option<Tensor>, Vec<Tensor>) = (None, Vec::new());
        for (later, runs) in coming.into_iter().zip(&rows.exchanges) {
            let over = Rows::over(runs);
            let mut of_exchange = four;
            of_exchange[place(rows.dim)] = over.end - over.start;
            let came = later.wait()?.f_view(of_exchange)?;
            let like = (came.kind(), came.device());
            if products.is_empty() {
                for factor in factors {
                    let of_product = [four[0], four[1], four[2], factor.outputs()];
                    let kind = factor.kind.unwrap_or(like.0);
                    products.push(Tensor::f_empty(of_product, (kind, like.1))?);
                }
            }
            for (factor, product) in factors.iter().zip(&products) {
                for run in runs {
                    let from = within(&came, rows.dim, run, over.start)?;
                    let target = within(product, rows.dim, run, 0)?;
                    factor.multiply_all(&from, &target, false)?;
                }
            }
            if count == 1 {
                whole = Some(came);
                continue;
            }
            let all = match whole.take() {
                Some(begun) => begun,
                None => Tensor::f_empty(four, like)?,
            };
            within(&all, rows.dim, &over, 0)?.f_copy_(&came)?;
            whole = Some(all);
        }
        let whole = whole.ok_or(phalanx_ddp_core::Error::BackwardAbandoned)?;
        let mut of_rows = Vec::new();
        for (product, factor) in products.iter().zip(factors) {
            let leading = shape.len().saturating_sub(1);
            let of_product = [&shape[..leading], &[factor.outputs()]].concat();
            of_rows.push(product.f_view(of_product.as_slice())?);
        }
        Ok((whole.f_view(shape.as_slice())?, of_rows))
    }
}

/// The part of a tensor that a run is, of a tensor that begins at `start`.
fn within(tensor: &Tensor, dim: i64, run: &Range<i64>, start: i64) -> Result<Tensor> {
    Ok(tensor.f_narrow(dim, run.start - start, run.end - run.start)?)
}

/// `[rows, columns]`, also of no rows.
fn flat(tensor: &Tensor) -> Result<Tensor> {
    let (rows, columns) = (tensor.size().iter().rev().skip(1).product(), width(tensor));
    Ok(tensor.f_reshape([rows, columns])?)
}

fn width(tensor: &Tensor) -> i64 {
    tensor.size().last().copied().unwrap_or(1)
}

/// Where a shape has a dimension that is cut.
fn place(dim: i64) -> usize {
    if dim == 0 {
        0
    } else {
        2
    }
}
