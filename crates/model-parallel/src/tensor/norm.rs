//! Norms between blocks: of all tokens on every rank, or with sequence parallelism of its own.

use tch::Tensor;

use super::parallel::TensorParallel;
use super::product::{check_width, layer_name, wide};
use super::shared::shared_all;
use crate::error::Result;
use crate::layer::{Builder, Init};

/// Layer normalization over the last dimension (Ba et al. 2016).
#[derive(Debug)]
pub struct LayerNorm {
    weight: Tensor,
    bias: Tensor,
    eps: f64,
    name: String,
    tp: TensorParallel,
}

impl LayerNorm {
    /// Variables `weight`, which begins as 1, and `bias`, as 0.
    ///
    /// # Errors
    /// libtorch's own.
    pub fn new(builder: &Builder<'_>, width: i64, eps: f64, tp: &TensorParallel) -> Result<Self> {
        let weight = builder.whole("weight", &[width], Init::Constant(1.0))?;
        let bias = builder.whole("bias", &[width], Init::Constant(0.0))?;
        Ok(Self { weight, bias, eps, name: layer_name(builder), tp: tp.clone() })
    }

    /// Shape as `x`'s: `[batch, tokens(/n), width]`.
    ///
    /// # Errors
    /// [`Error::BadInput`](crate::Error::BadInput); libtorch's own.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let width = self.weight.size();
        check_width(&self.name, x, width[0])?;
        if !self.tp.cuts_tokens() {
            let (weight, bias) = (Some(&self.weight), Some(&self.bias));
            return Ok(x.f_layer_norm(width.as_slice(), weight, bias, self.eps, true)?);
        }
        let both = shared_all(&[&self.weight, &self.bias], &self.tp, &self.name)?;
        Ok(x.f_layer_norm(width.as_slice(), Some(&both[0]), Some(&both[1]), self.eps, true)?)
    }
}

/// Normalization by the root of the mean square over the last dimension (Zhang and Sennrich 2019), computed in f32 at least, as Llama does.
#[derive(Debug)]
pub struct RmsNorm {
    weight: Tensor,
    eps: f64,
    name: String,
    tp: TensorParallel,
}

impl RmsNorm {
    /// A variable `weight`, which begins as 1.
    ///
    /// # Errors
    /// libtorch's own.
    pub fn new(builder: &Builder<'_>, width: i64, eps: f64, tp: &TensorParallel) -> Result<Self> {
        let weight = builder.whole("weight", &[width], Init::Constant(1.0))?;
        Ok(Self { weight, eps, name: layer_name(builder), tp: tp.clone() })
    }

    /// Shape as `x`'s: `[batch, tokens(/n), width]`.
    ///
    /// # Errors
    /// [`Error::BadInput`](crate::Error::BadInput); libtorch's own.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let width = self.weight.size();
        check_width(&self.name, x, width[0])?;
        let kind = x.kind();
        let whole = x.f_to_kind(wide(kind))?;
        let normal = whole.f_rms_norm::<&Tensor>(width.as_slice(), None, self.eps)?;
        let normal = normal.f_to_kind(kind)?;
        if !self.tp.cuts_tokens() {
            return Ok(normal.f_mul(&self.weight)?);
        }
        let weight = shared_all(&[&self.weight], &self.tp, &self.name)?;
        Ok(normal.f_mul(&weight[0])?)
    }
}
