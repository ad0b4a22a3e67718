//! Gradients of pieces that several ranks have: each rank's is of its own heads, and the whole is their sum.

use phalanx_ddp_core::Result;
use tch::Tensor;

use super::cut::{Piece, Repeated};
use super::parallel::TensorParallel;

/// The views of a gradient that are of repeated pieces.
pub(super) fn views(
    gradient: &Tensor,
    dim: i64,
    pieces: &[Piece],
) -> Result<Vec<(Tensor, Repeated)>> {
    let mut start = 0;
    let mut views = Vec::new();
    for piece in pieces {
        if let Some(repeated) = piece.repeated {
            views.push((gradient.f_narrow(dim, start, piece.len())?, repeated));
        }
        start += piece.len();
    }
    Ok(views)
}

/// Puts the sum over the ranks that have a piece in its place. One all-reduce of all pieces of all ranks: a rank adds to its own and zero
/// to others, so all that have a piece get the same bits.
pub(super) fn sum(tp: &TensorParallel, tag: &str, views: Vec<(Tensor, Repeated)>) -> Result<()> {
    if views.is_empty() || tp.ranks() == 1 {
        return Ok(());
    }
    let mut spread = Vec::new();
    for (view, repeated) in &views {
        let mine = view.f_reshape([1, -1])?;
        let after = repeated.count - 1 - repeated.index;
        // [units, elements], with the rank's own unit in its place.
        spread.push(mine.f_constant_pad_nd([0, 0, repeated.index, after])?.f_flatten(0, -1)?);
    }
    let sums = tp.group.all_reduce(&Tensor::f_cat(&spread, 0)?, tag)?;
    let mut start = 0;
    for (mut view, repeated) in views {
        let len = view.size().iter().product::<i64>();
        let mine = sums.f_narrow(0, start + repeated.index * len, len)?;
        view.f_copy_(&mine.f_view(view.size().as_slice())?)?;
        start += repeated.count * len;
    }
    Ok(())
}
