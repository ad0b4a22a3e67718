//! Whether a schedule ends where sends wait until they are received.
//!
//! Each rank has a *front*: the messages that it has under way. With synchronous sends that is one; where calls go together it is all that follow
//! each other without a computation between them. A send and a receive that stand in both fronts, each the first of its channel, meet and are gone; a rank whose front
//! is empty goes on. What can meet does not depend on the order in which ranks are looked at.

use super::{Action, Flaw, Sending};

pub(super) fn run(ranks: &[Vec<Action>], sending: Sending) -> Result<(), Flaw> {
    let mut fronts: Vec<Front<'_>> = ranks.iter().map(|left| Front::new(left, sending)).collect();
    loop {
        let mut met = false;
        for from in 0..fronts.len() {
            while let Some(to) = partner(&fronts, from) {
                fronts[from].take(|action| receiver(action) == Some(to));
                fronts[to].take(|action| sender(action) == Some(from));
                met = true;
            }
        }
        if !met {
            return ended(&fronts, sending);
        }
    }
}

fn ended(fronts: &[Front<'_>], sending: Sending) -> Result<(), Flaw> {
    let waiting: Vec<(usize, Action)> = fronts
        .iter()
        .enumerate()
        .filter_map(|(rank, front)| Some((rank, *front.messages.first()?)))
        .collect();
    if waiting.is_empty() {
        return Ok(());
    }
    Err(Flaw::Deadlock { sending, waiting })
}

/// A rank to which a message can go: it stands in both fronts.
fn partner(fronts: &[Front<'_>], from: usize) -> Option<usize> {
    let awaits = |to: &usize| {
        let front = fronts.get(*to);
        front.is_some_and(|front| front.messages.iter().any(|it| sender(*it) == Some(from)))
    };
    fronts[from].messages.iter().filter_map(|action| receiver(*action)).find(awaits)
}

const fn receiver(action: Action) -> Option<usize> {
    match action {
        Action::Send { peer, .. } => Some(peer),
        Action::Receive { .. } | Action::Compute { .. } => None,
    }
}

const fn sender(action: Action) -> Option<usize> {
    match action {
        Action::Receive { peer, .. } => Some(peer),
        Action::Send { .. } | Action::Compute { .. } => None,
    }
}

const fn computes(action: &Action) -> bool {
    matches!(action, Action::Compute { .. })
}

/// The messages that a rank has under way, and what comes after them.
struct Front<'s> {
    messages: Vec<Action>,
    left: &'s [Action],
    sending: Sending,
}

impl<'s> Front<'s> {
    fn new(left: &'s [Action], sending: Sending) -> Self {
        let mut front = Self { messages: Vec::new(), left, sending };
        front.advance();
        front
    }

    /// Takes out the first message that is meant.
    fn take(&mut self, is_meant: impl Fn(Action) -> bool) {
        if let Some(at) = self.messages.iter().position(|action| is_meant(*action)) {
            self.messages.remove(at);
        }
        if self.messages.is_empty() {
            self.advance();
        }
    }

    fn advance(&mut self) {
        let start =
            self.left.iter().position(|action| !computes(action)).unwrap_or(self.left.len());
        let left = &self.left[start..];
        let run = left.iter().position(computes).unwrap_or(left.len());
        let len = if self.sending == Sending::Together { run } else { run.min(1) };
        self.messages = left[..len].to_vec();
        self.left = &left[len..];
    }
}
