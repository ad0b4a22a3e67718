//! Broadcast of tensors from rank 0, many in one message.

use phalanx_comm::Group;
use tch::{Device, Tensor};

use crate::parameter::Named;
use crate::Result;

/// Bytes sent at once: bounds the copy that is staged (PyTorch's `broadcast_bucket_size`).
const STAGED_BYTES_MAX: usize = 250 << 20;

/// Gives every rank the values of rank 0. Collective: the same tensors, in the same order, on every rank.
pub(crate) fn tensors(group: &mut Group, tag: &str, tensors: &[Named]) -> Result<()> {
    if group.world_size() == 1 {
        return Ok(());
    }
    let mut start = 0;
    while start < tensors.len() {
        let mut end = start;
        let mut bytes = 0;
        while end < tensors.len() && (end == start || bytes < STAGED_BYTES_MAX) {
            bytes += bytes_of(&tensors[end].tensor);
            end += 1;
        }
        broadcast(group, tag, &tensors[start..end], bytes)?;
        start = end;
    }
    Ok(())
}

fn bytes_of(tensor: &Tensor) -> usize {
    tensor.numel() * tensor.kind().elt_size_in_bytes()
}

fn broadcast(group: &mut Group, tag: &str, tensors: &[Named], bytes: usize) -> Result<()> {
    let mut staged = vec![0_u8; bytes];
    if group.rank() == 0 {
        let mut at = 0;
        for named in tensors {
            let len = bytes_of(&named.tensor);
            let dense = named.tensor.f_to_device(Device::Cpu)?.f_contiguous()?;
            dense.f_copy_data_u8(&mut staged[at..at + len], dense.numel())?;
            at += len;
        }
    }
    group.tagged(tag).broadcast(&mut staged[..], 0)?.wait()?;
    if group.rank() != 0 {
        let mut at = 0;
        for named in tensors {
            let len = bytes_of(&named.tensor);
            let (size, kind) = (named.tensor.size(), named.tensor.kind());
            let values = Tensor::f_from_data_size(&staged[at..at + len], &size, kind)?;
            tch::no_grad(|| named.tensor.shallow_clone().f_copy_(&values))?;
            at += len;
        }
    }
    Ok(())
}
