//! Rotary positions: pairs of columns are turned by an angle that grows with the position.
//!
//! Column i < d/2 turns with column i + d/2, by position · theta^(−2i/d), as in Llama. Angles are computed in f32, as in transformers.
//!
//! # Source
//! Su et al. 2021, "`RoFormer`: Enhanced Transformer with Rotary Position Embedding".

use tch::{Device, Kind, Tensor};

use crate::error::Result;
use crate::layer::{numbers, Pass};

#[derive(Clone, Copy, Debug)]
pub(super) struct Rotary {
    pub(super) theta: f64,
    pub(super) head_dim: i64,
}

impl Rotary {
    /// Queries and keys `[batch, heads, tokens, head_dim]`, turned.
    pub(super) fn both(
        &self,
        queries: &Tensor,
        keys: &Tensor,
        pass: &Pass,
    ) -> Result<(Tensor, Tensor)> {
        let (cos, sin) = self.angles(queries.size()[2], pass, queries.device())?;
        let (cos, sin) = (cos.f_to_kind(queries.kind())?, sin.f_to_kind(queries.kind())?);
        Ok((turned(queries, &cos, &sin)?, turned(keys, &cos, &sin)?))
    }

    /// Cosine and sine `[tokens, head_dim]` of the angles, of both halves.
    fn angles(&self, tokens: i64, pass: &Pass, device: Device) -> Result<(Tensor, Tensor)> {
        let float = (Kind::Float, device);
        let columns = Tensor::f_arange_start_step(0, self.head_dim, 2, float)?;
        #[expect(clippy::cast_precision_loss, reason = "no head has 2⁵³ columns")]
        let exponents = columns.f_div_scalar(self.head_dim as f64)?;
        let powers = Tensor::f_full([1], self.theta, float)?.f_pow(&exponents)?;
        let frequencies = powers.f_reciprocal()?;
        let positions = numbers(&pass.tokens.part(0, tokens)?, float)?;
        let angles = positions.f_outer(&frequencies)?;
        let angles = Tensor::f_cat(&[&angles, &angles], -1)?;
        Ok((angles.f_cos()?, angles.f_sin()?))
    }
}

fn turned(x: &Tensor, cos: &Tensor, sin: &Tensor) -> Result<Tensor> {
    let half = x.size()[3] / 2;
    let (left, right) = (x.f_narrow(3, 0, half)?, x.f_narrow(3, half, half)?);
    let other = Tensor::f_cat(&[right.f_neg()?, left.shallow_clone()], 3)?;
    Ok(x.f_mul(cos)?.f_add(&other.f_mul(sin)?)?)
}
