//! Signals as readable sockets, so that one poll waits for everything.

use std::io::{self, Read as _};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;

use rustix::process::Signal;
use signal_hook::consts::{
    SIGCONT, SIGHUP, SIGINT, SIGQUIT, SIGTERM, SIGTSTP, SIGUSR1, SIGUSR2, SIGWINCH,
};
use signal_hook::SigId;

use crate::error::{system, LaunchError};

/// What a signal to the launcher means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Meaning {
    /// Pass it on, let the ranks end, end with 128 + its number.
    End,
    /// Pass it on.
    Forward,
    /// Ctrl-Z: stop the ranks, then ourselves.
    Suspend,
    /// The terminal has another size.
    Resize,
}

const HANDLED: [(i32, Signal, Meaning); 9] = [
    (SIGINT, Signal::INT, Meaning::End),
    (SIGTERM, Signal::TERM, Meaning::End),
    (SIGHUP, Signal::HUP, Meaning::End),
    (SIGQUIT, Signal::QUIT, Meaning::End),
    (SIGUSR1, Signal::USR1, Meaning::Forward),
    (SIGUSR2, Signal::USR2, Meaning::Forward),
    (SIGCONT, Signal::CONT, Meaning::Forward),
    (SIGTSTP, Signal::TSTP, Meaning::Suspend),
    (SIGWINCH, Signal::WINCH, Meaning::Resize),
];

/// The signals of this process while a launcher runs in it.
#[derive(Debug)]
pub(crate) struct Signals {
    handlers: Vec<Handler>,
}

#[derive(Debug)]
struct Handler {
    stream: UnixStream,
    id: SigId,
    signal: Signal,
    meaning: Meaning,
}

/// Bit n−1 stands for signal n. What was ignored when we started stays so: that is how `nohup` works.
fn ignored_signals() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok()).unwrap_or(0)
}

impl Signals {
    /// Takes over the signals. The former handlers are not put back when this is dropped: the signals are then ignored.
    pub(crate) fn register() -> Result<Self, LaunchError> {
        let mut signals = Self { handlers: Vec::new() };
        let ignored = ignored_signals();
        for entry in HANDLED {
            let number = entry.0;
            if ignored & (1 << (number - 1)) != 0 {
                continue;
            }
            let add = || -> io::Result<(UnixStream, SigId)> {
                let (read, write) = UnixStream::pair()?;
                read.set_nonblocking(true)?;
                Ok((read, signal_hook::low_level::pipe::register(number, write)?))
            };
            let (stream, id) = add().map_err(system("register a signal handler"))?;
            signals.handlers.push(Handler { stream, id, signal: entry.1, meaning: entry.2 });
        }
        Ok(signals)
    }

    /// What to poll.
    pub(crate) fn fds(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        self.handlers.iter().map(|handler| handler.stream.as_fd())
    }

    /// The signals that came since the last call: each with how often.
    pub(crate) fn pending(&self) -> Vec<(Signal, Meaning, usize)> {
        let mut pending = Vec::new();
        for handler in &self.handlers {
            let mut bytes = [0; 16];
            let mut reader = &handler.stream;
            match reader.read(&mut bytes) {
                Ok(count) if count > 0 => pending.push((handler.signal, handler.meaning, count)),
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => tracing::debug!(%error, "reading a signal failed"),
            }
        }
        pending
    }
}

impl Drop for Signals {
    fn drop(&mut self) {
        for handler in &self.handlers {
            signal_hook::low_level::unregister(handler.id);
        }
    }
}

/// A signal's name, `SIGKILL`.
pub(crate) fn name(signal: i32) -> &'static str {
    signal_hook::low_level::signal_name(signal).unwrap_or("unknown signal")
}
