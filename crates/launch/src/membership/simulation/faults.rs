//! What goes wrong in a simulated job, and when: all of it follows from the seed.

use std::time::Duration;

use super::Schedule;

/// Something that happens to a node.
#[derive(Clone, Copy, Debug)]
pub(super) enum Fault {
    /// Its launcher and its ranks are gone.
    Kill { node: usize },
    /// A launcher is started on it, if none lives there.
    Start { node: usize },
    /// Nothing reaches it or comes from it.
    CutOff { node: usize, until: Duration },
}

/// All that happens to the nodes of a job. Node 0, whose launcher hosts the store, lives.
pub(super) fn plan(schedule: Schedule, random: &mut Random) -> Vec<(Duration, Fault)> {
    let Schedule { nodes, faults_for, .. } = schedule;
    let mut plan = Vec::new();
    for node in 0..nodes {
        plan.push((random.below(500), Fault::Start { node }));
    }
    let milliseconds = u64::try_from(faults_for.as_millis()).unwrap_or(u64::MAX);
    let count = if faults_for.is_zero() { 0 } else { 2 * nodes };
    for _ in 0..count {
        let node = random.number(nodes as u64);
        let Some(node) = usize::try_from(node).ok().filter(|node| *node > 0) else { continue };
        let at = random.below(milliseconds);
        if random.one_in(3) {
            let until = faults_for.min(at + random.below(12_000));
            plan.push((at, Fault::CutOff { node, until }));
        } else {
            plan.push((at, Fault::Kill { node }));
            plan.push((at + random.below(10_000), Fault::Start { node }));
        }
    }
    // In the end all nodes are there.
    plan.extend((1..nodes).map(|node| (faults_for + random.below(1000), Fault::Start { node })));
    plan
}

/// A generator that is the same everywhere: `SplitMix64` (Steele, Lea, Flood 2014).
#[derive(Debug)]
pub(super) struct Random(u64);

/// Its output function.
pub(super) const fn mix(value: u64) -> u64 {
    let value = (value ^ (value >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let value = (value ^ (value >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    value ^ (value >> 31)
}

impl Random {
    pub(super) const fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// Below `limit`; the bias is of no account.
    pub(super) fn number(&mut self, limit: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        mix(self.0) % limit.max(1)
    }

    pub(super) fn one_in(&mut self, count: u64) -> bool {
        self.number(count) == 0
    }

    pub(super) fn below(&mut self, milliseconds: u64) -> Duration {
        Duration::from_millis(self.number(milliseconds))
    }

    /// How often a message arrives.
    pub(super) fn copies(&mut self) -> usize {
        match self.number(20) {
            0 | 1 => 0,
            2 => 2,
            _ => 1,
        }
    }

    /// How long a message takes: with faults some take so long that many others overtake them.
    pub(super) fn delay(&mut self, has_faults: bool) -> Duration {
        if has_faults && self.one_in(10) {
            return self.below(20_000);
        }
        Duration::from_micros(100 + self.number(2000))
    }
}
