//! Attention of the tokens that the rank has.

use tch::{Kind, Tensor};

use super::Attend;
use crate::error::Result;
use crate::layer::Pass;
use crate::tensor::dropout::Dropout;

/// libtorch's fused attention, or the products one by one where probabilities are dropped.
#[derive(Debug)]
pub(super) struct Plain {
    pub(super) causal: bool,
    pub(super) dropout: Option<Dropout>,
    /// The first of this rank's heads among all.
    pub(super) first_head: i64,
}

impl Attend for Plain {
    fn attend(
        &self,
        queries: &Tensor,
        keys: &Tensor,
        values: &Tensor,
        pass: &Pass,
    ) -> Result<Tensor> {
        let repeats = queries.size()[1] / keys.size()[1];
        let (keys, values) = (repeated(keys, repeats)?, repeated(values, repeats)?);
        match &self.dropout {
            Some(dropout) if pass.train => {
                self.one_by_one(queries, &keys, &values, (dropout, pass))
            }
            _ => Ok(Tensor::f_scaled_dot_product_attention::<&Tensor>(
                queries,
                &keys,
                &values,
                None,
                0.0,
                self.causal,
                None,
                false,
            )?),
        }
    }
}

impl Plain {
    fn one_by_one(
        &self,
        queries: &Tensor,
        keys: &Tensor,
        values: &Tensor,
        (dropout, pass): (&Dropout, &Pass),
    ) -> Result<Tensor> {
        let shape = queries.size();
        let (tokens, head_dim) = (shape[2], shape[3]);
        #[expect(clippy::cast_precision_loss, reason = "no head has 2⁵³ columns")]
        let scale = 1.0 / (head_dim as f64).sqrt();
        let mut scores = queries.f_mul_scalar(scale)?.f_matmul(&keys.f_transpose(2, 3)?)?;
        if self.causal {
            let ones = Tensor::f_ones([tokens, tokens], (Kind::Bool, scores.device()))?;
            scores = scores.f_masked_fill(&ones.f_triu(1)?, f64::NEG_INFINITY)?;
        }
        let probabilities = scores.f_softmax(-1, None::<Kind>)?;
        let (tokens, heads) = (pass.tokens.part(0, tokens)?, shape[1]);
        let heads = vec![self.first_head..self.first_head + heads];
        let kept = dropout.at(&probabilities, pass, &[heads, tokens.clone(), tokens])?;
        Ok(kept.f_matmul(values)?)
    }
}

/// Each head so many times, one behind the other.
fn repeated(x: &Tensor, repeats: i64) -> Result<Tensor> {
    if repeats == 1 {
        return Ok(x.shallow_clone());
    }
    let shape = x.size();
    let expanded = [shape[0], shape[1], repeats, shape[2], shape[3]];
    let flat = [shape[0], shape[1] * repeats, shape[2], shape[3]];
    Ok(x.f_unsqueeze(2)?.f_expand(expanded, false)?.f_reshape(flat)?)
}
