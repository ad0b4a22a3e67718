//! Matrices in a bucket and in wires: by the pure functions in memory of the host, by libtorch's on a GPU.

use tch::{Kind, Tensor};

use super::low_rank;
use super::matrices::Matrix;
use crate::hooks::Wire;
use crate::store::flat::{dense_bytes, dense_bytes_mut};
use crate::Result;

fn size(value: usize) -> i64 {
    i64::try_from(value).unwrap_or(i64::MAX)
}

fn shaped(flat: &Tensor, range: &std::ops::Range<usize>, shape: (usize, usize)) -> Result<Tensor> {
    let part = flat.f_narrow(0, size(range.start), size(range.len()))?;
    Ok(part.f_view([size(shape.0), size(shape.1)])?)
}

/// A matrix of a bucket, in f32.
pub(super) fn matrix(gradients: &Tensor, of: &Matrix) -> Result<Tensor> {
    Ok(shaped(gradients, &of.range, (of.rows, of.columns))?.f_to_kind(Kind::Float)?)
}

/// Its P, in its place.
pub(super) fn p(wire: &Wire, of: &Matrix) -> Result<Tensor> {
    shaped(wire.tensor(), &of.p, (of.rows, of.rank))
}

/// Its Q, in its place.
pub(super) fn q(wire: &Wire, of: &Matrix) -> Result<Tensor> {
    shaped(wire.tensor(), &of.q, (of.columns, of.rank))
}

/// Makes the columns of an f32 matrix orthonormal.
pub(super) fn orthonormalise(matrix: &mut Tensor) -> Result<()> {
    let columns = matrix.size().get(1).copied().unwrap_or(1);
    if matrix.device().is_cuda() {
        return tch::no_grad(|| on_device(matrix, columns));
    }
    let values = bytemuck::cast_slice_mut(dense_bytes_mut("a thin matrix", matrix)?);
    low_rank::orthonormalise(values, usize::try_from(columns).unwrap_or(1));
    Ok(())
}

fn on_device(matrix: &Tensor, columns: i64) -> Result<()> {
    for index in 0..columns {
        let mut column = matrix.f_select(1, index)?;
        let before = column.f_norm()?;
        for _ in 0..2 {
            for other in 0..index {
                let other = matrix.f_select(1, other)?;
                let along = other.f_mul(&column)?.f_sum(Kind::Float)?;
                drop(column.f_sub_(&other.f_mul(&along)?)?);
            }
        }
        let norm = column.f_norm()?;
        let depends = norm.f_le_tensor(&before.f_mul_scalar(low_rank::DEPENDENT)?)?;
        drop(column.f_div_(&norm)?.f_masked_fill_(&depends, 0.0)?);
    }
    Ok(())
}

/// Writes P Qᵀ to `target`, flat; adds what was there, less that, to `lost`.
pub(super) fn expand(
    (p, q): (&Tensor, &Tensor),
    target: &Tensor,
    lost: Option<Tensor>,
) -> Result<()> {
    let mut target = target.shallow_clone();
    if target.device().is_cuda() || target.kind() != Kind::Float {
        return tch::no_grad(|| {
            let product = p.f_mm(&q.f_tr()?)?.f_view([-1])?;
            if let Some(mut lost) = lost {
                drop(lost.f_add_(&target.f_sub(&product)?)?);
            }
            Ok(target.f_copy_(&product).map(drop)?)
        });
    }
    let rank = p.size().get(1).and_then(|&rank| usize::try_from(rank).ok()).unwrap_or(1);
    let mut lost = lost;
    let lost = match &mut lost {
        Some(lost) => Some(bytemuck::cast_slice_mut(dense_bytes_mut("lost", lost)?)),
        None => None,
    };
    let p = bytemuck::cast_slice(dense_bytes("P", p)?);
    let q = bytemuck::cast_slice(dense_bytes("Q", q)?);
    let product = bytemuck::cast_slice_mut(dense_bytes_mut("gradients", &mut target)?);
    low_rank::expand((p, q), rank, product, lost);
    Ok(())
}
