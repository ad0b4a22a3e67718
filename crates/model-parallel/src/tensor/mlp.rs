//! The layers between attentions: two products with an activation between, or Llama's three.

use tch::Tensor;

use super::column::ColumnLinear;
use super::row::RowLinear;
use crate::error::{Error, Result};

/// How the Gaussian error linear unit is computed (Hendrycks and Gimpel 2016).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Gelu {
    /// With the error function.
    Exact,
    /// With the hyperbolic tangent, as GPT-2 does.
    #[default]
    Tanh,
}

/// `down(gelu(up(x)))`.
#[derive(Debug)]
pub struct Mlp {
    up: ColumnLinear,
    down: RowLinear,
    gelu: Gelu,
}

impl Mlp {
    /// Of layers whose cut widths are the same.
    ///
    /// # Errors
    /// [`Error::BadSetting`] if they are not.
    pub fn new(up: ColumnLinear, down: RowLinear, gelu: Gelu) -> Result<Self> {
        check(&[&up], &down)?;
        Ok(Self { up, down, gelu })
    }

    /// `[batch, tokens(/n), width]`, both ways.
    ///
    /// # Errors
    /// Those of the layers.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let approximate = match self.gelu {
            Gelu::Exact => "none",
            Gelu::Tanh => "tanh",
        };
        self.down.forward(&self.up.forward(x)?.f_gelu(approximate)?)
    }
}

/// `down(silu(gate(x)) · up(x))` (Shazeer 2020).
#[derive(Debug)]
pub struct SwiGlu {
    gate: ColumnLinear,
    up: ColumnLinear,
    down: RowLinear,
}

impl SwiGlu {
    /// Of layers whose cut widths are the same.
    ///
    /// # Errors
    /// [`Error::BadSetting`] if they are not.
    pub fn new(gate: ColumnLinear, up: ColumnLinear, down: RowLinear) -> Result<Self> {
        check(&[&gate, &up], &down)?;
        Ok(Self { gate, up, down })
    }

    /// `[batch, tokens(/n), width]`, both ways.
    ///
    /// # Errors
    /// Those of the layers.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let both = ColumnLinear::forward_all(&[&self.gate, &self.up], x)?;
        self.down.forward(&both[0].f_silu()?.f_mul(&both[1])?)
    }
}

fn check(ups: &[&ColumnLinear], down: &RowLinear) -> Result<()> {
    match ups.iter().find(|up| up.outputs() != down.inputs()) {
        None => Ok(()),
        Some(up) => Err(Error::BadSetting {
            setting: "outputs",
            value: format!("{} of {}", up.outputs(), up.name()),
            expected: "as many on each rank as the next layer has inputs",
        }),
    }
}
