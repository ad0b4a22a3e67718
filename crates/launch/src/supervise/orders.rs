//! What node 0 wants of this node's ranks in an elastic job, and what this node's user wants of node 0.

use std::time::Instant;

use rustix::process::Signal;

use super::{Leaving, Stage, Supervisor};
use crate::elastic::Link;
use crate::membership::{Action, Wish};
use crate::rank::Rank;

impl Supervisor {
    pub(super) fn hear_orders(&mut self, now: Instant) {
        while let Some(action) = self.link.as_ref().and_then(Link::next_action) {
            match action {
                Action::StopSoon => self.stop_soon(now),
                Action::StopNow => self.stop_now(now),
                // Those are for nodes without ranks; telling is the link's own affair.
                Action::Start(_) | Action::Finish(_) | Action::Tell => {}
            }
        }
    }

    /// Nodes come or go: ranks that look for it end at their next step, the others are asked by a signal.
    fn stop_soon(&mut self, now: Instant) {
        if !self.is_running() {
            return;
        }
        self.notice("nodes come or go: the ranks are asked to stop at their next step");
        self.state.end.was_stopped = true;
        self.call_back();
        let deaf = |rank: &&Rank| rank.ended.is_none() && !rank.vitals().heeds_stop;
        for rank in self.ranks.iter().filter(deaf) {
            rank.process.signal_group(Signal::TERM);
        }
        let kill_at = now + self.grace;
        self.state.stage = Stage::Ending { kill_at, patience: kill_at };
    }

    /// Another node has failed, or this one is cut off.
    fn stop_now(&mut self, now: Instant) {
        if self.state.end.failure.is_some() || self.state.end.ended_by.is_some() {
            return; // they are ending already
        }
        if self.is_running() {
            self.notice("another node has failed or is lost; ending the ranks of this one");
        }
        self.state.end.was_stopped = true;
        self.state.is_hasty = true;
        self.end_ranks(None, now);
    }

    /// SIGTERM is how a scheduler takes a node away: the others go on, if there may be fewer. Ctrl-C is for the job.
    pub(super) fn wish_for_end(&mut self, signal: Signal) {
        let Some(link) = &self.link else { return };
        if signal == Signal::TERM && self.leaving != Leaving::MayNot {
            self.leaving = Leaving::Does;
            link.wish(Wish::Leave);
        } else {
            link.wish(Wish::End(signal.as_raw()));
        }
    }
}
