//! How long a schedule takes.
//!
//! Ranks compute one thing after the other; a send costs the rank nothing, and the message is there `transfer` later. When an action ends depends on the rank's last one
//! and on one message alone, so ranks may be looked at in any order, and there is one result (Kahn 1974).

use std::collections::{BTreeMap, VecDeque};

use super::{Action, Flaw, Part, Pass, Schedule, Sending};

/// What passes cost, in any unit of time. Of a chunk, where a rank has several.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Costs {
    /// A forward pass.
    pub forward: u64,
    /// Gradients of the input.
    pub backward_input: u64,
    /// Gradients of the weights. A whole backward pass costs this and the one above.
    pub backward_weight: u64,
    /// From the end of a pass to the moment when another rank has its result.
    pub transfer: u64,
}

impl Costs {
    /// All passes the same, no transfers: what pictures show.
    pub const UNIT: Self = Self { forward: 1, backward_input: 1, backward_weight: 1, transfer: 0 };

    /// A whole backward pass.
    #[must_use]
    pub const fn backward(&self) -> u64 {
        self.backward_input + self.backward_weight
    }

    const fn of(&self, pass: Pass) -> u64 {
        match pass {
            Pass::Forward => self.forward,
            Pass::Backward => self.backward(),
            Pass::BackwardInput => self.backward_input,
            Pass::BackwardWeight => self.backward_weight,
        }
    }
}

/// What a rank computes from when to when.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Slot {
    /// What.
    pub pass: Pass,
    /// Of what.
    pub part: Part,
    /// When it begins.
    pub start: u64,
    /// When it has ended.
    pub end: u64,
}

/// When what happens. Prints as a picture: a line for each rank.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Timeline {
    ranks: Vec<Vec<Slot>>,
}

impl Timeline {
    /// What each rank computes, in order.
    #[must_use]
    pub(crate) fn ranks(&self) -> &[Vec<Slot>] {
        &self.ranks
    }

    /// When the last rank has ended.
    #[must_use]
    pub fn end(&self) -> u64 {
        self.ranks.iter().flatten().map(|slot| slot.end).max().unwrap_or(0)
    }

    /// How long the rank computes nothing, until the last has ended: the bubble.
    ///
    /// # Panics
    ///
    /// When there is no such rank.
    #[must_use]
    pub fn idle(&self, rank: usize) -> u64 {
        self.end() - self.ranks[rank].iter().map(|slot| slot.end - slot.start).sum::<u64>()
    }
}

impl Schedule {
    /// When what happens, with these costs, and sends that do not wait. Deterministic.
    ///
    /// # Errors
    ///
    /// [`Flaw::Deadlock`].
    pub fn timeline(&self, costs: &Costs) -> Result<Timeline, Flaw> {
        let mut running = Running::new(self, costs);
        while (0..self.rank_count()).any(|rank| running.advance(rank)) {}
        running.ended()
    }
}

struct Running<'s> {
    schedule: &'s Schedule,
    costs: &'s Costs,
    /// For each rank: its next action and the time.
    at: Vec<(usize, u64)>,
    slots: Vec<Vec<Slot>>,
    /// From one rank to another: when each message arrives.
    under_way: BTreeMap<(usize, usize), VecDeque<u64>>,
}

impl<'s> Running<'s> {
    fn new(schedule: &'s Schedule, costs: &'s Costs) -> Self {
        let ranks = schedule.rank_count();
        let (at, slots) = (vec![(0, 0); ranks], vec![Vec::new(); ranks]);
        Self { schedule, costs, at, slots, under_way: BTreeMap::new() }
    }

    /// Lets the rank do what it can; whether that was anything.
    fn advance(&mut self, rank: usize) -> bool {
        let before = self.at[rank].0;
        let schedule = self.schedule;
        for action in &schedule.actions(rank)[before..] {
            let Some(time) = self.done(rank, *action) else { break };
            self.at[rank] = (self.at[rank].0 + 1, time);
        }
        self.at[rank].0 > before
    }

    /// When the rank has done this; `None` while it waits for a message that nobody has sent.
    fn done(&mut self, rank: usize, action: Action) -> Option<u64> {
        let start = self.at[rank].1;
        match action {
            Action::Compute { pass, part } => {
                let end = start + self.costs.of(pass);
                self.slots[rank].push(Slot { pass, part, start, end });
                Some(end)
            }
            Action::Send { peer, .. } => {
                let arrival = start + self.costs.transfer;
                self.under_way.entry((rank, peer)).or_default().push_back(arrival);
                Some(start)
            }
            Action::Receive { peer, .. } => {
                let arrival = self.under_way.get_mut(&(peer, rank))?.pop_front()?;
                Some(start.max(arrival))
            }
        }
    }

    fn ended(self) -> Result<Timeline, Flaw> {
        let next = |(rank, (at, _)): (usize, &(usize, u64))| {
            Some((rank, *self.schedule.actions(rank).get(*at)?))
        };
        let waiting: Vec<(usize, Action)> = self.at.iter().enumerate().filter_map(next).collect();
        if waiting.is_empty() {
            return Ok(Timeline { ranks: self.slots });
        }
        Err(Flaw::Deadlock { sending: Sending::Buffered, waiting })
    }
}
