//! What a lane checks before it starts calls, and while they take long: whether all ranks have
//! called the same, who has left the group, whose deadline has passed.

use std::sync::atomic::Ordering;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::unit::{Check, Submitted, Unit};
use super::{is_message, Lane, LaneState};
use crate::call::Call;
use crate::error::{Error, Result};
use crate::fingerprint::{CallRecord, Op};

/// How long a message of a peer that has left may still be on its way.
const ON_ITS_WAY: Duration = Duration::from_secs(1);

impl Lane {
    /// Whether what `unit` holds may start: all ranks have called it. Of messages the receiver's side waits for
    /// that; in other cases it is looked at later ([`Lane::check_unmet`]), since a peer may call its side only after
    /// it has got something else of this unit.
    pub(super) fn is_checked(&self, unit: &mut Unit) -> Result<bool> {
        let is_lone = unit.calls.len() == 1;
        while let Some(one) = unit.calls.get_mut(unit.checked) {
            match &one.check {
                Check::None => {}
                Check::Collective(check) => {
                    let Some(result) = self.core.poll_check(check) else {
                        return self.gone_before_showing(check).map(|()| false);
                    };
                    result?;
                }
                Check::Message(index) => {
                    if self.is_met(&one.call, *index)? {
                        one.check = Check::None;
                    } else if is_lone && one.call.op() == Op::Receive {
                        return Ok(false);
                    }
                }
            }
            unit.checked += 1;
        }
        Ok(true)
    }

    /// Whether the peer has called the other side of message `index`; an error when that is another one, or can
    /// come no more.
    fn is_met(&self, call: &Call, index: u64) -> Result<bool> {
        let (peers, peer) = (&self.core.peers, call.root);
        // In this order: what was announced before a goodbye is there after it.
        let departed = peers.has_departed(peer);
        if let Some(theirs) = peers.points.take_announced(peer, call.op(), index) {
            let of =
                |record: &CallRecord| (record.seq, record.dtype, record.len, record.tag.clone());
            let fits = of(&call.record.travelled()) == of(&theirs);
            return if fits {
                Ok(true)
            } else {
                Err(self.core.out_of_step(call, peer, Some(theirs)))
            };
        }
        let gone = departed
            .then(|| peers.gone_before(peer, u64::MAX - 1, &call.record.to_string()))
            .flatten();
        gone.map_or(Ok(false), Err)
    }

    /// Compares the messages that have started, once their peers have called the other side.
    pub(super) fn check_unmet(&self, state: &mut LaneState) -> Result<()> {
        let mut result = Ok(());
        state.unmet.retain(|(call, index)| {
            if result.is_err() || call.is_done() {
                return false;
            }
            match self.is_met(call, *index) {
                Ok(met) => !met,
                Err(error) => {
                    result = Err(error);
                    false
                }
            }
        });
        result
    }

    /// Whether `unit` works on memory of a call that has not ended: calls on the same memory are in order, on
    /// the GPU by the transport.
    pub(super) fn comes_after(&self, unit: &Unit, moving: &[Arc<Call>]) -> bool {
        let rank = self.core.rank;
        unit.calls.iter().any(|Submitted { call, .. }| {
            let bytes = call.bytes_on(rank);
            let (memory, mut moving) = (&call.lock().memory, moving.iter());
            moving.any(|other| memory.meets(bytes, &other.lock().memory, other.bytes_on(rank)))
        })
    }

    /// An error when a peer of this machine has left without having called this.
    fn gone_before_showing(&self, check: &Call) -> Result<()> {
        let (peers, seq) = (&self.core.peers, check.seq());
        let Some(left) = self.core.locals.iter().find(|local| peers.has_departed(**local)) else {
            return Ok(());
        };
        let gone = peers.gone_before(*left, seq, &check.record.to_string());
        // What it announced before its goodbye is visible after it.
        let came = self.core.board(*left).published(seq).load(Ordering::Acquire) > seq;
        gone.filter(|_| !came).map_or(Ok(()), Err)
    }

