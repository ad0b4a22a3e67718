//! Adds sends and receives to the order in which a rank computes.
//!
//! A rank sends what it has computed at once, and receives just before it needs something. Messages between two ranks arrive in the order in which they
//! were sent; that a rank needs them in that order, also where activations and gradients go the same way (two ranks with several chunks), is what
//! `check.rs` looks at.

use super::{Action, Layout, Order};

pub(super) fn added(layout: Layout, rank: usize, order: &Order) -> Vec<Action> {
    let others = |peer: Option<usize>| peer.filter(|peer| *peer != rank);
    let mut actions = Vec::new();
    for &(pass, part) in order {
        if let Some(payload) = pass.hands_on() {
            let peer = others(layout.origin(rank, payload, part).map(|(peer, _)| peer));
            actions.extend(peer.map(|peer| Action::Receive { payload, part, peer }));
        }
        actions.push(Action::Compute { pass, part });
        if let Some(payload) = pass.hands_on() {
            let peer = others(layout.target(rank, payload, part).map(|(peer, _)| peer));
            actions.extend(peer.map(|peer| Action::Send { payload, part, peer }));
        }
    }
    actions
}
