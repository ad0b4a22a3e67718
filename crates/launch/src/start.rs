//! How each rank is started: its environment, its streams, its log, the memory for its record.

use std::ffi::OsString;
use std::path::Path;
use std::time::{Duration, Instant};

use phalanx_comm::recorder;
use phalanx_rendezvous::environment::StayOffer;
use rustix::process::Signal;

use crate::control_group::{most_crowded, Crowd};
use crate::error::{system, LaunchError};
use crate::flight;
use crate::lines::{Lines, Style, Tail};
use crate::logs::Logs;
use crate::options::{LaunchOptions, Prefix};
use crate::plan::{environment, Assignment, Job};
use crate::process::{ErrorStream, Process, Start};
use crate::rank::{Rank, Staying};
use crate::screen::{Screen, Stream};
use crate::stay::Channel;
use crate::supervise::{Supervisor, KILL_MAX};

/// What every rank of an attempt is started from.
pub(crate) struct Starter<'s> {
    pub(crate) program: &'s Path,
    pub(crate) args: &'s [OsString],
    pub(crate) job: &'s Job,
    pub(crate) logs: &'s Logs,
    pub(crate) prefix: Prefix,
    /// How long a rank may wait for its next generation; `None`: there is none.
    pub(crate) patience: Option<Duration>,
}

impl Starter<'_> {
    /// The ranks of a generation: those that were kept for it, and new ones.
    pub(crate) fn start_all(
        &self,
        places: &[Assignment],
        supervisor: &mut Supervisor,
    ) -> Result<(), LaunchError> {
        room_for(places.len() - supervisor.kept_count().min(places.len()))?;
        // New ones take the longest: they come first.
        let (kept, new): (Vec<_>, Vec<_>) = places
            .iter()
            .map(|&place| (place, supervisor.take_kept(place.number_here)))
            .partition(|(_, kept)| kept.is_some());
        for (place, living) in new.into_iter().chain(kept) {
            let called = living.map(|rank| self.call(place, rank)).transpose()?.flatten();
            supervisor.add(called.map_or_else(|| self.start(place), Ok)?);
        }
        supervisor.ranks.sort_by_key(|rank| rank.number);
        Ok(())
    }

    /// Must be called from the thread that waits for the rank: see [`Process::start`].
    pub(crate) fn start(&self, place: Assignment) -> Result<Rank, LaunchError> {
        let prefix = self.prefix(place);
        let error_stream = if place.rank == 0 && Screen::is_terminal(Stream::Error) {
            ErrorStream::Terminal
        } else {
            ErrorStream::Pipe
        };
        let flight = recorder::memory().map_err(system("memfd_create"))?;
        let mut environment = environment(self.job, place);
        environment.push(("PHALANX_FLIGHT_RECORDER", flight::path(&flight)));
        let channel = self.channel();
        if let (Some(channel), Some(patience)) = (&channel, self.patience) {
            environment.push((StayOffer::VARIABLE, channel.offer(patience).encode()));
        }
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
            lines: lines(prefix, error_stream),
            error_stream,
            tail: Tail::default(),
            log,
            log_path,
            flight,
            ended: None,
            number_here: place.number_here,
            channel,
            staying: Staying::No,
            resident_bytes: None,
        })
    }

    /// Gives a rank that waits its place in the next generation. `None`: it must be started anew.
    pub(crate) fn call(
        &self,
        place: Assignment,
        mut rank: Rank,
    ) -> Result<Option<Rank>, LaunchError> {
        if rank.process.collect()?.is_some() {
            return Ok(None);
        }
        let Some(channel) = &rank.channel else { return Ok(None) };
        let called = recorder::renew(&rank.flight)
            .and_then(|()| channel.call(&environment(self.job, place)));
        if let Err(error) = called {
            tracing::warn!(rank = place.rank, %error, "it is started anew");
            rank.process.signal_group(Signal::KILL);
            rank.process.wait_until(Instant::now() + KILL_MAX);
            return Ok(None);
        }
        let (log, log_path) = self.logs.of_rank(place.rank)?.unzip();
        rank.number = place.rank;
        rank.lines = lines(self.prefix(place), rank.error_stream);
        rank.tail = Tail::default();
        (rank.log, rank.log_path) = (log, log_path);
        rank.staying = Staying::Would;
        Ok(Some(rank))
    }

    /// Without one the rank is started anew each time.
    fn channel(&self) -> Option<Channel> {
        let channel = self.patience.map(|_| Channel::new())?;
        channel.inspect_err(|error| tracing::warn!(%error, "a rank cannot be kept")).ok()
    }

    fn prefix(&self, place: Assignment) -> Option<String> {
        let world_size = self.job.world_size;
        if self.prefix == Prefix::Off || world_size == 1 {
            return None;
        }
        let width = (world_size - 1).to_string().len();
        Some(format!("[rank {:>width$}] ", place.rank))
    }
}

/// Before the first rank is started: a job that has begun in part is harder to understand.
fn room_for(ranks: usize) -> Result<(), LaunchError> {
    let Some(Crowd { group, limit, current }) = most_crowded(Path::new("/")) else { return Ok(()) };
    if limit.saturating_sub(current) >= ranks as u64 {
        return Ok(());
    }
    let group = group.display().to_string();
    Err(LaunchError::TooFewProcesses { group, limit, current, ranks })
}

/// How long a rank that stays may wait for its next generation: as long as nodes may wait for each other, and for the slowest of
/// the ranks to end.
pub(crate) fn patience(options: &LaunchOptions) -> Duration {
    const MORE: Duration = Duration::from_secs(60);
    options.connect_timeout + options.grace + MORE
}

/// How both streams of a rank are shown.
fn lines(prefix: Option<String>, error_stream: ErrorStream) -> [Lines; 2] {
    let style = prefix.clone().map_or(Style::Plain, Style::Prefixed);
    let error_style = match error_stream {
        ErrorStream::Terminal => Style::Terminal(prefix.unwrap_or_default()),
        ErrorStream::Pipe => style.clone(),
    };
    [Lines::new(style), Lines::new(error_style)]
}
