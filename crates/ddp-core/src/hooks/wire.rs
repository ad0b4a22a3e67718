//! Registered memory in which a hook's compressed data travels, and a tensor over it.

use phalanx_comm::{Group, Work};
use tch::{Device, Kind, Tensor};

use crate::store::flat::{Flat, Scale};
use crate::Result;

/// A flat tensor in memory that collectives work on in place; of the kinds Float, Double, Half, `BFloat16`, Uint8 and Int. Zero
/// when it is new; one that was used before holds what it held.
#[derive(Debug)]
pub struct Wire {
    flat: Flat,
}

impl Wire {
    /// Collective.
    fn allocate(group: &mut Group, kind: Kind, device: Device, len: usize) -> Result<Self> {
        Ok(Self { flat: Flat::registered(group, kind, device, len)? })
    }

    /// The flat tensor.
    pub fn tensor(&self) -> &Tensor {
        self.flat.tensor()
    }

    /// Elements.
    #[must_use]
    pub(crate) fn len(&self) -> usize {
        self.flat.len()
    }

    /// Bytes.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.len() * self.flat.kind().elt_size_in_bytes()
    }

    pub(super) fn reduce(
        &self,
        group: &mut Group,
        scale: f64,
        to_all: bool,
    ) -> Result<Work<'static>> {
        self.flat.reduce(group, 0..self.len(), (Scale(scale), to_all))
    }

    pub(super) fn all_gather(&self, group: &mut Group) -> Result<Work<'static>> {
        self.flat.all_gather(group, 0..self.len())
    }

    /// In place on the host. GPUs need a second buffer, `into`, of the same kind and length.
    pub(super) fn all_to_all(
        &self,
        group: &mut Group,
        into: Option<&Self>,
    ) -> Result<Work<'static>> {
        self.flat.all_to_all(group, into.map(|into| &into.flat))
    }
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
        let fits = |wire: &Wire| wire.flat.kind() == kind && wire.len() == len;
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
