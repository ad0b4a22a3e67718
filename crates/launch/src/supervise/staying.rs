//! Ranks that stay when a generation ends: who is waited for, who has come, and who has no place in the next one.

use std::time::Instant;

use phalanx_comm::recorder;

use super::output::STREAMS;
use super::{Stage, Supervisor};
use crate::elastic::Link;
use crate::error::LaunchError;
use crate::process::Exit;
use crate::rank::{Rank, Staying};
use crate::stay::{Channel, STAYS, WAITS};

/// What a rank that has lost another is taken for: the exit code with which it would have ended.
const LOST_ANOTHER: Exit = Exit::Code(69);

impl Supervisor {
    /// Hears which ranks would stay, and which wait.
    pub(super) fn hear_ranks(&mut self, now: Instant) {
        for at in 0..self.ranks.len() {
            if self.ranks[at].ended.is_some() {
                continue;
            }
            for word in self.ranks[at].channel.as_ref().map(Channel::hear).unwrap_or_default() {
                match word {
                    STAYS if self.ranks[at].staying == Staying::No => {
                        self.ranks[at].staying = Staying::Would;
                    }
                    WAITS => self.came(at, now),
                    _ => {}
                }
            }
        }
    }

    /// A rank waits: its group has failed, or it was called back.
    fn came(&mut self, at: usize, now: Instant) {
        self.read(at);
        self.ranks[at].staying = Staying::Waits;
        let end = &self.state.end;
        if end.ended_by.is_some() || end.failure.is_some() && !self.state.is_hasty {
            self.dismiss(at);
        } else if self.ranks[at].vitals().has_failed {
            self.suspect(at, LOST_ANOTHER, now);
        }
    }

    /// Those that would stay are waited for, if they are in a group and will see that it has failed. A node that is cut off has no time
    /// for that: the others count on its ranks' end.
    pub(super) fn expect_to_stay(&mut self, culprit: Option<usize>, now: Instant) {
        let is_cut_off = self.link.as_ref().is_some_and(Link::is_cut_off);
        if !self.state.is_hasty || is_cut_off {
            return;
        }
        self.hear_ranks(now);
        for rank in &mut self.ranks {
            let is_well = rank.staying == Staying::Would && Some(rank.number) != culprit;
            if is_well && rank.ended.is_none() && rank.vitals().has_started {
                rank.staying = Staying::Expected;
            }
        }
    }

    /// Asks the ranks to stop at their next step, and to come back.
    pub(super) fn call_back(&self) {
        for rank in &self.ranks {
            if let Err(error) = recorder::call_back(&rank.flight) {
                tracing::debug!(rank = rank.number, %error, "it is not called back");
            }
        }
    }

    /// The rank that was kept for this place, the `number`th here.
    pub(crate) fn take_kept(&mut self, number: usize) -> Option<Rank> {
        let at = self.kept.iter().position(|rank| rank.number_here == number)?;
        let mut rank = self.kept.swap_remove(at);
        for (lines, stream) in rank.lines.iter_mut().zip(STREAMS) {
            self.screen.write(stream, &lines.finish());
        }
        Some(rank)
    }

    fn dismiss(&mut self, at: usize) {
        let rank = &mut self.ranks[at];
        rank.staying = Staying::No;
        if let Some(Err(error)) = rank.channel.as_ref().map(Channel::dismiss) {
            tracing::debug!(rank = rank.number, %error, "it is not dismissed");
        }
    }

    /// Nobody has to wait any more: who does, ends as it would have without waiting.
    pub(super) fn dismiss_all(&mut self) {
        for at in 0..self.ranks.len() {
            if self.ranks[at].waits() {
                self.dismiss(at);
            }
        }
    }

    /// There is no further generation: waits for the end of the ranks that waited for one.
    pub(crate) fn run_out(&mut self) -> Result<(), LaunchError> {
        if !self.ranks.iter().any(Rank::waits) {
            return Ok(());
        }
        self.dismiss_all();
        let kill_at = Instant::now() + self.grace;
        self.state.stage = Stage::Ending { kill_at, patience: kill_at };
        while self.has_work() {
            self.poll(&self.ranks, None)?;
            let now = Instant::now();
            for (signal, meaning, count) in self.signals.pending() {
                self.handle_signal(signal, meaning, count, now);
            }
            for at in 0..self.ranks.len() {
                self.read(at);
            }
            self.collect(now)?;
            self.advance(now);
        }
        Ok(())
    }
}
