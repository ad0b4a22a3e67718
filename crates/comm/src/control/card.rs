//! The card of a rank: what it publishes so that others can connect to it. Texts, each after its length; the first is the version.

use std::net::SocketAddr;

/// First on every card: what ranks say to each other. A card of another version is refused before anybody connects.
const PROTOCOL: &[u8] = b"phalanx 3";
pub(crate) const SECRET_BYTES: usize = 32;
/// Before the machine of a rank that shares no memory.
pub(crate) const APART: &str = "!";

/// Who and where a rank is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Card {
    pub(crate) host: String,
    pub(crate) pid: u32,
    /// Equal for ranks that can share memory; begins with [`APART`] when this rank must not.
    pub(crate) machine: String,
    pub(crate) unix_name: Vec<u8>,
    pub(crate) address: SocketAddr,
    pub(crate) secret: [u8; SECRET_BYTES],
    /// This rank wants checksums behind the data of collectives.
    pub(crate) checks: bool,
}

impl Card {
    /// The reverse of [`Card::decode`].
    pub(crate) fn encode(&self) -> Vec<u8> {
        let address = self.address.to_string();
        let pid = self.pid.to_string();
        let fields: [&[u8]; 8] = [
            PROTOCOL,
            self.host.as_bytes(),
            pid.as_bytes(),
            self.machine.as_bytes(),
            &self.unix_name,
            address.as_bytes(),
            &self.secret,
            &[u8::from(self.checks)],
        ];
        let mut bytes = Vec::new();
        for field in fields {
            let length = u16::try_from(field.len()).unwrap_or(u16::MAX);
            bytes.extend_from_slice(&length.to_le_bytes());
            bytes.extend_from_slice(field);
        }
        bytes
    }

    pub(crate) fn decode(mut bytes: &[u8]) -> Option<Self> {
        let mut field = || {
            let (length, fields) = bytes.split_at_checked(2)?;
            let length = usize::from(u16::from_le_bytes([length[0], length[1]]));
            let (field, rest) = fields.split_at_checked(length)?;
            bytes = rest;
            Some(field)
        };
        let text = |raw: &[u8]| std::str::from_utf8(raw).ok().map(str::to_owned);
        if field()? != PROTOCOL {
            return None;
        }
        Some(Self {
            host: text(field()?)?,
            pid: text(field()?)?.parse().ok()?,
            machine: text(field()?)?,
            unix_name: field()?.to_vec(),
            address: text(field()?)?.parse().ok()?,
            secret: field()?.try_into().ok()?,
            checks: field()? != [0],
        })
    }

    /// The machine, or what looks like one: a system and its network.
    pub(crate) fn node(&self) -> (&str, &str, &str) {
        let mut words = self.machine.trim_start_matches(APART).splitn(3, ' ');
        (&self.host, words.next().unwrap_or_default(), words.next().unwrap_or_default())
    }

    /// Whether the two can share memory.
    pub(crate) fn shares_memory_with(&self, other: &Self) -> bool {
        !self.machine.starts_with(APART) && self.machine == other.machine
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_card_survives_the_store_and_cut_ones_are_refused() {
        let card = Card {
            host: "a".into(),
            pid: 17,
            machine: "m".into(),
            unix_name: b"n".to_vec(),
            address: "10.0.0.1:4000".parse().unwrap(),
            secret: [7; SECRET_BYTES],
            checks: true,
        };
        let bytes = card.encode();
        assert_eq!(Card::decode(&bytes), Some(card));
        for cut in 0..bytes.len() {
            assert_eq!(Card::decode(&bytes[..cut]), None);
        }
        // Of another version: what follows is not even looked at, and its own first text was the host.
        let mut other = bytes.clone();
        other[2 + PROTOCOL.len() - 1] -= 1;
        assert_eq!(Card::decode(&other), None);
        assert_eq!(Card::decode(&bytes[2 + PROTOCOL.len()..]), None);
    }
}
