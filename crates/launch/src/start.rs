//! How each rank is started: its environment, its streams, its log, the memory for its record.

use std::ffi::OsString;
use std::path::Path;

use phalanx_comm::recorder;

use crate::error::{system, LaunchError};
use crate::flight;
use crate::lines::{Lines, Style, Tail};
use crate::logs::Logs;
use crate::options::Prefix;
use crate::plan::{environment, Job, Place};
use crate::process::{ErrorStream, Process, Start};
use crate::rank::Rank;
use crate::screen::{Screen, Stream};

/// What every rank of an attempt is started from.
pub(crate) struct Starter<'s> {
    pub(crate) program: &'s Path,
    pub(crate) args: &'s [OsString],
    pub(crate) job: &'s Job,
    pub(crate) logs: &'s Logs,
    pub(crate) prefix: Prefix,
}

impl Starter<'_> {
    /// Must be called from the thread that waits for the rank: see [`Process::start`].
    pub(crate) fn start(&self, place: Place) -> Result<Rank, LaunchError> {
        let prefix = self.prefix(place);
        let error_stream = if place.rank == 0 && Screen::is_terminal(Stream::Error) {
            ErrorStream::Terminal
        } else {
            ErrorStream::Pipe
        };
        let style = prefix.clone().map_or(Style::Plain, Style::Prefixed);
        let error_style = match error_stream {
            ErrorStream::Terminal => Style::Terminal(prefix.unwrap_or_default()),
            ErrorStream::Pipe => style.clone(),
        };
        let flight = recorder::memory().map_err(system("memfd_create"))?;
        let mut environment = environment(self.job, place);
        environment.push(("PHALANX_FLIGHT_RECORDER", flight::path(&flight)));
        let (log, log_path) = self.logs.of_rank(place.rank)?.unzip();
        let process = Process::start(&Start {
            program: self.program,
            args: self.args,
            environment: &environment,
            error_stream,
        })?;
        Ok(Rank {
            number: place.rank,
            process,
            lines: [Lines::new(style), Lines::new(error_style)],
            tail: Tail::default(),
            log,
            log_path,
            flight,
            ended: None,
        })
    }

    fn prefix(&self, place: Place) -> Option<String> {
        let world_size = self.job.world_size;
        if self.prefix == Prefix::Off || world_size == 1 {
            return None;
        }
        let width = (world_size - 1).to_string().len();
        Some(format!("[rank {:>width$}] ", place.rank))
    }
}
