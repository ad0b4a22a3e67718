//! Who has ended, which of them is the cause, and what follows.

use std::time::Instant;

use rustix::process::Signal;

use super::{Stage, Supervisor, RESTART_GRACE};
use crate::elastic::failure_text;
use crate::error::LaunchError;
use crate::flight::{self, Culprit};
use crate::nodes::Nodes;
use crate::process::Exit;
use crate::rank::{Ended, Rank, Staying};
use crate::report::{code_of, Failure, RankFailure};
use crate::restart::{Decision, Ending};
use crate::suspect::{Accuses, Suspect};

impl Supervisor {
    /// Collects the ranks that have ended, and finds the root cause among those that failed.
    pub(super) fn collect(&mut self, now: Instant) -> Result<(), LaunchError> {
        for at in 0..self.ranks.len() {
            if self.ranks[at].ended.is_none() {
                if let Some(exit) = self.ranks[at].process.collect()? {
                    let clock_ns = flight::clock_ns();
                    self.ranks[at].ended = Some(Ended { exit, at: now, clock_ns });
                    self.read(at);
                    self.suspect(at, exit, now);
                }
            }
            if self.ranks[at].drain_until().is_some_and(|until| until <= now) {
                self.close(at, 0);
                self.close(at, 1);
            }
        }
        let all_ended = self.ranks.iter().all(Rank::is_done);
        let all_have_spoken = || {
            let has_spoken = |rank: &Rank| rank.is_done() || rank.vitals().has_failed;
            self.ranks.iter().all(has_spoken)
        };
        let is_due = |suspect: &Suspect| {
            let nothing_comes = all_ended || suspect.is_cause() && all_have_spoken();
            nothing_comes && !suspect.is_of_elsewhere || suspect.decide_at <= now
        };
        if let Some(suspect) = self.state.suspect.filter(is_due).filter(|_| self.is_running()) {
            self.blame(suspect.at, now);
        }
        Ok(())
    }

    pub(super) fn suspect(&mut self, at: usize, exit: Exit, now: Instant) {
        let record = self.ranks[at].record();
        let accused = record.as_ref().map(|it| flight::accused(it, &self.ranks, self.world_size));
        let accuses = match accused {
            None => Accuses::Unknown,
            Some(None) => Accuses::Nobody,
            Some(Some(Culprit::Here(_))) => Accuses::Here,
            Some(Some(Culprit::Elsewhere(_))) => Accuses::Elsewhere,
        };
        self.state.suspect = Suspect::likelier(self.state.suspect, at, exit, accuses, now);
    }

    /// Decides that this rank is the root cause, and ends the others.
    fn blame(&mut self, at: usize, now: Instant) {
        let failure = self.failure_of(at);
        let (number, line) = (failure.rank, failure.to_string());
        let failure = Failure::Rank(failure);
        if let Some(nodes) = &self.nodes {
            nodes.announce(&line, code_of(&failure));
        }
        self.fail(failure, now);
        let left = self.ranks.iter().filter(|rank| !rank.is_done()).count();
        if left > 0 && !self.state.is_hasty {
            self.notice(&format!("rank {number} failed; ending the others ({left})"));
        }
    }

    fn failure_of(&mut self, suspect: usize) -> RankFailure {
        let finding = flight::investigate(&self.ranks, suspect, self.world_size, &self.lineup_path);
        let mut evidence = Box::new(finding.evidence);
        let (started, now) = (self.started, Instant::now());
        let after = |ended: Option<Ended>| ended.map_or(now, |end| end.at).duration_since(started);
        match finding.culprit {
            Culprit::Elsewhere(number) => {
                RankFailure::elsewhere(number, after(self.ranks[suspect].ended), evidence)
            }
            Culprit::Here(at) => {
                let rank = &mut self.ranks[at];
                let exit = rank.ended.map_or(Exit::Not, |end| end.exit);
                if exit == Exit::Signal(Signal::KILL.as_raw()) {
                    evidence.out_of_memory = self.memory.verdict(rank.resident_bytes);
                }
                RankFailure {
                    rank: rank.number,
                    process: Some((self.host.clone(), rank.process.id())),
                    exit,
                    after: after(rank.ended),
                    last_lines: rank.tail.lines(),
                    evidence,
                }
            }
        }
    }

    pub(super) fn hear_news(&mut self, now: Instant) {
        if !self.is_running() {
            return;
        }
        if let Some(news) = self.nodes.as_ref().and_then(Nodes::news) {
            self.notice("another node failed; ending the ranks of this one");
            self.fail(news, now);
        }
    }

    /// Decides what follows from a failure, and asks the ranks to end.
    fn fail(&mut self, failure: Failure, now: Instant) {
        let step = self.ranks.iter().filter_map(|rank| rank.vitals().progress).max();
        self.state.end.step = step;
        if let Some(link) = &self.link {
            // Node 0 decides. Whatever that is, this generation has ended.
            let report = failure.to_string();
            link.announce(self.generation, &failure_text(code_of(&failure), step, &report));
            self.state.is_hasty = true;
        } else {
            let ending = match &failure {
                Failure::Rank(failure) => Ending::of(failure.exit),
                Failure::Node { .. } => Ending::Failed,
            };
            let decision = self.policy.decide(ending, step, now - self.begun);
            self.state.is_hasty = matches!(decision, Decision::Restart { .. });
            self.state.end.decision = Some(decision);
        }
        let culprit = match &failure {
            Failure::Rank(failure) => Some(failure.rank),
            Failure::Node { .. } => None,
        };
        self.state.end.failure = Some(failure);
        // As it is before the others are told to end.
        if let Some(nodes) = &self.nodes {
            nodes.publish(&self.ranks);
        }
        self.end_ranks(culprit, now);
    }

    /// Asks the ranks to end, and gives them the time that is due to them; those that stay are waited for, but not `culprit`.
    pub(super) fn end_ranks(&mut self, culprit: Option<usize>, now: Instant) {
        self.expect_to_stay(culprit, now);
        for rank in self.ranks.iter().filter(|rank| !rank.is_done()) {
            if rank.staying != Staying::Expected {
                rank.process.signal_group(Signal::TERM);
            }
        }
        // A stopped process takes SIGTERM only when it continues.
        self.signal_all(Signal::CONT);
        if !self.state.is_hasty {
            self.dismiss_all();
        }
        let grace = if self.state.is_hasty { RESTART_GRACE.min(self.grace) } else { self.grace };
        self.state.stage = Stage::Ending { kill_at: now + grace, patience: now + self.grace };
    }

    /// After a failure node 0 shows the ranks of all nodes side by side.
    pub(super) fn line_up_nodes(&mut self) {
        let Some(nodes) = self.nodes.as_ref().filter(|_| self.state.end.failure.is_some()) else {
            return;
        };
        let is_here = |number: &usize| self.ranks.iter().any(|rank| rank.number == *number);
        let others = nodes.gather((0..self.world_size).filter(|number| !is_here(number)));
        if others.is_empty() {
            return;
        }
        let own = self.ranks.iter().filter_map(Rank::record);
        let mut all: Vec<_> = own.chain(others).collect();
        all.sort_unstable_by_key(|record| record.rank);
        if let Some(said) = flight::line_up_nodes(&all, &self.lineup_path) {
            self.notice(&said);
        }
    }
}
