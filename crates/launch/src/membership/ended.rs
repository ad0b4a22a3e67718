//! How the members of a generation have ended, of those that have; counted, so that thousands of nodes cost no more than
//! their own statuses. Pure.

use std::collections::BTreeMap;

use super::Condition;

/// How a member's part of the generation ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum End {
    Told(Condition),
    /// It was not heard of for too long.
    Lost,
}

/// The ends of a generation.
#[derive(Debug, Default)]
pub(super) struct Ended {
    by_node: BTreeMap<usize, End>,
    well: usize,
    stopped: usize,
    failed: usize,
    lost: usize,
}

impl Ended {
    /// The first end of a node counts.
    pub(super) fn insert(&mut self, node: usize, end: End) {
        if self.by_node.contains_key(&node) {
            return;
        }
        let count = match end {
            End::Told(Condition::Well) => &mut self.well,
            End::Told(Condition::Stopped | Condition::Running) => &mut self.stopped,
            End::Told(Condition::Failed(..)) => &mut self.failed,
            End::Lost => &mut self.lost,
        };
        *count += 1;
        self.by_node.insert(node, end);
    }

    pub(super) fn has(&self, node: usize) -> bool {
        self.by_node.contains_key(&node)
    }

    /// Of how many nodes.
    pub(super) fn count(&self) -> usize {
        self.by_node.len()
    }

    pub(super) fn all_well(&self) -> bool {
        self.well == self.by_node.len()
    }

    pub(super) const fn lost(&self) -> usize {
        self.lost
    }

    /// Somebody has failed or is lost: the others cannot go on.
    pub(super) const fn is_bad(&self) -> bool {
        self.failed + self.lost > 0
    }

    /// Somebody has ended because he was asked to, or was cut off.
    pub(super) const fn has_stopped(&self) -> bool {
        self.stopped > 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_end_of_each_node_is_counted() {
        let mut ended = Ended::default();
        assert!(ended.all_well() && !ended.is_bad());
        ended.insert(1, End::Told(Condition::Well));
        ended.insert(1, End::Lost);
        assert!((ended.count(), ended.lost()) == (1, 0) && ended.all_well() && ended.has(1));
        ended.insert(2, End::Told(Condition::Stopped));
        assert!(ended.has_stopped() && !ended.is_bad() && !ended.all_well());
        ended.insert(3, End::Lost);
        assert!((ended.count(), ended.lost()) == (3, 1) && ended.is_bad());
    }
}
