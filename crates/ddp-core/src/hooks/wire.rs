//! Memory that travels: registered with the group, and a tensor over it.
#![expect(unsafe_code, reason = "gate: gives a registered region's memory to libtorch")]

use half::{bf16, f16};
use phalanx_comm::{Element, Float, Group, Region, ScaledSum, Work};
use tch::{Device, Kind, Tensor};

use crate::{shim, Error, Result};

/// A region of one of the kinds that travel.
#[derive(Debug)]
enum Memory {
    F32(Region<f32>),
    F64(Region<f64>),
    F16(Region<f16>),
    BF16(Region<bf16>),
    U8(Region<u8>),
    I32(Region<i32>),
}

/// Runs `$body` with `$region` bound to the typed region.
macro_rules! with_region {
    ($memory:expr, $region:ident => $body:expr) => {
        match $memory {
            Memory::F32($region) => $body,
            Memory::F64($region) => $body,
            Memory::F16($region) => $body,
            Memory::BF16($region) => $body,
            Memory::U8($region) => $body,
            Memory::I32($region) => $body,
        }
    };
}

/// A flat tensor in memory that collectives work on in place; of the kinds Float, Double, Half, `BFloat16`, Uint8 and Int. Zero
/// when it is new; one that was used before holds what it held.
#[derive(Debug)]
pub struct Wire {
    tensor: Tensor,
    memory: Memory,
}

impl Wire {
    /// Collective.
    fn allocate(group: &mut Group, kind: Kind, device: Device, len: usize) -> Result<Self> {
        match kind {
            Kind::Float => Self::over(allocate(group, device, len)?, kind, device, Memory::F32),
            Kind::Double => Self::over(allocate(group, device, len)?, kind, device, Memory::F64),
            Kind::Half => Self::over(allocate(group, device, len)?, kind, device, Memory::F16),
            Kind::BFloat16 => Self::over(allocate(group, device, len)?, kind, device, Memory::BF16),
            Kind::Uint8 => Self::over(allocate(group, device, len)?, kind, device, Memory::U8),
            Kind::Int => Self::over(allocate(group, device, len)?, kind, device, Memory::I32),
            _ => Err(Error::UnsupportedKind { name: "a hook's wire".to_owned(), kind }),
        }
    }

    fn over<T: Element>(
        region: Region<T>,
        kind: Kind,
        device: Device,
        wrap: impl FnOnce(Region<T>) -> Memory,
    ) -> Result<Self> {
        // SAFETY: the region holds `len` elements of the kind, and a clone of it keeps them mapped.
        let tensor = unsafe {
            shim::tensor_over_memory(
                region.as_ptr().cast(),
                region.len(),
                kind,
                device,
                Box::new(region.clone()),
            )
        }?;
        Ok(Self { tensor, memory: wrap(region) })
    }

    /// The flat tensor.
    pub fn tensor(&self) -> &Tensor {
        &self.tensor
    }

    /// Elements.
    #[must_use]
    pub fn len(&self) -> usize {
        self.tensor.numel()
    }

    /// Whether it has no elements.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Bytes.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.len() * self.tensor.kind().elt_size_in_bytes()
    }

    pub(super) fn reduce(
        &self,
        group: &mut Group,
        scale: f64,
        to_all: bool,
    ) -> Result<Work<'static>> {
        match &self.memory {
            Memory::F32(region) => reduce(group, region, scale, to_all),
            Memory::F64(region) => reduce(group, region, scale, to_all),
            Memory::F16(region) => reduce(group, region, scale, to_all),
            Memory::BF16(region) => reduce(group, region, scale, to_all),
            Memory::U8(_) | Memory::I32(_) => {
                let (name, kind) = ("a hook's sum".to_owned(), self.tensor.kind());
                Err(Error::UnsupportedKind { name, kind })
            }
        }
    }

    pub(super) fn all_gather(&self, group: &mut Group) -> Result<Work<'static>> {
        Ok(with_region!(&self.memory, region => group.all_gather_in_place(region.full())?))
    }

    /// In place on the host. GPUs need a second buffer, `into`, of the same kind and length.
    pub(super) fn all_to_all(
        &self,
        group: &mut Group,
        into: Option<&Self>,
    ) -> Result<Work<'static>> {
        let Some(into) = into else {
            return Ok(
                with_region!(&self.memory, region => group.all_to_all_in_place(region.full())?),
            );
        };
        match (&self.memory, &into.memory) {
            (Memory::F32(from), Memory::F32(to)) => across(group, from, to),
            (Memory::F64(from), Memory::F64(to)) => across(group, from, to),
            (Memory::F16(from), Memory::F16(to)) => across(group, from, to),
            (Memory::BF16(from), Memory::BF16(to)) => across(group, from, to),
            (Memory::U8(from), Memory::U8(to)) => across(group, from, to),
            (Memory::I32(from), Memory::I32(to)) => across(group, from, to),
            _ => unreachable!("the pool gives both the same kind"),
        }
    }
}

/// Memory where the model's gradients are.
fn allocate<T: Element>(group: &mut Group, device: Device, len: usize) -> Result<Region<T>> {
    Ok(if device.is_cuda() { group.allocate(len)? } else { group.allocate_on_host(len)? })
}

fn reduce<T: Float>(
    group: &mut Group,
    region: &Region<T>,
    scale: f64,
    to_all: bool,
) -> Result<Work<'static>> {
    Ok(if to_all {
        group.all_reduce(region.full(), ScaledSum(scale))?
    } else {
        group.reduce_scatter_in_place(region.full(), ScaledSum(scale))?
    })
}

fn across<T: Element>(
    group: &mut Group,
    from: &Region<T>,
    to: &Region<T>,
) -> Result<Work<'static>> {
    Ok(group.all_to_all_on_device(from.full(), to.full())?)
}

/// Wires that wait for their next use. All ranks take and put back in the same order, so theirs are alike.
#[derive(Debug, Default)]
pub(crate) struct Pool {
    free: Vec<Wire>,
}

impl Pool {
    /// A wire of exactly this length. Collective where none is free.
    pub(super) fn take(
        &mut self,
        group: &mut Group,
        (kind, device, len): (Kind, Device, usize),
    ) -> Result<Wire> {
        let fits = |wire: &Wire| wire.tensor.kind() == kind && wire.len() == len;
        match self.free.iter().position(fits) {
            Some(at) => Ok(self.free.swap_remove(at)),
            None => Wire::allocate(group, kind, device, len),
        }
    }

    pub(super) fn put_back(&mut self, wire: Wire) {
        self.free.push(wire);
    }

    /// Lets all go: other lengths will be asked for.
    pub(super) fn clear(&mut self) {
        self.free.clear();
    }
}
