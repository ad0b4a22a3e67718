//! One attempt after the other, until the ranks end well, the user ends them, or the policy gives up.
//!
//! Each attempt is a generation: it has a fresh store, which refuses ranks that are left of another one, and ranks that
//! know its number (`PHALANX_RESTART_COUNT`).

use std::ffi::OsString;
use std::path::Path;

use phalanx_rendezvous::{Credentials, StoreServer};

use crate::error::LaunchError;
use crate::logs::Logs;
use crate::options::LaunchOptions;
use crate::plan::{Job, LaunchPlan};
use crate::report::{Failure, Report};
use crate::restart::{Decision, GiveUp};
use crate::run::host_store;
use crate::screen::Stream;
use crate::signals;
use crate::start::{patience, Starter};
use crate::supervise::{AttemptEnd, Supervisor};

/// A job whose ranks are all decided about by this launcher.
pub(crate) struct Attempts<'a> {
    pub(crate) options: &'a LaunchOptions,
    pub(crate) program: &'a Path,
    pub(crate) args: &'a [OsString],
    pub(crate) plan: LaunchPlan,
    /// How many ranks each node starts.
    pub(crate) ranks_of_nodes: Vec<usize>,
    pub(crate) job: Job,
    pub(crate) logs: Logs,
    pub(crate) credentials: Credentials,
    /// The store of the attempt, where this launcher hosts it.
    pub(crate) server: Option<StoreServer>,
}

impl Attempts<'_> {
    /// Runs the job to its end.
    pub(crate) fn run(mut self, supervisor: &mut Supervisor) -> Result<Report, LaunchError> {
        loop {
            let mut end = self.attempt(supervisor)?;
            if let Some(Failure::Rank(failure)) = &end.failure {
                self.logs.record(failure, self.job.restart_count, end.step);
            }
            end.ended_by = end.ended_by.or_else(|| supervisor.is_interrupted());
            match end.decision {
                Some(Decision::Restart { number })
                    if end.ended_by.is_none() && !supervisor.has_left_behind() =>
                {
                    supervisor.notice(&restart_line(supervisor, &end));
                    self.renew(number)?;
                }
                _ => {
                    supervisor.run_out()?;
                    return Ok(finish(supervisor, end));
                }
            }
        }
    }

    fn attempt(&self, supervisor: &mut Supervisor) -> Result<AttemptEnd, LaunchError> {
        let Self { options, program, args, job, .. } = self;
        let logs = self.logs.of_attempt(job.restart_count)?;
        supervisor.begin(job.world_size, logs.lineup(&job.run_id, &supervisor.host));
        let patience = (options.max_restarts > 0).then(|| patience(options));
        let starter = Starter { program, args, job, logs: &logs, prefix: options.prefix, patience };
        // An error here drops the ranks that are there already: see Supervisor's drop.
        starter.start_all(&self.plan.places(&self.ranks_of_nodes), supervisor)?;
        supervisor.run()
    }

    /// A store for the next generation: with the port that was asked for, or a new one.
    fn renew(&mut self, generation: u32) -> Result<(), LaunchError> {
        self.job.restart_count = generation;
        self.credentials.restart_count = generation;
        // The port may be the same: the old store goes first.
        self.server = None;
        let deadline = std::time::Instant::now() + self.options.connect_timeout;
        self.server = host_store(&self.plan, &self.credentials, deadline)?;
        if let Some(server) = &self.server {
            self.job.master_port = server.address().port();
        }
        Ok(())
    }
}

/// `restart 1/3: rank 2 on host a (pid 811) died: signal 9 (SIGKILL) after 3.2 s; step 120 | log: …`
fn restart_line(supervisor: &Supervisor, end: &AttemptEnd) -> String {
    let mut line = format!("restart {}: ", supervisor.policy.count_text());
    match &end.failure {
        Some(Failure::Rank(failure)) => line += &failure.brief(),
        Some(Failure::Node { report, .. }) => line += report,
        None => {}
    }
    match end.step {
        Some(step) => line += &format!("; step {step}"),
        None => line += "; no step was told",
    }
    if let Some(Failure::Rank(failure)) = &end.failure {
        if let Some(path) = &failure.evidence.lineup_path {
            line += &format!(" | operations of all ranks: {}", path.display());
        }
        if let Some(path) = &failure.evidence.log {
            line += &format!(" | log: {}", path.display());
        }
    }
    line
}

/// One line about all attempts, if there is more to say than about one; the failure's line is the last word.
fn finish(supervisor: &mut Supervisor, end: AttemptEnd) -> Report {
    let AttemptEnd { failure, decision, ended_by, .. } = end;
    let gave_up = match decision {
        Some(Decision::GiveUp(why)) if ended_by.is_none() => Some(why),
        _ => None,
    };
    let restarts = supervisor.policy.restarts();
    let plural = if restarts == 1 { "" } else { "s" };
    let so_many = format!("{restarts} restart{plural}");
    match (gave_up, ended_by, &failure) {
        (Some(why), ..) if why != GiveUp::NotWanted => {
            supervisor.notice(&format!("giving up after {so_many}: {why}"));
        }
        (_, Some(signal), _) if restarts > 0 => {
            supervisor.notice(&format!("ended by {} after {so_many}", signals::name(signal)));
        }
        (_, None, None) if restarts > 0 => {
            supervisor.notice(&format!("the ranks have ended well, after {so_many}"));
        }
        _ => {}
    }
    if let Some(failure) = &failure {
        supervisor.screen.write(Stream::Error, format!("{failure}\n").as_bytes());
    }
    Report { failure, ended_by, elapsed: supervisor.begun.elapsed(), restarts, gave_up }
}
