//! The memory of what a rank holds: given to a snapshot, and filled from a checkpoint or from weights. Memory on the CPU is read and written in
//! place; of a GPU's a part is copied to the host when the first of its bytes is asked for.

use std::cell::OnceCell;

use phalanx_checkpoint::{
    flat_range, scatter, Content, Extent, Snapshot, Strided, Tensors, Weights,
};
use tch::{Device, Kind, Tensor};

use super::held::{kind_of, Held, HeldPart};
use super::weights::of_file;
use crate::part::{boxes, Both};
use crate::store::flat::{dense_bytes, dense_bytes_mut};
use crate::{Cut, Error, Result};

type Cause = Box<dyn std::error::Error + Send + std::marker::Sync>;

/// Memory of a part, on whatever device.
struct PartMemory<'a> {
    held: &'a Held,
    part: &'a HeldPart,
    /// The box of it that this is.
    both: Both,
    on_host: &'a OnceCell<Tensor>,
}

impl Content for PartMemory<'_> {
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
            .copy(&self.both.in_part(extent), out)
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
        let shape = of.saved_shape();
        for extent in flat_range(&of.shape, &of.strides, part.range.clone())? {
            for both in boxes(of.cut.as_ref(), &extent) {
                let whole = both.whole.clone();
                let content = PartMemory { held: of, part, both, on_host };
                snapshot.part(&of.name, of.dtype, &shape, whole, content);
            }
        }
    }
    Ok(())
}

/// Fills what is held from `source`.
pub(super) fn fill(held: &mut [Held], source: &dyn Tensors) -> Result<()> {
    for of in held {
        let Held { name, dtype, shape, strides, parts, cut } = of;
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
                read_run(source, name, (&extent, cut.as_ref()), (run, strides), element_bytes)?;
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
    (extent, cut): (&Extent, Option<&Cut>),
    (run, strides): (&mut [u8], &[u64]),
    element_bytes: usize,
) -> Result<()> {
    let first = offset(extent, strides);
    for Both { part, whole } in boxes(cut, extent) {
        if part == *extent && is_last_fastest(strides) {
            source.read(name, &whole, run)?;
            continue;
        }
        let mut values = vec![0; usize::try_from(part.elements()).unwrap_or(0) * element_bytes];
        source.read(name, &whole, &mut values)?;
        scatter(&part, &values, run, (strides, first), element_bytes)?;
    }
    Ok(())
}

/// Where a box begins in memory with these strides.
fn offset(extent: &Extent, strides: &[u64]) -> u64 {
    extent.start().iter().zip(strides).map(|(start, stride)| start * stride).sum()
}

/// Bytes of a tensor that are read at once.
const PIECE_BYTES: u64 = 8 << 20;

/// Fills a tensor that is held from the tensor `name` of weights, which has its shape and may be of another kind: in pieces. libtorch
/// converts them, as `copy_` does.
pub(super) fn fill_converted(of: &Held, weights: &Weights, name: &str) -> Result<()> {
    let Some(spec) = weights.spec(name) else { return Ok(()) };
    let Some(kind) = kind_of(spec.dtype) else { return Ok(()) };
    let piece = PIECE_BYTES / spec.dtype.bytes() as u64;
    for part in &of.parts {
        let mut at = 0;
        while at < part.range.end - part.range.start {
            let start = part.range.start + at;
            let end = part.range.end.min(start + piece);
            // The boxes are one after the other in memory.
            for extent in flat_range(&of.shape, &of.strides, start..end)? {
                let len = extent.elements();
                let run = part.memory.f_narrow(0, signed(at), signed(len))?;
                let first = offset(&extent, &of.strides);
                for both in boxes(of.cut.as_ref(), &extent) {
                    let from = signed(offset(&both.part, &of.strides) - first);
                    let place = run.f_narrow(0, from, signed(len) - from)?;
                    let is_all = both.part == extent;
                    fill_run((of, is_all), place, &both.whole, (weights, name, kind))?;
                }
                at += len;
            }
        }
    }
    Ok(())
}

/// Fills memory from a box of weights: with the strides of the tensor that is held, and as one run of it where it `is_all` of one.
fn fill_run(
    (of, is_all): (&Held, bool),
    mut run: Tensor,
    extent: &Extent,
    (weights, name, kind): (&Weights, &str, Kind),
) -> Result<()> {
    let read = |memory: &mut Tensor| {
        let bytes = dense_bytes_mut(&of.name, memory)?;
        weights.read(name, extent, bytes).map_err(|error| of_file("reading", error))
    };
    if is_all && run.device() == Device::Cpu && run.kind() == kind && is_last_fastest(&of.strides) {
        return read(&mut run);
    }
    let numbers = |list: &[u64]| list.iter().map(|&number| signed(number)).collect::<Vec<_>>();
    let shape = numbers(extent.len());
    let mut values = Tensor::f_empty(&shape, (kind, Device::Cpu))?;
    read(&mut values)?;
    let mut target = run.f_as_strided(&shape, numbers(&of.strides), None)?;
    Ok(tch::no_grad(|| target.f_copy_(&values).map(drop))?)
}

/// Whether the last dimension is the fastest.
fn is_last_fastest(strides: &[u64]) -> bool {
    strides.is_sorted_by(|before, after| before >= after)
}

fn signed(len: u64) -> i64 {
    i64::try_from(len).unwrap_or(i64::MAX)
}

/// One line for each tensor that `source` has not as it is held here.
pub(super) fn misfits(held: &[Held], source: &dyn Tensors) -> Vec<String> {
    let misfit = |of: &Held| {
        let (name, dtype, shape) = (&of.name, of.dtype, of.saved_shape());
        match source.spec(name) {
            None => Some(format!("  {name}: missing, here it is {dtype} {shape:?}\n")),
            Some(spec) if (spec.dtype, spec.shape) == (dtype, &shape) => None,
            Some(spec) => Some(format!(
                "  {name}: {} {:?}, here it is {dtype} {shape:?}\n",
                spec.dtype, spec.shape
            )),
        }
    };
    held.iter().filter_map(misfit).collect()
}

impl From<phalanx_checkpoint::Error> for Error {
    fn from(error: phalanx_checkpoint::Error) -> Self {
        Error::Checkpoint(Box::new(error))
    }
}
