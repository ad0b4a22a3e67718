//! The expert of Mixtral.

use super::Expert;
use crate::error::Result;
use crate::layer::{linear, Builder, Init};

/// `w2 (silu(w1 x) ⊙ w3 x)`: variables `w1.weight` and `w3.weight`, `[hidden, width]`, and `w2.weight`, `[width, hidden]`, named as in transformers' files.
///
/// # Errors
/// libtorch's own.
pub fn mixtral_expert(
    builder: &Builder<'_>,
    (width, hidden): (i64, i64),
    init: Init,
) -> Result<Expert> {
    let weight = |name: &str, shape: &[i64]| (builder / name).whole("weight", shape, init);
    let w1 = weight("w1", &[hidden, width])?;
    let w2 = weight("w2", &[width, hidden])?;
    let w3 = weight("w3", &[hidden, width])?;
    Ok(Box::new(move |rows| {
        let gate = linear(rows, &w1, None)?.f_silu()?;
        Ok(linear(&gate.f_mul(&linear(rows, &w3, None)?)?, &w2, None)?)
    }))
}
