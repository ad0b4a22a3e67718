//! JSON whose memory is bounded by its text: lists of short numbers would take many times as much.

use serde::de::DeserializeOwned;
use serde::Serialize;

use super::bytes::SizedSource;
use crate::cast::to_usize;
use crate::error::{Error, Result};

/// What any text may take besides its size.
const SLACK_BYTES: usize = 1 << 20;

/// Parses a text, unless its values would take more memory than it has bytes: so many for each
/// value, at most.
fn parse<T: DeserializeOwned>(text: &[u8], value_bytes: usize) -> std::result::Result<T, String> {
    check(text, value_bytes, text.len())?;
    serde_json::from_slice(text).map_err(|error| error.to_string())
}

/// Parses a whole file of at most `bytes_max` bytes, which `what` names in errors.
pub(crate) fn read<T: DeserializeOwned>(
    file: &SizedSource,
    (bytes_max, value_bytes): (u64, usize),
    what: &str,
    bad: impl Fn(String) -> Error,
) -> Result<T> {
    let len = file.len();
    if len > bytes_max {
        return Err(bad(format!("{len} bytes are too many for {what}")));
    }
    let mut scratch = Vec::new();
    let text = file.read(0, to_usize(len), &mut scratch)?;
    let parsed = parse(text, value_bytes);
    file.check(0..len)?;
    parsed.map_err(|error| bad(format!("not {what}: {error}")))
}

/// A value as the text of a file for people to read.
pub(crate) fn to_bytes(value: &impl Serialize) -> Vec<u8> {
    let mut text = serde_json::to_vec_pretty(value).unwrap_or_default();
    text.push(b'\n');
    text
}

/// Whether the values of a text fit into about so many bytes.
pub(crate) fn check(
    text: &[u8],
    value_bytes: usize,
    bytes_max: usize,
) -> std::result::Result<(), String> {
    let values = value_count(text);
    if values.saturating_mul(value_bytes) > bytes_max.saturating_add(SLACK_BYTES) {
        return Err(format!("its {values} values are too many for its size"));
    }
    Ok(())
}

/// No fewer than there are values: names, colons and brackets are counted as well.
fn value_count(text: &[u8]) -> usize {
    let (mut values, mut is_text, mut is_escaped) = (0, false, false);
    for &byte in text {
        match byte {
            _ if is_escaped => is_escaped = false,
            b'\\' if is_text => is_escaped = true,
            b'"' => is_text = !is_text,
            b',' | b':' | b'[' | b'{' if !is_text => values += 1,
            _ => {}
        }
    }
    values
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_counted_is_no_less_than_the_values() {
        for (text, count) in
            [("", 0), ("{}", 1), (r#"{"a,b": [1, 2], "c\",": ""}"#, 6), ("[[[[", 4)]
        {
            assert_eq!(value_count(text.as_bytes()), count, "{text}");
        }
    }

    #[test]
    fn long_lists_of_short_numbers_are_refused() {
        let list = |count: usize| format!("[{}0]", "0,".repeat(count)).into_bytes();
        assert!(parse::<Vec<u32>>(&list(10_000), 20).is_ok());
        let error = parse::<Vec<u32>>(&list(1_000_000), 20).unwrap_err();
        assert!(error.contains("too many for its size"), "{error}");
    }
}
