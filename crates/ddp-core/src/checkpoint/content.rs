//! The memory of what a rank holds: given to a snapshot, and filled from a checkpoint. Memory on the CPU is read and written in
//! place; of a GPU's a part is copied to the host when the first of its bytes is asked for.

use std::cell::OnceCell;

use phalanx_checkpoint::{flat_range, scatter, Content, Extent, Snapshot, Strided, Tensors};
use tch::{Device, Tensor};

use super::held::{Held, Part};
use crate::store::flat::{dense_bytes, dense_bytes_mut};
use crate::{Error, Result};

type Cause = Box<dyn std::error::Error + Send + std::marker::Sync>;

/// Memory of a part, on whatever device.
struct Memory<'a> {
    held: &'a Held,
    part: &'a Part,
    on_host: &'a OnceCell<Tensor>,
}

impl Content for Memory<'_> {
    fn copy(&self, extent: &Extent, out: &mut [u8]) -> Result<(), Cause> {
        let tensor = match self.part.memory.device() {
            Device::Cpu => &self.part.memory,
            _ => match self.on_host.get() {
                Some(copied) => copied,
                None => {
                    let copied = self.part.memory.f_to_device(Device::Cpu)?;
                    self.on_host.get_or_init(|| copied)
                }
            },
        };
        let bytes = dense_bytes(&self.held.name, tensor)?;
        let element_bytes = self.held.dtype.bytes();
        Strided::new(bytes, &self.held.strides, self.part.range.start, element_bytes)
            .copy(extent, out)
    }
}

/// Room for what is copied from GPUs, as long as a snapshot of `held` lives.
pub(super) fn rooms(held: &[Held]) -> Vec<OnceCell<Tensor>> {
    held.iter().flat_map(|of| &of.parts).map(|_| OnceCell::new()).collect()
}

/// Adds everything that is held to a snapshot.
pub(super) fn offer<'a>(
    snapshot: &mut Snapshot<'a>,
    held: &'a [Held],
    rooms: &'a [OnceCell<Tensor>],
) -> Result<()> {
    let parts = held.iter().flat_map(|of| of.parts.iter().map(move |part| (of, part)));
    for ((of, part), on_host) in parts.zip(rooms) {
        for extent in flat_range(&of.shape, &of.strides, part.range.clone())? {
            let content = Memory { held: of, part, on_host };
            snapshot.part(&of.name, of.dtype, &of.shape, extent, content);
        }
    }
    Ok(())
}

/// Fills what is held from `source`.
pub(super) fn fill(held: &mut [Held], source: &dyn Tensors) -> Result<()> {
    for of in held {
        let Held { name, dtype, shape, strides, parts } = of;
        for part in parts {
            let element_bytes = dtype.bytes();
            let mut host = match part.memory.device() {
                Device::Cpu => part.memory.shallow_clone(),
                _ => part.memory.f_to_device(Device::Cpu)?,
            };
            let bytes = dense_bytes_mut(name, &mut host)?;
            let mut rest = bytes;
            // The boxes are one after the other in memory.
            for extent in flat_range(shape, strides, part.range.clone())? {
                let len = usize::try_from(extent.elements()).unwrap_or(0) * element_bytes;
                let (run, behind) = rest.split_at_mut(len);
                rest = behind;
                read_run(source, name, &extent, (run, strides), element_bytes)?;
            }
            if part.memory.device() != Device::Cpu {
                tch::no_grad(|| part.memory.f_copy_(&host).map(drop))?;
            }
        }
    }
    Ok(())
}

/// Reads a box that is one run of memory with these strides.
fn read_run(
    source: &dyn Tensors,
    name: &str,
    extent: &Extent,
    (run, strides): (&mut [u8], &[u64]),
    element_bytes: usize,
) -> Result<()> {
    if strides.is_sorted_by(|before, after| before >= after) {
        return Ok(source.read(name, extent, run)?);
    }
    let mut values = vec![0; run.len()];
    source.read(name, extent, &mut values)?;
    let first = extent.start().iter().zip(strides).map(|(start, stride)| start * stride).sum();
    Ok(scatter(extent, &values, run, (strides, first), element_bytes)?)
}

/// One line for each tensor that `source` has not as it is held here.
pub(super) fn misfits(held: &[Held], source: &dyn Tensors) -> Vec<String> {
    let misfit = |of: &Held| match source.spec(&of.name) {
        None => Some(format!("  {}: missing, here it is {} {:?}\n", of.name, of.dtype, of.shape)),
        Some(spec) if (spec.dtype, spec.shape) == (of.dtype, &of.shape) => None,
        Some(spec) => Some(format!(
            "  {}: {} {:?}, here it is {} {:?}\n",
            of.name, spec.dtype, spec.shape, of.dtype, of.shape
        )),
    };
    held.iter().filter_map(misfit).collect()
}

impl From<phalanx_checkpoint::Error> for Error {
    fn from(error: phalanx_checkpoint::Error) -> Self {
        Error::Checkpoint(Box::new(error))
    }
}
