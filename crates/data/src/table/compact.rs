//! Thrift's compact protocol, as far as Parquet's headers and footers need it.
//! Source: <https://github.com/apache/thrift/blob/master/doc/specs/thrift-compact-protocol.md>.

/// Bytes of Thrift's compact protocol. Everything gives `None` if they end early or are none.
pub(super) struct Compact<'a> {
    pub(super) rest: &'a [u8],
}

/// Types of values.
pub(super) const BOOLS: [u8; 2] = [1, 2];
pub(super) const INTEGERS: [u8; 3] = [4, 5, 6];
const DOUBLE: u8 = 7;
pub(super) const BYTE: u8 = 3;
pub(super) const BINARY: u8 = 8;
pub(super) const LIST: u8 = 9;
const SET: u8 = 10;
pub(super) const STRUCT: u8 = 12;

impl Compact<'_> {
    pub(super) fn byte(&mut self) -> Option<u8> {
        let (&first, rest) = self.rest.split_first()?;
        self.rest = rest;
        Some(first)
    }

    /// A number of seven bits a byte, the lowest first.
    pub(super) fn varint(&mut self) -> Option<u64> {
        let mut value = 0;
        for shift in (0..64).step_by(7) {
            let byte = self.byte()?;
            value |= u64::from(byte & 0x7F) << shift;
            if byte < 0x80 {
                return Some(value);
            }
        }
        None
    }

    pub(super) fn integer(&mut self) -> Option<i64> {
        let value = self.varint()?;
        // The sign is in the last bit.
        Some(i64::try_from(value >> 1).ok()? ^ -i64::try_from(value & 1).ok()?)
    }

    /// A number that is not negative.
    pub(super) fn size(&mut self, kind: u8) -> Option<u64> {
        INTEGERS.contains(&kind).then_some(())?;
        u64::try_from(self.integer()?).ok()
    }

    /// The type of the next field, whose number is told from the last one's. `Some(None)`: the
    /// structure ends.
    pub(super) fn field(&mut self, id: &mut i16) -> Option<Option<u8>> {
        let byte = self.byte()?;
        let (delta, kind) = (byte >> 4, byte & 0xF);
        if kind == 0 {
            return Some(None);
        }
        *id = match delta {
            0 => i16::try_from(self.integer()?).ok()?,
            _ => id.checked_add(i16::from(delta))?,
        };
        Some(Some(kind))
    }

    /// The type of a list's elements, and how many there are.
    pub(super) fn list(&mut self) -> Option<(u8, u64)> {
        let head = self.byte()?;
        let short = u64::from(head >> 4);
        Some((head & 0xF, if short == 15 { self.varint()? } else { short }))
    }

    pub(super) fn pass(&mut self, bytes: u64) -> Option<()> {
        self.rest = self.rest.get(usize::try_from(bytes).ok()?..)?;
        Some(())
    }

    pub(super) fn skip(&mut self, kind: u8, depth: u32) -> Option<()> {
        let depth = depth.checked_sub(1)?;
        match kind {
            kind if BOOLS.contains(&kind) => Some(()),
            BYTE => self.pass(1),
            kind if INTEGERS.contains(&kind) => self.varint().map(drop),
            DOUBLE => self.pass(8),
            BINARY => {
                let len = self.varint()?;
                self.pass(len)
            }
            LIST | SET => {
                let (of, count) = self.list()?;
                // In a list a truth value has a byte.
                let of = if BOOLS.contains(&of) { BYTE } else { of };
                (0..count).try_for_each(|_| self.skip(of, depth))
            }
            STRUCT => {
                let mut id = 0;
                while let Some(of) = self.field(&mut id)? {
                    self.skip(of, depth)?;
                }
                Some(())
            }
            _ => None,
        }
    }
}
