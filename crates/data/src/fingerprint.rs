//! 64-bit fingerprints: of data, to know it again when training resumes; of names and options, to
//! find prepared data.
//!
//! FNV-1a with 64 bits, then the finaliser of `SplitMix64` (FNV alone mixes its high bits badly).
//! Frozen: a saved loader state holds one. It guards against mistakes, not against an attacker.
//! Source: Fowler/Noll/Vo, <http://www.isthe.com/chongo/tech/comp/fnv/>.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::random::mix;

/// A 64-bit fingerprint, written as 16 hexadecimal digits.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Fingerprint(pub u64);

impl fmt::Display for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}", self.0)
    }
}

impl fmt::Debug for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl From<Fingerprint> for String {
    fn from(fingerprint: Fingerprint) -> String {
        fingerprint.to_string()
    }
}

impl TryFrom<String> for Fingerprint {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

impl FromStr for Fingerprint {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let digits = text.len() == 16 && text.bytes().all(|b| b.is_ascii_hexdigit());
        match u64::from_str_radix(text, 16) {
            Ok(value) if digits => Ok(Fingerprint(value)),
            _ => Err(format!("`{text}` is not a fingerprint of 16 hexadecimal digits")),
        }
    }
}

/// Takes in, part by part, what a fingerprint is made of. Each part is closed by its length, so
/// that ("ab", "c") and ("a", "bc") differ.
#[derive(Clone, Debug)]
pub(crate) struct Fingerprinter(u64);

impl Fingerprinter {
    pub(crate) fn new(subject: &str) -> Self {
        Fingerprinter(0xCBF2_9CE4_8422_2325).bytes(subject.as_bytes())
    }

    pub(crate) fn bytes(mut self, part: &[u8]) -> Self {
        self.absorb(part);
        self.absorb(&crate::cast::to_u64(part.len()).to_le_bytes());
        self
    }

    pub(crate) fn number(self, part: u64) -> Self {
        self.bytes(&part.to_le_bytes())
    }

    pub(crate) fn finish(self) -> Fingerprint {
        Fingerprint(mix(self.0))
    }

    fn absorb(&mut self, part: &[u8]) {
        for &byte in part {
            self.0 = (self.0 ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01B3);
        }
    }
}
