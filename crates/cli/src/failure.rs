//! Errors as the user meets them: one message and an exit code.
//!
//! Codes follow BSD's `sysexits.h`, so that a job script can tell a wrong flag from a damaged file.

use std::error::Error;
use std::io;

/// The command line contradicts itself or asks for what does not exist.
pub(crate) const USAGE: u8 = 64;
/// A file is not what it should be.
pub(crate) const DATA: u8 = 65;
/// What no other code fits.
pub(crate) const FAILED: u8 = 70;
/// Reading or writing failed.
pub(crate) const IO: u8 = 74;
/// Somebody else works on it: try again later.
pub(crate) const BUSY: u8 = 75;
/// Something did not come in time; `timeout(1)` ends with it too.
pub(crate) const TIMEOUT: u8 = 124;

/// A command line that cannot be carried out.
#[derive(Debug)]
pub(crate) struct Usage(pub(crate) String);

impl std::fmt::Display for Usage {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl Error for Usage {}

/// The whole chain of causes on one line; a cause that its parent already quotes is left out.
pub(crate) fn message(error: &anyhow::Error) -> String {
    let mut text = String::new();
    for cause in error.chain().map(ToString::to_string) {
        if text.is_empty() {
            text = cause;
        } else if !text.contains(&cause) {
            text = format!("{text}: {cause}");
        }
    }
    text
}

/// The code for an error, by the first cause that has one.
pub(crate) fn exit_code(error: &anyhow::Error) -> u8 {
    error.chain().find_map(code_of).unwrap_or(FAILED)
}

fn code_of(cause: &(dyn Error + 'static)) -> Option<u8> {
    use phalanx_data::Error as E;
    if let Some(error) = cause.downcast_ref::<E>() {
        return Some(match error.root() {
            E::Io { .. } | E::CacheNotWritable { .. } => IO,
            E::InvalidOption { .. } => USAGE,
            E::LockTimeout { .. } => BUSY,
            E::Timeout { .. } => TIMEOUT,
            _ => DATA,
        });
    }
    if let Some(error) = cause.downcast_ref::<phalanx_checkpoint::Error>() {
        return Some(code_of_checkpoint(error));
    }
    if let Some(error) = cause.downcast_ref::<phalanx_launch::LaunchError>() {
        return Some(error.exit_code());
    }
    if cause.is::<Usage>() {
        return Some(USAGE);
    }
    cause.is::<io::Error>().then_some(IO)
}

fn code_of_checkpoint(error: &phalanx_checkpoint::Error) -> u8 {
    use phalanx_checkpoint::Error as E;
    match error {
        E::Io { .. } | E::NoSpace { .. } => IO,
        _ => DATA,
    }
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;
    use std::time::Duration;

    use phalanx_data::Error as E;

    use super::*;

    #[test]
    fn codes_are_those_of_the_documentation() {
        let path = PathBuf::from("a");
        let cause = || io::Error::from(io::ErrorKind::NotFound);
        let (holder, waited) = ("7".to_owned(), Duration::ZERO);
        let wrong = E::InvalidOption { option: "x", value: "y".into(), reason: "z".into() };
        let cases = [
            (wrong.into(), USAGE),
            (E::DataMissing { path: path.clone() }.into(), DATA),
            (phalanx_checkpoint::Error::NotFound { path: path.clone() }.into(), DATA),
            (phalanx_checkpoint::Error::Exists { path: path.clone() }.into(), DATA),
            (Usage("x".to_owned()).into(), USAGE),
            (anyhow::anyhow!("anything else"), FAILED),
            (E::Io { action: "open", path: path.clone(), cause: cause() }.into(), IO),
            (anyhow::Error::from(cause()).context("open a file"), IO),
            (E::LockTimeout { path, holder, waited }.into(), BUSY),
            (E::Timeout { timeout: waited, epoch: 0, position: 0 }.into(), TIMEOUT),
        ];
        let docs =
            std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs/data.md"));
        let docs = docs.unwrap();
        let (_, of_command) = docs.split_once("## The command").unwrap();
        let (told, _) = of_command.split_once("## ").unwrap();
        for (error, code) in cases {
            assert_eq!(exit_code(&error), code, "{error}");
            assert!(told.contains(&format!(" {code}")), "{code} is not documented");
        }
    }
}
