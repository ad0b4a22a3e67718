//! Errors as the user meets them: one message and an exit code.
//!
//! Codes follow BSD's `sysexits.h`, so that a job script can tell a wrong flag from a dead peer.

use std::error::Error;
use std::io;

use super::config::ConfigError;
use super::machine::TooLittleMemory;
use super::weights_file::WeightsError;

/// The command line contradicts itself or asks for what does not exist.
pub(crate) const USAGE: u8 = 64;
/// A file is not what it should be.
pub(crate) const DATA: u8 = 65;
/// A peer or the meeting point cannot be reached.
pub(crate) const UNAVAILABLE: u8 = 69;
/// A rank failed; also what no other code fits.
pub(crate) const FAILED: u8 = 70;
/// The system has not enough of something.
pub(crate) const RESOURCES: u8 = 71;
/// Reading or writing failed.
pub(crate) const IO: u8 = 74;
/// Start it again: it goes on where it has ended.
pub(crate) const AGAIN: u8 = 75;
/// Somebody did not come in time; `timeout(1)` ends with it too.
pub(crate) const TIMEOUT: u8 = 124;

/// Prints what is wrong with a command line, or the help that was asked for; gives the exit code.
pub(crate) fn explained(error: &clap::Error) -> u8 {
    // A closed terminal is no reason for another error.
    drop(error.print());
    match error.use_stderr() {
        true => USAGE,
        false => 0,
    }
}

/// The whole chain of causes on one line, and what would show more; a cause that its parent already quotes is left out.
pub(crate) fn message(error: &anyhow::Error) -> String {
    let mut text = String::new();
    for cause in error.chain().map(ToString::to_string) {
        if text.is_empty() {
            text = cause;
        } else if !text.contains(&cause) {
            text = format!("{text}: {cause}");
        }
    }
    match error.chain().find_map(of_group).and_then(phalanx_comm::Error::help) {
        Some(help) => format!("{text} | help: {help}"),
        None => text,
    }
}

fn of_group<'e>(cause: &'e (dyn Error + 'static)) -> Option<&'e phalanx_comm::Error> {
    match cause.downcast_ref() {
        Some(phalanx_ddp_core::Error::Comm(error)) => Some(error),
        _ => match cause.downcast_ref() {
            Some(phalanx_model_parallel::Error::Ddp(phalanx_ddp_core::Error::Comm(error))) => {
                Some(error)
            }
            _ => cause.downcast_ref(),
        },
    }
}

/// The code of a run that has ended on a signal, with its work saved.
pub(crate) fn stopped_by(signal: i32) -> u8 {
    match signal == rustix::process::Signal::USR1.as_raw() {
        true => AGAIN,
        false => u8::try_from(128 + signal).unwrap_or(FAILED),
    }
}

/// The code for an error, by the first cause that has one.
pub(crate) fn exit_code(error: &anyhow::Error) -> u8 {
    error.chain().find_map(code_of).unwrap_or(FAILED)
}

fn code_of(cause: &(dyn Error + 'static)) -> Option<u8> {
    if let Some(error) = cause.downcast_ref::<ConfigError>() {
        return Some(match error {
            ConfigError::Unreadable { .. } => IO,
            ConfigError::IllFormed { .. } => DATA,
            ConfigError::Invalid { .. } => USAGE,
        });
    }
    if let Some(error) = cause.downcast_ref::<phalanx_data::Error>() {
        return Some(code_of_data(error));
    }
    if let Some(error) = cause.downcast_ref::<phalanx_ddp_core::Error>() {
        return Some(code_of_training(error));
    }
    if let Some(error) = cause.downcast_ref::<phalanx_model_parallel::Error>() {
        return Some(code_of_mesh(error));
    }
    if let Some(error) = cause.downcast_ref::<phalanx_launch::LaunchError>() {
        return Some(error.exit_code());
    }
    if cause.is::<phalanx_comm::environment::EnvironmentError>()
        || cause.is::<phalanx_comm::environment::NcclSettingError>()
    {
        return Some(USAGE);
    }
    if cause.is::<WeightsError>() {
        return Some(DATA);
    }
    if cause.is::<TooLittleMemory>() {
        return Some(RESOURCES);
    }
    let of_group = cause.downcast_ref::<phalanx_comm::Error>().map(code_of_group);
    of_group.or_else(|| cause.is::<io::Error>().then_some(IO))
}

fn code_of_training(error: &phalanx_ddp_core::Error) -> u8 {
    use phalanx_ddp_core::Error as E;
    match error {
        E::Comm(error) => code_of_group(error),
        E::Data(error) => code_of_data(error),
        E::Io { .. } => IO,
        E::Checkpoint(error) if error.is_damage() => DATA,
        E::Checkpoint(_) => IO,
        E::CheckpointMisfit { .. } | E::CheckpointDamaged { .. } => DATA,
        E::Safetensors { .. } | E::WeightsMismatch { .. } => DATA,
        _ => FAILED,
    }
}

fn code_of_mesh(error: &phalanx_model_parallel::Error) -> u8 {
    use phalanx_model_parallel::Error as E;
    match error {
        E::Ddp(error) => code_of_training(error),
        E::Comm(error) => code_of_group(error),
        E::Libtorch(_) | E::BadInput { .. } | E::PeerFailed { .. } => FAILED,
        // Shapes, schedules and sizes that do not fit each other.
        _ => USAGE,
    }
}

fn code_of_data(error: &phalanx_data::Error) -> u8 {
    use phalanx_data::Error as E;
    match error.root() {
        E::Io { .. } | E::CacheNotWritable { .. } => IO,
        E::InvalidOption { .. } => USAGE,
        E::LockTimeout { .. } => TIMEOUT,
        _ => DATA,
    }
}

fn code_of_group(error: &phalanx_comm::Error) -> u8 {
    use phalanx_comm::Error as E;
    match error {
        E::Timeout { .. } => TIMEOUT,
        E::Environment(_) => USAGE,
        E::PeerGone { .. }
        | E::PeerLeft { .. }
        | E::ConnectionLost { .. }
        | E::Connect { .. }
        | E::Rendezvous(_) => UNAVAILABLE,
        E::System { .. } => RESOURCES,
        _ => FAILED,
    }
}
