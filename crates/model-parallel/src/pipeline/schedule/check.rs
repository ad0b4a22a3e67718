//! Whether a schedule is right, whatever made it.
//!
//! Looked at in this order: every rank by itself (each micro-batch once through each chunk, nothing before what it needs, weight gradients in the order of micro-batches); every pair
//! of ranks (what one sends the other awaits, in the same order); and all together (nobody waits for ever).

use std::collections::BTreeSet;

use super::{channels, rendezvous, Action, Costs, Flaw, Part, Pass, Payload, Schedule, Sending};

impl Schedule {
    /// Whether it computes a step, and ends with the sends that it [promises](Schedule::sending) to end with, and any that wait less.
    ///
    /// # Errors
    ///
    /// The first flaw.
    pub fn verify(&self) -> Result<(), Flaw> {
        if [self.rank_count(), self.micro_batch_count, self.chunk_count].contains(&0) {
            return Err(Flaw::Empty);
        }
        for rank in 0..self.rank_count() {
            RankCheck::new(self, rank).all()?;
        }
        channels::check(self)?;
        let promised = [Sending::Buffered, Sending::Together, Sending::Synchronous];
        promised
            .into_iter()
            .filter(|sending| *sending <= self.sending())
            .try_for_each(|sending| self.ends_with(sending))
    }

    /// Whether nobody waits for ever where sends do this. For schedules that are right otherwise.
    ///
    /// # Errors
    ///
    /// [`Flaw::Deadlock`].
    pub fn ends_with(&self, sending: Sending) -> Result<(), Flaw> {
        match sending {
            Sending::Buffered => self.timeline(&Costs::UNIT).map(drop),
            Sending::Together | Sending::Synchronous => rendezvous::run(&self.ranks, sending),
        }
    }

    /// The most micro-batches of a chunk whose activations the rank keeps at once: from the forward pass to the end of the backward pass, that of the weights where it is by itself.
    /// A chunk has 1/v of a rank's layers.
    ///
    /// # Panics
    ///
    /// When there is no such rank.
    #[must_use]
    pub fn activations_max(&self, rank: usize) -> usize {
        let (mut kept, mut most) = (0_usize, 0);
        for action in self.actions(rank) {
            match action {
                Action::Compute { pass: Pass::Forward, .. } => kept += 1,
                Action::Compute { pass, .. } if pass.ends() => kept = kept.saturating_sub(1),
                _ => {}
            }
            most = most.max(kept);
        }
        most
    }
}

/// What a rank has of a part.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Fact {
    Arrived(Payload),
    Computed(Payload),
    WeightGradient,
    Sent(Payload),
}

/// Goes through what one rank does.
struct RankCheck<'s> {
    schedule: &'s Schedule,
    rank: usize,
    facts: BTreeSet<(Part, Fact)>,
    /// For each chunk the micro-batch whose weight gradients come next.
    next: Vec<usize>,
}

impl<'s> RankCheck<'s> {
    fn new(schedule: &'s Schedule, rank: usize) -> Self {
        Self { schedule, rank, facts: BTreeSet::new(), next: vec![0; schedule.chunk_count] }
    }

    fn all(mut self) -> Result<(), Flaw> {
        let (schedule, rank) = (self.schedule, self.rank);
        for (index, &action) in schedule.actions(rank).iter().enumerate() {
            if !self.belongs(action) {
                return Err(Flaw::Stray { rank, index, action });
            }
            if !self.is_possible(action) {
                return Err(Flaw::TooEarly { rank, index, action });
            }
            if !self.has_order(action) {
                return Err(Flaw::OutOfOrder { rank, index, action });
            }
            if !self.note(action) {
                return Err(Flaw::Repeated { rank, index, action });
            }
        }
        self.misses_nothing()
    }

    /// Whether micro-batch, chunk and peer are those of the step.
    fn belongs(&self, action: Action) -> bool {
        let (part, layout) = (action.part(), self.schedule.layout());
        if part.micro_batch >= self.schedule.micro_batch_count || part.chunk >= layout.chunk_count {
            return false;
        }
        match action {
            Action::Compute { .. } => true,
            Action::Send { payload, peer, .. } => {
                self.talks(peer, layout.target(self.rank, payload, part))
            }
            Action::Receive { payload, peer, .. } => {
                self.talks(peer, layout.origin(self.rank, payload, part))
            }
        }
    }

    /// Whether the peer is the other rank that has what comes before or after.
    fn talks(&self, peer: usize, other: Option<(usize, Part)>) -> bool {
        peer != self.rank && other.is_some_and(|(rank, _)| rank == peer)
    }

    /// Whether the rank has what this needs.
    fn is_possible(&self, action: Action) -> bool {
        let has = |part, fact| self.facts.contains(&(part, fact));
        match action {
            Action::Receive { .. } => true,
            Action::Send { payload, part, .. } => has(part, Fact::Computed(payload)),
            Action::Compute { pass: Pass::Forward, part } => {
                self.is_given(Payload::Activation, part)
            }
            Action::Compute { pass: Pass::BackwardWeight, part } => {
                has(part, Fact::Computed(Payload::Gradient))
            }
            Action::Compute { pass: Pass::Backward | Pass::BackwardInput, part } => {
                has(part, Fact::Computed(Payload::Activation))
                    && self.is_given(Payload::Gradient, part)
            }
        }
    }

    /// Whether a stage's input, or the gradient of its output, is there: received, of the rank's own chunk beside it, or at the ends of the model from nowhere.
    fn is_given(&self, payload: Payload, part: Part) -> bool {
        match self.schedule.layout().origin(self.rank, payload, part) {
            None => true,
            Some((peer, theirs)) if peer == self.rank => {
                self.facts.contains(&(theirs, Fact::Computed(payload)))
            }
            Some(_) => self.facts.contains(&(part, Fact::Arrived(payload))),
        }
    }

    fn has_order(&mut self, action: Action) -> bool {
        match action {
            Action::Compute { pass, part } if pass.ends() => {
                let next = &mut self.next[part.chunk];
                let right = part.micro_batch <= *next;
                *next = part.micro_batch + 1;
                right
            }
            _ => true,
        }
    }

    /// Notes what the rank has now; false where it had it before.
    fn note(&mut self, action: Action) -> bool {
        match action {
            Action::Send { payload, part, .. } => self.facts.insert((part, Fact::Sent(payload))),
            Action::Receive { payload, part, .. } => {
                self.facts.insert((part, Fact::Arrived(payload)))
            }
            Action::Compute { pass, part } => {
                let made = pass
                    .hands_on()
                    .is_none_or(|made| self.facts.insert((part, Fact::Computed(made))));
                let ended = !pass.ends() || self.facts.insert((part, Fact::WeightGradient));
                made && ended
            }
        }
    }

    fn misses_nothing(&self) -> Result<(), Flaw> {
        for micro_batch in 0..self.schedule.micro_batch_count {
            for chunk in 0..self.schedule.chunk_count {
                let has = |fact| self.facts.contains(&(Part { micro_batch, chunk }, fact));
                let forward = has(Fact::Computed(Payload::Activation));
                if !forward || !has(Fact::WeightGradient) {
                    let direction = if forward { "backward" } else { "forward" };
                    return Err(Flaw::Missing { rank: self.rank, micro_batch, chunk, direction });
                }
            }
        }
        Ok(())
    }
}
