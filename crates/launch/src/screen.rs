//! The launcher's own standard output and error: where the ranks' lines come together.

use std::io::{self, IsTerminal as _};

/// Which of the two.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Stream {
    Output,
    Error,
}

/// Both, and whether they still take anything.
#[derive(Debug)]
pub(crate) struct Screen {
    open: [bool; 2],
}

impl Screen {
    pub(crate) const fn new() -> Self {
        Self { open: [true; 2] }
    }

    /// Whether people look at it directly.
    pub(crate) fn is_terminal(stream: Stream) -> bool {
        match stream {
            Stream::Output => io::stdout().is_terminal(),
            Stream::Error => io::stderr().is_terminal(),
        }
    }

    /// Writes; when the reader is gone (`| head`), what follows is dropped and the job goes on.
    pub(crate) fn write(&mut self, stream: Stream, bytes: &[u8]) {
        let open = &mut self.open[usize::from(stream == Stream::Error)];
        if bytes.is_empty() || !*open {
            return;
        }
        let result = match stream {
            Stream::Output => write_flush(&mut io::stdout().lock(), bytes),
            Stream::Error => write_flush(&mut io::stderr().lock(), bytes),
        };
        if let Err(error) = result {
            *open = false;
            tracing::debug!(%error, "the launcher's output is closed");
        }
    }

    /// A line of the launcher's own.
    pub(crate) fn notice(&mut self, line: &str) {
        self.write(Stream::Error, format!("phalanx: {line}\n").as_bytes());
    }
}

fn write_flush(out: &mut dyn io::Write, bytes: &[u8]) -> io::Result<()> {
    out.write_all(bytes)?;
    out.flush()
}
