//! Keys and values of tokens that were computed before: for text that is made token after token.

use tch::{Kind, Tensor};

use super::plain::repeated;
use crate::error::Result;

/// The keys and values that one [`Attention`](super::Attention) has of the tokens so far, of this rank's heads.
///
/// # Example
/// ```
/// use phalanx_model_parallel::tensor::KeyValues;
///
/// assert_eq!(KeyValues::default().tokens(), 0);
/// ```
#[derive(Debug, Default)]
pub struct KeyValues(Option<[Tensor; 2]>);

impl KeyValues {
    /// Of how many tokens.
    #[must_use]
    pub fn tokens(&self) -> i64 {
        self.0.as_ref().map_or(0, |[keys, _]| keys.size()[2])
    }

    /// Adds those of the next tokens, and returns all.
    pub(super) fn grown(&mut self, keys: &Tensor, values: &Tensor) -> Result<&[Tensor; 2]> {
        let grown = match &self.0 {
            None => [keys.f_contiguous()?, values.f_contiguous()?],
            Some([before, of_before]) => {
                [Tensor::f_cat(&[before, keys], 2)?, Tensor::f_cat(&[of_before, values], 2)?]
            }
        };
        Ok(self.0.insert(grown))
    }
}

/// The output of the last tokens' queries, each of which attends to itself and all before it.
pub(super) fn of_last(queries: &Tensor, [keys, values]: &[Tensor; 2]) -> Result<Tensor> {
    let (last, all) = (queries.size()[2], keys.size()[2]);
    let repeats = queries.size()[1] / keys.size()[1];
    let (keys, values) = (repeated(keys, repeats)?, repeated(values, repeats)?);
    let mask = match last {
        1 => None,
        _ => {
            let ones = Tensor::f_ones([last, all], (Kind::Bool, queries.device()))?;
            Some(ones.f_tril(all - last)?)
        }
    };
    let mask = mask.as_ref();
    Ok(Tensor::f_scaled_dot_product_attention(
        queries, &keys, &values, mask, 0.0, false, None, false,
    )?)
}
