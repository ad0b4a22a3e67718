//! Whether what one rank sends another is what that one awaits, in the same order.

use std::collections::BTreeMap;

use super::{Action, Flaw, Payload, Schedule};

/// What, of which micro-batch, for which stage.
type Message = (Payload, usize, usize);

/// All that goes from one rank to another in a step.
#[derive(Default)]
struct Channel {
    sent: Vec<Message>,
    awaited: Vec<Message>,
}

pub(super) fn check(schedule: &Schedule) -> Result<(), Flaw> {
    for ((from, to), channel) in channels(schedule) {
        let len = channel.sent.len().max(channel.awaited.len());
        let mut pairs = (0..len).map(|at| (at, channel.sent.get(at), channel.awaited.get(at)));
        if let Some((index, sent, awaited)) = pairs.find(|(_, sent, awaited)| sent != awaited) {
            let (sent, awaited) = (sent.copied(), awaited.copied());
            return Err(Flaw::Unmatched { from, to, index, sent, awaited });
        }
    }
    Ok(())
}

fn channels(schedule: &Schedule) -> BTreeMap<(usize, usize), Channel> {
    let layout = schedule.layout();
    let mut channels: BTreeMap<_, Channel> = BTreeMap::new();
    for rank in 0..schedule.rank_count() {
        for &action in schedule.actions(rank) {
            match action {
                Action::Compute { .. } => {}
                Action::Send { payload, part, peer } => {
                    let target = layout.target(rank, payload, part);
                    let stage = target.map_or(0, |(to, theirs)| layout.stage(to, theirs.chunk));
                    let channel = channels.entry((rank, peer)).or_default();
                    channel.sent.push((payload, part.micro_batch, stage));
                }
                Action::Receive { payload, part, peer } => {
                    let stage = layout.stage(rank, part.chunk);
                    let channel = channels.entry((peer, rank)).or_default();
                    channel.awaited.push((payload, part.micro_batch, stage));
                }
            }
        }
    }
    channels
}
