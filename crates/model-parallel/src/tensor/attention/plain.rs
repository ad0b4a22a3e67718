//! Attention of the tokens that the rank has.

use tch::{Kind, Tensor};

use super::Attend;
use crate::error::Result;
use crate::layer::Pass;
use crate::tensor::dropout::{run, Dropout, Places};

/// Dropout of an attention's probabilities: by step, sequence, head, query and key in the whole model.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AttentionDropout {
    /// How often a probability is dropped, and what from.
    pub dropout: Dropout,
    /// The first of this rank's heads of queries among all.
    pub first_head: i64,
}

/// libtorch's fused attention, or the products one by one where probabilities are dropped.
#[derive(Debug)]
pub(super) struct Plain {
    pub(super) causal: bool,
    pub(super) dropout: Option<AttentionDropout>,
}

impl Attend for Plain {
    fn is_causal(&self) -> bool {
        self.causal
    }

    fn dropout(&self) -> Option<AttentionDropout> {
        self.dropout
    }

    fn attend(
        &self,
        queries: &Tensor,
        keys: &Tensor,
        values: &Tensor,
        pass: &Pass,
    ) -> Result<Tensor> {
        if let Some(dropout) = self.dropout.filter(|_| pass.train) {
            let tokens = pass.tokens.part(0, queries.size()[2])?;
            return dropout.attend([queries, keys, values], self.causal, (pass, &tokens));
        }
        let repeats = queries.size()[1] / keys.size()[1];
        let (keys, values) = (repeated(keys, repeats)?, repeated(values, repeats)?);
        Ok(Tensor::f_scaled_dot_product_attention::<&Tensor>(
            queries,
            &keys,
            &values,
            None,
            0.0,
            self.causal,
            None,
            false,
        )?)
    }
}

impl AttentionDropout {
    /// Attention of queries, keys and values of `tokens` of the sequence: the products one by one.
    pub(crate) fn attend(
        &self,
        [queries, keys, values]: [&Tensor; 3],
        causal: bool,
        (pass, tokens): (&Pass, &Places),
    ) -> Result<Tensor> {
        let shape = queries.size();
        let repeats = shape[1] / keys.size()[1];
        let (keys, values) = (repeated(keys, repeats)?, repeated(values, repeats)?);
        #[expect(clippy::cast_precision_loss, reason = "no head has 2⁵³ columns")]
        let scale = 1.0 / (shape[3] as f64).sqrt();
        let mut scores = queries.f_mul_scalar(scale)?.f_matmul(&keys.f_transpose(2, 3)?)?;
        if causal {
            let ones = Tensor::f_ones([shape[2], shape[2]], (Kind::Bool, scores.device()))?;
            scores = scores.f_masked_fill(&ones.f_triu(1)?, f64::NEG_INFINITY)?;
        }
        let probabilities = scores.f_softmax(-1, None::<Kind>)?;
        let places = [self.heads(shape[1]), tokens.clone(), tokens.clone()];
        let kept = self.dropout.at(&probabilities, pass, &places)?;
        Ok(kept.f_matmul(&values)?)
    }

    /// This rank's heads, so many, among all.
    pub(crate) fn heads(&self, count: i64) -> Places {
        run(self.first_head, count)
    }
}

/// Each head so many times, one behind the other.
pub(super) fn repeated(x: &Tensor, repeats: i64) -> Result<Tensor> {
    if repeats == 1 {
        return Ok(x.shallow_clone());
    }
    let shape = x.size();
    let expanded = [shape[0], shape[1], repeats, shape[2], shape[3]];
    let flat = [shape[0], shape[1] * repeats, shape[2], shape[3]];
    Ok(x.f_unsqueeze(2)?.f_expand(expanded, false)?.f_reshape(flat)?)
}
