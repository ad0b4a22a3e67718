//! A weight as products take it, and how a layer's variables are made.

use phalanx_ddp_core::{amp, Result};
use tch::{Kind, Tensor};

use super::chunked::Factor;
use super::cut::Piece;
use crate::layer::weight_gradients;
use crate::layer::{Builder, Init};

/// How a linear layer is.
///
/// # Example
/// ```
/// use phalanx_model_parallel::tensor::LinearOptions;
///
/// // Queries of 8 heads and keys and values of 2, of 16 columns each, in one matrix without a bias.
/// let qkv = LinearOptions { bias: false, parts: vec![128, 32, 32], unit: 16, ..Default::default() };
/// # let _ = qkv;
/// ```
#[derive(Clone, Debug, PartialEq)]
#[expect(clippy::struct_excessive_bools, reason = "two that have nothing to do with each other")]
pub struct LinearOptions {
    /// Whether there is a bias, which begins as 0.
    pub bias: bool,
    /// How the weight begins.
    pub init: Init,
    /// Of a [`ColumnLinear`](super::ColumnLinear): the sizes of the matrices that stand side by side in its outputs (queries, keys, values), each of which is cut
    /// by itself. Empty: one.
    pub parts: Vec<i64>,
    /// What is not cut: the columns of a head. A part of fewer units than ranks has each unit on several ranks, and the gradient is the sum
    /// over them.
    pub unit: i64,
    /// Whether the weight is `[in, out]`, as in GPT-2's files, and not `[out, in]`.
    pub transposed: bool,
}

impl Default for LinearOptions {
    /// One matrix with a bias, normally distributed with a deviation of 0.02 as in GPT-2, `[out, in]`.
    fn default() -> Self {
        let init = Init::Normal { std: 0.02 };
        Self { bias: true, init, parts: Vec::new(), unit: 1, transposed: false }
    }
}

/// A weight, and how it lies.
#[derive(Debug)]
pub(super) struct Weight {
    pub(super) tensor: Tensor,
    pub(super) transposed: bool,
}

/// Which side of a product is cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Side {
    Out,
    In,
}

impl Weight {
    /// A rank's pieces of a whole weight for `inputs` and `outputs` columns.
    pub(super) fn new(
        builder: &Builder<'_>,
        (inputs, outputs): (i64, i64),
        options: &LinearOptions,
        (side, pieces): (Side, &[Piece]),
    ) -> crate::Result<Self> {
        let transposed = options.transposed;
        let shape = if transposed { [inputs, outputs] } else { [outputs, inputs] };
        let dim = usize::from((side == Side::Out) == transposed);
        let ranges = pieces.iter().map(|piece| piece.range.clone()).collect();
        let tensor = builder.part("weight", &shape, dim, ranges, options.init)?;
        Ok(Self { tensor, transposed })
    }

    /// The same weight: of a tensor that a graph has saved, say.
    pub(super) fn with(&self, tensor: &Tensor) -> Self {
        Self { tensor: tensor.shallow_clone(), transposed: self.transposed }
    }

    pub(super) fn again(&self) -> Self {
        self.with(&self.tensor)
    }

    /// `[out, in]`.
    fn rows(&self) -> Result<Tensor> {
        Ok(if self.transposed { self.tensor.f_tr()? } else { self.tensor.shallow_clone() })
    }

    /// The dimension of outputs.
    pub(super) fn outputs(&self) -> i64 {
        i64::from(self.transposed)
    }

    /// `x · Wᵀ + bias`.
    pub(super) fn forward(&self, x: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
        Ok(x.f_linear(&self.rows()?, bias)?)
    }

    /// What `x · Wᵀ + bias` multiplies rows with, under autocast too.
    pub(super) fn factor(&self, bias: Option<&Tensor>) -> Result<Factor> {
        let kind = amp::autocast_kind(self.tensor.device())?;
        let of = |tensor: &Tensor| match kind {
            Some(kind) => tensor.f_detach()?.f_to_kind(kind),
            None => tensor.f_detach(),
        };
        let bias = bias.map(of).transpose()?;
        Ok(Factor { matrix: of(&self.rows()?.f_tr()?)?, bias, kind })
    }

    /// What `gradient · W` multiplies rows with, in the gradient's kind: under autocast another one than the weight's.
    pub(super) fn backward_factor(&self, kind: Kind) -> Result<Factor> {
        let matrix = self.rows()?.f_detach()?.f_to_kind(kind)?;
        Ok(Factor { matrix, bias: None, kind: Some(kind) })
    }

    /// The gradient of the weight, as it lies, and of the bias.
    pub(super) fn gradients(
        &self,
        x: &Tensor,
        gradient: &Tensor,
        (weight, bias): (bool, bool),
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let x = x.f_to_kind(gradient.kind())?;
        if !self.transposed {
            return weight_gradients(&x, gradient, (weight, bias));
        }
        let (of_weight, _) = weight_gradients(gradient, &x, (weight, false))?;
        let (_, of_bias) = weight_gradients(&x, gradient, (false, bias))?;
        Ok((of_weight, of_bias))
    }
}

/// Where a layer is in the model.
pub(super) fn layer_name(builder: &Builder<'_>) -> String {
    builder.path().components().collect::<Vec<_>>().join(".")
}

/// The kind that sums over a row are computed in: at least single precision.
pub(super) fn wide(kind: Kind) -> Kind {
    match kind {
        Kind::Double => Kind::Double,
        _ => Kind::Float,
    }
}

/// `[rows, columns]`.
pub(super) fn flat(tensor: &Tensor) -> Result<Tensor> {
    let width = tensor.size().last().copied().unwrap_or(1);
    Ok(tensor.f_reshape([-1, width])?)
}

/// An error unless the last dimension of `x` is `width`.
pub(super) fn check_width(layer: &str, x: &Tensor, width: i64) -> crate::Result<()> {
    let shape = x.size();
    if shape.len() >= 2 && shape.last() == Some(&width) {
        return Ok(());
    }
    Err(crate::Error::BadInput {
        layer: layer.to_owned(),
        actual: format!("an input of shape {shape:?}"),
        expected: format!("[…, {width}]"),
    })
}
