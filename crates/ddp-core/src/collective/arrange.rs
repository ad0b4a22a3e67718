//! Tensors as collectives carry them: parts one behind the other in rank order.

use tch::{Kind, Tensor};

use crate::{Error, Result};

/// `dim` counted from the front.
pub(super) fn dimension(tensor: &Tensor, dim: i64, tag: &str) -> Result<usize> {
    let shape = tensor.size();
    let count = i64::try_from(shape.len()).unwrap_or(i64::MAX);
    let counted = if dim < 0 { dim + count } else { dim };
    match usize::try_from(counted) {
        Ok(counted) if counted < shape.len() => Ok(counted),
        _ => Err(Error::BadInput {
            name: tag.to_owned(),
            actual: format!("a tensor of shape {shape:?}"),
            expected: format!("one with a dimension {dim}"),
        }),
    }
}

/// The length of each of the equal parts along `dim`.
pub(super) fn divisible(tensor: &Tensor, count: usize, dim: usize, tag: &str) -> Result<i64> {
    let (shape, count) = (tensor.size(), signed(count));
    if shape[dim] % count == 0 {
        return Ok(shape[dim] / count);
    }
    Err(Error::BadInput {
        name: tag.to_owned(),
        actual: format!("a tensor of shape {shape:?}"),
        expected: format!("a multiple of the {count} ranks in dimension {dim}"),
    })
}

/// `[parts, …]`: a view of the equal parts along `dim`.
pub(super) fn parts(tensor: &Tensor, count: usize, dim: usize, tag: &str) -> Result<Tensor> {
    let each = divisible(tensor, count, dim, tag)?;
    let mut shape = tensor.size();
    shape.splice(dim..=dim, [signed(count), each]);
    Ok(tensor.f_detach()?.f_reshape(shape)?.f_movedim_int(signed(dim), 0)?)
}

/// A tensor of the parts in `flat`, each of `shape`, one behind the other along `dim`: a copy.
pub(super) fn joined(flat: &Tensor, count: usize, shape: &[i64], dim: usize) -> Result<Tensor> {
    let stacked = [&[signed(count)], shape].concat();
    let mut whole = shape.to_vec();
    whole[dim] *= signed(count);
    // Moved, the count stands before `dim`, and both are merged.
    let moved = flat.f_view(stacked.as_slice())?.f_movedim_int(0, signed(dim))?;
    Ok(moved.f_contiguous()?.f_detach_copy()?.f_view(whole.as_slice())?)
}

/// How a tensor of a kind that no collective knows becomes one again.
#[derive(Clone, Copy, Debug)]
pub(super) struct Back(Option<Kind>);

impl Back {
    pub(super) fn undo(self, tensor: &Tensor) -> Result<Tensor> {
        let copy = tensor.f_detach_copy()?;
        Ok(match self.0 {
            None => copy,
            Some(kind) => copy.f_view_dtype(kind)?.f_squeeze_dim(-1)?,
        })
    }
}

/// The tensor as data that is moved and not computed with; kinds that groups do not know travel as their bytes, in a last dimension of
/// their own.
pub(super) fn carried(tensor: &Tensor) -> Result<(Tensor, Back)> {
    let tensor = tensor.f_detach()?;
    let kind = tensor.f_kind()?;
    Ok(match kind {
        Kind::Float | Kind::Double | Kind::Half | Kind::BFloat16 | Kind::Uint8 | Kind::Int => {
            (tensor, Back(None))
        }
        _ => {
            let bytes = tensor.f_contiguous()?.f_unsqueeze(-1)?.f_view_dtype(Kind::Uint8)?;
            (bytes, Back(Some(kind)))
        }
    })
}

fn signed(number: usize) -> i64 {
    i64::try_from(number).unwrap_or(i64::MAX)
}
