//! The secret that the processes of one job share.

use std::fmt;

use sha2::{Digest, Sha256};

use crate::RendezvousError;

/// 32 secret bytes: who has them belongs to the job. Made by the launcher, passed in the environment (never in argv,
/// which every user of the machine can read). `Debug` does not show it.
#[derive(Clone)]
pub struct JobToken {
    bytes: [u8; 32],
    is_derived: bool,
}

/// Equal secrets, wherever they come from.
impl PartialEq for JobToken {
    fn eq(&self, other: &Self) -> bool {
        self.bytes == other.bytes
    }
}

impl Eq for JobToken {}

impl JobToken {
    /// A token from given bytes.
    #[must_use]
    pub const fn from_bytes(bytes: [u8; 32]) -> Self {
        Self { bytes, is_derived: false }
    }

    /// A fresh random token from the kernel.
    ///
    /// # Errors
    ///
    /// [`RendezvousError::System`] when the kernel has no random bytes to give.
    pub fn generate() -> Result<Self, RendezvousError> {
        crate::random_bytes().map(Self::from_bytes)
    }

    /// Parses 64 hexadecimal digits; `None` for anything else.
    #[must_use]
    pub(crate) fn from_hex(text: &str) -> Option<Self> {
        let digits = text.as_bytes();
        if digits.len() != 64 {
            return None;
        }
        let mut bytes = [0; 32];
        for (byte, pair) in bytes.iter_mut().zip(digits.chunks_exact(2)) {
            *byte = nibble(pair[0])? << 4 | nibble(pair[1])?;
        }
        Some(Self::from_bytes(bytes))
    }

    /// As 64 hexadecimal digits.
    #[must_use]
    pub fn to_hex(&self) -> String {
        self.bytes.iter().map(|byte| format!("{byte:02x}")).collect()
    }

    /// A token anyone can compute who knows `facts`: keeps jobs apart, keeps nobody out. Used under foreign launchers
    /// when `PHALANX_JOB_TOKEN` is absent.
    #[must_use]
    pub fn derive(facts: &[&str]) -> Self {
        let mut hash = Sha256::new();
        hash.update(b"phalanx derived job token");
        for fact in facts {
            // A length before each: ["ab", "c"] and ["a", "bc"] must differ.
            hash.update((fact.len() as u64).to_le_bytes());
            hash.update(fact.as_bytes());
        }
        Self { bytes: hash.finalize().into(), is_derived: true }
    }

    /// Whether it was made by [`JobToken::derive`], and so is no secret.
    #[must_use]
    pub(crate) const fn is_derived(&self) -> bool {
        self.is_derived
    }

    /// The secret itself, for the keyed hash.
    #[must_use]
    pub const fn as_bytes(&self) -> &[u8; 32] {
        &self.bytes
    }
}

impl fmt::Debug for JobToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("JobToken(…)")
    }
}

const fn nibble(digit: u8) -> Option<u8> {
    match digit {
        b'0'..=b'9' => Some(digit - b'0'),
        b'a'..=b'f' => Some(digit - b'a' + 10),
        b'A'..=b'F' => Some(digit - b'A' + 10),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hex_goes_both_ways_and_nothing_else_is_taken() {
        let token = JobToken::derive(&["a", "b"]);
        assert_eq!(JobToken::from_hex(&token.to_hex()), Some(token.clone()));
        assert_eq!(JobToken::from_hex(&token.to_hex().to_uppercase()), Some(token));
        for wrong in ["", "12", &"g".repeat(64), &"a".repeat(63), &"a".repeat(65), &"é".repeat(32)]
        {
            assert_eq!(JobToken::from_hex(wrong), None, "{wrong:?}");
        }
    }

    #[test]
    fn derived_tokens_depend_on_every_boundary() {
        assert_ne!(JobToken::derive(&["ab", "c"]), JobToken::derive(&["a", "bc"]));
        assert_ne!(JobToken::derive(&["a"]), JobToken::derive(&["a", ""]));
    }

    #[test]
    fn debug_does_not_show_the_secret() {
        let token = JobToken::derive(&["x"]);
        assert!(!format!("{token:?}").contains(&token.to_hex()[..8]));
    }
}
