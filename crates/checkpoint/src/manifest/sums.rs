//! A list of checksums, as one string of hexadecimal digits: eight a sum, so that the text bounds the list.

use serde::de::{Error, Visitor};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// Checksums of blocks, in their order.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Sums(pub(crate) Vec<u32>);

impl Serialize for Sums {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let text: String = self.0.iter().map(|sum| format!("{sum:08x}")).collect();
        serializer.serialize_str(&text)
    }
}

impl<'de> Deserialize<'de> for Sums {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_str(Digits)
    }
}

struct Digits;

impl Visitor<'_> for Digits {
    type Value = Sums;

    fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("eight hexadecimal digits for each block")
    }

    fn visit_str<E: Error>(self, text: &str) -> Result<Sums, E> {
        let bytes = text.as_bytes();
        if !bytes.len().is_multiple_of(8) {
            return Err(E::custom("a checksum has not eight digits"));
        }
        let sums: Option<Vec<u32>> = bytes.chunks_exact(8).map(sum).collect();
        sums.map(Sums).ok_or_else(|| E::custom("a checksum is not hexadecimal"))
    }
}

fn sum(digits: &[u8]) -> Option<u32> {
    digits.iter().try_fold(0, |sum, &digit| Some(sum << 4 | char::from(digit).to_digit(16)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sums_are_digits_and_back() {
        let sums = Sums(vec![0, 1, 0xffff_fffe, 0x0123_abcd]);
        let text = serde_json::to_string(&sums).unwrap();
        assert_eq!(text, "\"0000000000000001fffffffe0123abcd\"");
        assert_eq!(serde_json::from_str::<Sums>(&text).unwrap(), sums);
        for bad in ["\"0123456\"", "\"0123456g\"", "[1]", "\"+1234567\""] {
            assert!(serde_json::from_str::<Sums>(bad).is_err(), "{bad}");
        }
    }
}
