//! The expert of Mixtral.

use super::Expert;
use crate::error::Result;
use crate::layer::{Builder, Init};
use crate::tensor::{ColumnLinear, LinearOptions, RowLinear, SwiGlu, TensorParallel};

/// `w2 (silu(w1 x) ⊙ w3 x)`: variables `w1.weight` and `w3.weight`, `[hidden, width]`, and `w2.weight`, `[width, hidden]`, named as in transformers' files. Each rank of `tp` has 1/n
/// of `hidden`.
///
/// # Errors
/// [`Error::Indivisible`](crate::Error::Indivisible) where `hidden` cannot be cut so; libtorch's own.
pub fn mixtral_expert(
    builder: &Builder<'_>,
    (width, hidden): (i64, i64),
    init: Init,
    tp: &TensorParallel,
) -> Result<Expert> {
    let options = || LinearOptions { bias: false, init, ..LinearOptions::default() };
    let gate = ColumnLinear::new(&(builder / "w1"), width, hidden, options(), tp)?;
    let down = RowLinear::new(&(builder / "w2"), hidden, width, options(), tp)?;
    let up = ColumnLinear::new(&(builder / "w3"), width, hidden, options(), tp)?;
    let expert = SwiGlu::new(gate, up, down)?;
    Ok(Box::new(move |rows| expert.forward(rows)))
}
