//! Columns as tensors.
#![expect(unsafe_code, reason = "gate: tensors over the memory of batches")]

use std::any::Any;
use std::sync::Arc;

use phalanx_data::{Batch, Column, DType};
use tch::{Device, Kind, Tensor};

use crate::error::Result;
use crate::shim::tensor_over_memory;

/// The kind of tensor that holds a column's bytes. Unsigned numbers have that of signed ones until they are [widened](widen).
pub(super) fn kind(column: &Column) -> Result<Kind> {
    Ok(match column.dtype {
        DType::Bool => Kind::Bool,
        DType::U8 => Kind::Uint8,
        DType::I8 => Kind::Int8,
        DType::I16 | DType::U16 => Kind::Int16,
        DType::I32 | DType::U32 => Kind::Int,
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

/// Makes numbers without a sign, of which the bits are there, those numbers.
pub(super) fn widen(tensor: &mut Tensor, column: &Column) -> Result<()> {
    let bits = match column.dtype {
        DType::U16 => 0xFFFF_i64,
        DType::U32 => 0xFFFF_FFFF,
        _ => return Ok(()),
    };
    *tensor = tensor.f_to_kind(Kind::Int64)?.f_bitwise_and(bits)?;
    Ok(())
}

/// Whether all columns can be tensors.
pub(super) fn check(columns: &[Column]) -> Result<()> {
    columns.iter().try_for_each(|column| kind(column).map(drop))
}

/// A batch as tensors over its own memory, which goes back to the loader when the last of them is gone.
pub(super) fn on_cpu(mut batch: Batch) -> Result<Vec<Tensor>> {
    let memory: Vec<(*mut u8, usize)> = (0..batch.columns().len())
        .map(|at| {
            let bytes = batch.column_bytes_mut(at);
            (bytes.as_mut_ptr(), bytes.len())
        })
        .collect();
    let batch = Arc::new(batch);
    let tensor = |(at, column): (usize, &Column)| {
        let ((start, bytes), kind) = (memory[at], kind(column)?);
        let keep_alive: Box<dyn Any + Send> = Box::new(Arc::clone(&batch));
        let len = bytes / column.dtype.bytes();
        // SAFETY: the memory of the column, aligned to 64 bytes, of exactly this size. It stays where it is while the batch
        // lives, which `keep_alive` sees to, and nobody reads or writes it but through the tensor: the batch itself is
        // in nobody else's hands.
        let flat = unsafe { tensor_over_memory(start.cast(), len, kind, Device::Cpu, keep_alive) }?;
        let mut shaped = flat.f_view(&batch.column_shape(at)[..])?;
        widen(&mut shaped, column)?;
        Ok(shaped)
    };
    batch.columns().iter().enumerate().map(tensor).collect()
}
