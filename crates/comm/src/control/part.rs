//! A part of a message between machines, as it travels on a control socket: copied once into its frame, and from there to where it
//! belongs. Pure.

use super::wire::{Malformed, Reader, Writer};

/// A part of a message, which is not copied more often than it must be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Part<'a> {
    /// Of the message.
    pub(crate) index: u64,
    pub(crate) bytes: &'a [u8],
}

impl<'a> Part<'a> {
    pub(crate) const KIND: u8 = 5;

    /// The bytes of its frame, head included.
    pub(crate) fn encode(&self) -> Vec<u8> {
        let mut body = Writer::new(8 + self.bytes.len());
        body.u64(self.index).0.extend_from_slice(self.bytes);
        body.frame(Self::KIND)
    }

    pub(crate) fn decode(body: &'a [u8]) -> Result<Self, Malformed> {
        let mut body = Reader(body);
        Ok(Self { index: body.u64()?, bytes: body.0 })
    }
}
