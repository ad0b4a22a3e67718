//! What a command has to say, on standard output: lines for people, or one JSON object for programs.

use std::io::{self, Write};

use anyhow::Result;
use serde_json::Value;

/// Writes to standard output. A reader that has gone (`| head`) is no error.
pub(crate) fn print(text: &str) -> Result<()> {
    let mut out = io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => Err(error.into()),
        _ => Ok(()),
    }
}

/// Writes an object, indented.
pub(crate) fn print_json(value: &Value) -> Result<()> {
    print(&format!("{value:#}\n"))
}

/// A count with a thin gap every three digits: `12 345 678`.
pub(crate) fn count(number: u64) -> String {
    let digits = number.to_string();
    let mut text = String::new();
    for (at, digit) in digits.chars().enumerate() {
        if at > 0 && (digits.len() - at).is_multiple_of(3) {
            text.push(' ');
        }
        text.push(digit);
    }
    text
}

/// Bytes in the largest unit that leaves at least one of it.
pub(crate) fn bytes(number: u64) -> String {
    let units = [("GiB", 30), ("MiB", 20), ("KiB", 10)];
    match units.into_iter().find(|(_, shift)| number >> shift > 0) {
        Some((unit, shift)) => format!("{:.1} {unit}", real(number) / real(1 << shift)),
        None => format!("{number} bytes"),
    }
}

/// A count as a real number, for rates and shares.
#[expect(clippy::cast_precision_loss, reason = "it is shown with a few digits")]
pub(crate) fn real(number: u64) -> f64 {
    number as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_and_bytes_are_readable() {
        assert_eq!(
            [0, 999, 1000, 12_345_678].map(count),
            ["0", "999", "1 000", "12 345 678"].map(str::to_owned)
        );
        assert_eq!(
            [5, 1536, 3 << 20, 5 << 29].map(bytes),
            ["5 bytes", "1.5 KiB", "3.0 MiB", "2.5 GiB"].map(str::to_owned)
        );
    }
}
