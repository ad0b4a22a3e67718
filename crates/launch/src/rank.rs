//! One rank of this launcher: its process, what it says, what it has recorded, and how it ended.

use std::fs::File;
use std::io::Write as _;
use std::os::unix::fs::FileExt as _;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use phalanx_comm::recorder::{FlightRecord, Vitals};

use crate::lines::{Lines, Tail};
use crate::process::{ErrorStream, Exit, Process};
use crate::screen::Stream;
use crate::stay::Channel;

/// What a rank's escaped children may still write after it has ended.
const DRAIN_MAX: Duration = Duration::from_millis(200);

/// A rank's end.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Ended {
    pub(crate) exit: Exit,
    pub(crate) at: Instant,
    /// The same moment on the clock of the flight recorders.
    pub(crate) clock_ns: u64,
}

/// A rank under supervision.
#[derive(Debug)]
pub(crate) struct Rank {
    pub(crate) number: usize,
    pub(crate) process: Process,
    pub(crate) lines: [Lines; 2],
    pub(crate) error_stream: ErrorStream,
    pub(crate) tail: Tail,
    pub(crate) log: Option<File>,
    pub(crate) log_path: Option<PathBuf>,
    /// What the rank has recorded of its operations.
    pub(crate) flight: File,
    pub(crate) ended: Option<Ended>,
    /// Its number among the ranks of this launcher.
    pub(crate) number_here: usize,
    /// How it hears of the next generation, where the launcher keeps ranks.
    pub(crate) channel: Option<Channel>,
    pub(crate) staying: Staying,
    /// What it had in memory when it was looked at last.
    pub(crate) resident_bytes: Option<u64>,
}

/// Whether a rank stays for the next generation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Staying {
    /// It has not said that it would.
    No,
    Would,
    /// It is expected to: it has lost another rank, or will soon see that it has.
    Expected,
    /// It waits for its next place.
    Waits,
}

impl Rank {
    /// Whether nothing more is to come of it in this generation.
    pub(crate) fn is_done(&self) -> bool {
        self.ended.is_some() || self.waits()
    }

    /// Whether it lives, and waits for the next generation.
    pub(crate) fn waits(&self) -> bool {
        self.ended.is_none() && self.staying == Staying::Waits
    }

    /// What it has recorded, if it ran a group at all.
    pub(crate) fn record(&self) -> Option<FlightRecord> {
        FlightRecord::read(&self.flight).unwrap_or_else(|error| {
            tracing::warn!(rank = self.number, %error, "its flight recorder cannot be read");
            None
        })
    }

    /// What its memory says of it, also after its death.
    pub(crate) fn vitals(&self) -> Vitals {
        Vitals::read(&self.flight).unwrap_or_else(|error| {
            tracing::debug!(rank = self.number, %error, "its memory cannot be read");
            Vitals::default()
        })
    }

    /// The bytes of what it has recorded, for the launcher of node 0.
    pub(crate) fn recorded(&self) -> std::io::Result<Vec<u8>> {
        let bytes = usize::try_from(self.flight.metadata()?.len()).unwrap_or(0);
        let mut record = vec![0; bytes];
        self.flight.read_exact_at(&mut record, 0)?;
        Ok(record)
    }

    /// Keeps what it has written, for the log and the report.
    pub(crate) fn keep(&mut self, stream: Stream, bytes: &[u8]) {
        if stream == Stream::Error {
            self.tail.push(bytes);
        }
        if let Some(Err(error)) = self.log.as_mut().map(|log| log.write_all(bytes)) {
            tracing::warn!(rank = self.number, %error, "the log of this rank ends here");
            self.log = None;
        }
    }

    /// When an ended rank's open streams are given up.
    pub(crate) fn drain_until(&self) -> Option<Instant> {
        let when = self.ended?.at;
        self.process.streams.iter().any(Option::is_some).then(|| when + DRAIN_MAX)
    }
}
