//! Waiting until a word on a peer's board has changed: watch it briefly, then sleep in the kernel.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use super::core::Core;
use crate::call::Call;
use crate::error::{Error, Result};
use crate::memory::patience::{watch, SLEEP_FIRST, SLEEP_MAX};

impl Core {
    /// Waits until a word of `peer`'s board has reached `at_least`: watches it briefly, then sleeps,
    /// looking after the peers in between.
    pub(crate) fn wait_word(
        &self,
        call: &Call,
        deadline: Option<Instant>,
        peer: usize,
        word: &AtomicU64,
        at_least: u64,
    ) -> Result<()> {
        let reached = || word.load(Ordering::Acquire) >= at_least;
        let mut spins = self.spins;
        loop {
            if reached() {
                return Ok(());
            }
            if spins == 0 {
                break;
            }
            spins -= 1;
            std::hint::spin_loop();
        }
        self.wait_long(call, deadline, peer, word, at_least)
    }

    #[cold]
    fn wait_long(
        &self,
        call: &Call,
        deadline: Option<Instant>,
        peer: usize,
        word: &AtomicU64,
        at_least: u64,
    ) -> Result<()> {
        let reached = || word.load(Ordering::Acquire) >= at_least;
        let start = Instant::now();
        if watch(start, self.patience, self.spins, reached) {
            return Ok(());
        }
        let deadline = deadline.unwrap_or(start + call.timeout);
        self.sleep_word(call, deadline, peer, word, at_least)
    }

    #[cold]
    fn sleep_word(
        &self,
        call: &Call,
        deadline: Instant,
        peer: usize,
        word: &AtomicU64,
        at_least: u64,
    ) -> Result<()> {
        let board = self.board(peer);
        // What is announced without a fence may be missed by who goes to sleep at that moment.
        let mut limit = SLEEP_FIRST;
        loop {
            board.sleep(word, at_least, limit);
            limit = (limit * 2).min(SLEEP_MAX);
            if word.load(Ordering::Acquire) >= at_least {
                return Ok(());
            }
            if let Some(error) = self.peers.failure() {
                return Err(error);
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(self.late(call));
            }
            self.peers.remind(call, left, || self.late(call));
            if self.peers.has_departed(peer) {
                let gone = self.peers.gone_before(peer, call.seq(), &call.record.to_string());
                // What it announced before its goodbye is visible after it.
                if let (Some(error), false) = (gone, word.load(Ordering::Acquire) >= at_least) {
                    return Err(error);
                }
            }
        }
    }

    /// The time-out of a call: names the ranks of this machine that have not come; when all have, the rank
    /// of another machine that the data connections wait for, or those of this one that have not finished.
    pub(crate) fn late(&self, call: &Call) -> Error {
        let seq = call.seq();
        let came = |rank: &usize| self.board(*rank).published(seq).load(Ordering::Acquire) > seq;
        let finished = |rank: &usize| self.board(*rank).consumed().load(Ordering::Acquire) > seq;
        let others = || self.locals.iter().copied().filter(|rank| *rank != self.rank);
        let mut absent: Vec<usize> = others().filter(|rank| !came(rank)).collect();
        if let (true, Some(remote)) = (absent.is_empty(), self.peers.awaited()) {
            return self.peers.late_for(call, remote);
        }
        if absent.is_empty() {
            absent = others().filter(|rank| !finished(rank)).collect();
        }
        let absent: Vec<_> =
            absent.into_iter().map(|rank| (rank, self.board(rank).last_record().into())).collect();
        self.peers.late(call, &absent)
    }
}