    /// Messages do not wait for collectives whose turn has not come, where the library lets them; but for those that
    /// need what an earlier call leaves in memory of the GPU, and for earlier messages of the same pair.
    pub(super) fn start_messages(&self, state: &mut LaneState) -> Result<()> {
        let mut place = 0;
        while self.messages_overtake && place < state.checking.len() {
            let unit = &state.checking[place];
            let waits = state.checking.range(..place).any(|earlier| self.keeps(earlier, unit));
            if !unit.is_free() || waits {
                place += 1;
                continue;
            }
            let started = state.checking.remove(place);
            for Submitted { call, .. } in started.into_iter().flat_map(|free| free.calls) {
                // Before it starts: a start that fails may have begun.
                state.moving.push(Arc::clone(&call));
                state.transport.start(&call, &mut call.lock().memory)?;
            }
        }
        Ok(())
    }

    /// Whether a message must not overtake an earlier unit.
    fn keeps(&self, earlier: &Unit, message: &Unit) -> bool {
        let rank = self.core.rank;
        let pairs =
            earlier.calls.iter().flat_map(|one| message.calls.iter().map(move |two| (one, two)));
        pairs.into_iter().any(|(one, two)| {
            let (one, two) = (&one.call, &two.call);
            let of = |call: &Call| (call.op(), call.root);
            let bytes = (one.bytes_on(rank), two.bytes_on(rank));
            (is_message(one) && of(one) == of(two))
                || one.lock().memory.shares_device(bytes.0, &two.lock().memory, bytes.1)
        })
    }

    /// An error when the oldest call's time is over.
    pub(super) fn check_time(&self, state: &mut LaneState) -> Result<()> {
        let overtakes = |call: &Arc<Call>| self.messages_overtake && is_message(call);
        let mut lonely = false;
        for call in state.moving.iter().filter(|call| overtakes(call)) {
            lonely |= self.check_message(call, state.lonely)?;
        }
        state.lonely = lonely.then(|| state.lonely.unwrap_or_else(Instant::now));
        let moving = state.moving.iter().find(|call| !overtakes(call));
        let waiting = state.checking.front().and_then(|unit| unit.calls.get(unit.checked));
        let Some(oldest) = moving.or(waiting.map(|front| &front.call)) else {
            return Ok(());
        };
        let late = || {
            let is_message = match waiting {
                Some(Submitted { check: Check::Collective(check), .. }) if moving.is_none() => {
                    return self.core.late(check);
                }
                Some(Submitted { check: Check::Message(_), .. }) => moving.is_none(),
                _ => false,
            };
            if is_message || state.unmet.iter().any(|(call, _)| Arc::ptr_eq(call, oldest)) {
                return self.core.peers.late_for(oldest, oldest.root);
            }
            self.stalled(oldest, state.transport.last_words())
        };
        let left = oldest.timeout.saturating_sub(state.turn.elapsed());
        if left.is_zero() {
            return Err(late());
        }
        self.core.peers.remind(oldest, left, late);
        Ok(())
    }

    /// The error for a call that every rank has called and that does not end.
    fn stalled(&self, call: &Call, said: Option<String>) -> Error {
        Error::Stalled {
            rank: self.core.rank,
            backend: self.backend,
            call: Box::new(call.record.clone()),
            timeout: call.timeout,
            said,
        }
    }

    /// An error when a message can come no more; whether its peer has left.
    fn check_message(&self, call: &Call, lonely: Option<Instant>) -> Result<bool> {
        let (peers, peer) = (&self.core.peers, call.root);
        let waited = call.started.map_or(Duration::ZERO, |started| started.elapsed());
        if waited >= call.timeout {
            return Err(peers.late_for(call, peer));
        }
        peers.remind(call, call.timeout - waited, || peers.late_for(call, peer));
        if !peers.has_departed(peer) {
            return Ok(false);
        }
        if lonely.is_some_and(|since| since.elapsed() >= ON_ITS_WAY) {
            let gone = peers.gone_before(peer, u64::MAX - 1, &call.record.to_string());
            return Err(gone.unwrap_or_else(|| peers.during_failure()));
        }
        Ok(true)
    }
}
