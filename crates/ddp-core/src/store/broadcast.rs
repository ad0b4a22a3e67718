//! Tensors from one rank to all, or their mean, many in one message.

use phalanx_comm::{Avg, Group};
use tch::{Device, Kind, Tensor};

use super::model::Named;
use crate::{shim, Result};

/// Bytes sent at once: bounds the copy that is staged (PyTorch's `broadcast_bucket_size`).
const STAGED_BYTES_MAX: usize = 250 << 20;

/// Gives every rank the values of `root`. Collective: the same tensors, in the same order, on every rank.
/// Where a value changes, graphs that saved the tensor are not told: they saw what it was.
pub(crate) fn tensors(group: &mut Group, tag: &str, root: usize, tensors: &[&Named]) -> Result<()> {
    if group.world_size() == 1 {
        return Ok(());
    }
    let (mut batch, mut bytes) = (Vec::new(), 0);
    for named in tensors {
        bytes += bytes_of(&named.tensor);
        batch.push(&named.tensor);
        if bytes >= STAGED_BYTES_MAX {
            broadcast(group, tag, root, &batch, bytes)?;
            batch.clear();
            bytes = 0;
        }
    }
    if batch.is_empty() {
        return Ok(());
    }
    broadcast(group, tag, root, &batch, bytes)
}

/// As [`tensors`], of a few small ones without names.
pub(crate) fn plain(group: &mut Group, tag: &str, root: usize, tensors: &[&Tensor]) -> Result<()> {
    let bytes = tensors.iter().map(|tensor| bytes_of(tensor)).sum();
    broadcast(group, tag, root, tensors, bytes)
}

/// Makes floating-point tensors their mean over the ranks. Collective, as [`tensors`].
pub(crate) fn mean(group: &mut Group, tag: &str, tensors: &[&Named]) -> Result<()> {
    if group.world_size() == 1 || tensors.is_empty() {
        return Ok(());
    }
    let mut staged = Vec::new();
    for named in tensors {
        let dense = named.tensor.f_to_device(Device::Cpu)?.f_to_kind(Kind::Double)?;
        let at = staged.len();
        staged.resize(at + dense.numel(), 0.0_f64);
        dense.f_contiguous()?.f_copy_data(&mut staged[at..], dense.numel())?;
    }
    group.tagged(tag).all_reduce(&mut staged[..], Avg)?.wait()?;
    let mut at = 0;
    for named in tensors {
        let len = named.tensor.numel();
        let values = Tensor::f_from_slice(&staged[at..at + len])?;
        shim::write(&named.tensor, &values.f_view(named.tensor.size().as_slice())?)?;
        at += len;
    }
    Ok(())
}

fn bytes_of(tensor: &Tensor) -> usize {
    tensor.numel() * tensor.kind().elt_size_in_bytes()
}

fn broadcast(
    group: &mut Group,
    tag: &str,
    root: usize,
    tensors: &[&Tensor],
    bytes: usize,
) -> Result<()> {
    let mut mine = vec![0_u8; bytes];
    let mut at = 0;
    for tensor in tensors {
        let len = bytes_of(tensor);
        let dense = tensor.f_detach()?.f_to_device(Device::Cpu)?.f_contiguous()?;
        dense.f_copy_data_u8(&mut mine[at..at + len], dense.numel())?;
        at += len;
    }
    let mut staged = if group.rank() == root { mine.clone() } else { vec![0_u8; bytes] };
    group.tagged(tag).broadcast(&mut staged[..], root)?.wait()?;
    at = 0;
    for tensor in tensors {
        let len = bytes_of(tensor);
        let (size, kind) = (tensor.size(), tensor.kind());
        if staged[at..at + len] != mine[at..at + len] {
            let values = Tensor::f_from_data_size(&staged[at..at + len], &size, kind)?;
            shim::write(tensor, &values)?;
        }
        at += len;
    }
    Ok(())
}
