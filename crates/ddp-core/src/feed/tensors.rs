//! Columns as tensors.

use phalanx_data::{Batch, Column, DType};
use tch::{Kind, Tensor};

use crate::error::Result;

/// The kind of tensor that holds a column.
pub(super) fn kind(column: &Column) -> Result<Kind> {
    Ok(match column.dtype {
        DType::Bool => Kind::Bool,
        DType::U8 => Kind::Uint8,
        DType::I8 => Kind::Int8,
        DType::I16 => Kind::Int16,
        DType::I32 => Kind::Int,
        DType::I64 => Kind::Int64,
        DType::F16 => Kind::Half,
        DType::BF16 => Kind::BFloat16,
        DType::F32 => Kind::Float,
        DType::F64 => Kind::Double,
        other => {
            return Err(phalanx_data::Error::InvalidOption {
                option: "columns",
                value: format!("{} ({other})", column.name),
                reason: "libtorch has no tensors of this type through tch: make it a wider one"
                    .to_owned(),
            }
            .into())
        }
    })
}

/// Whether all columns can be tensors.
pub(super) fn check(columns: &[Column]) -> Result<()> {
    columns.iter().try_for_each(|column| kind(column).map(drop))
}

/// Copies a batch into tensors.
pub(super) fn on_cpu(batch: &Batch) -> Result<Vec<Tensor>> {
    let tensor = |(at, column): (usize, &Column)| {
        let shape = batch.column_shape(at);
        Ok(Tensor::f_from_data_size(batch.column_bytes(at), &shape, kind(column)?)?)
    };
    batch.columns().iter().enumerate().map(tensor).collect()
}
