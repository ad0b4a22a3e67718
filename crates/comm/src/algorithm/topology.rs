//! Where the ranks are, and the order in which a sum visits them. Pure.
//!
//! A *stage* is a longest run of consecutive ranks of one machine: they add by reading each other's
//! memory, in rank order. The sum visits the stages in order too, so it is `((g0 + g1) + g2) + g3`
//! wherever the ranks are. A *lane* is one of several chains that share the work: lane j runs through
//! rank j of every stage.

use std::ops::Range;

/// The machine of each rank, and the stages that follow from it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Topology {
    machines: Vec<usize>,
    stages: Vec<Range<usize>>,
}

/// One rank's place in the chain.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct RankPlace {
    pub(crate) stage: usize,
    pub(crate) stage_count: usize,
    /// `None`: this rank is in no lane; others of its stage do its part.
    pub(crate) lane: Option<usize>,
    pub(crate) lane_count: usize,
    /// The rank of this lane in the stage before and after.
    pub(crate) previous: Option<usize>,
    pub(crate) next: Option<usize>,
}

impl Topology {
    /// `machines[rank]` is equal for ranks that share memory.
    pub(crate) fn new(machines: Vec<usize>) -> Self {
        let mut stages: Vec<Range<usize>> = Vec::new();
        for (rank, machine) in machines.iter().enumerate() {
            match stages.last_mut() {
                Some(stage) if machines[stage.start] == *machine => stage.end = rank + 1,
                _ => stages.push(rank..rank + 1),
            }
        }
        Self { machines, stages }
    }

    pub(crate) fn is_one_machine(&self) -> bool {
        self.stages.len() <= 1
    }

    pub(crate) fn shares_memory(&self, left: usize, right: usize) -> bool {
        self.machines[left] == self.machines[right]
    }

    /// All ranks of the machine of `rank`, in order.
    pub(crate) fn locals(&self, rank: usize) -> Vec<usize> {
        (0..self.machines.len()).filter(|other| self.shares_memory(rank, *other)).collect()
    }

    pub(crate) fn stage_of(&self, rank: usize) -> usize {
        self.stages.iter().position(|stage| stage.contains(&rank)).unwrap_or(0)
    }

    pub(crate) fn stage(&self, index: usize) -> Range<usize> {
        self.stages[index].clone()
    }

    pub(crate) fn place(&self, rank: usize) -> RankPlace {
        let stage = self.stage_of(rank);
        let lane_count = self.stages.iter().map(ExactSizeIterator::len).min().unwrap_or(1);
        let lane = Some(rank - self.stages[stage].start).filter(|lane| *lane < lane_count);
        let rank_in = |other: Option<usize>| Some(self.stages.get(other?)?.start + lane?);
        RankPlace {
            stage,
            stage_count: self.stages.len(),
            lane,
            lane_count,
            previous: rank_in(stage.checked_sub(1)),
            next: rank_in(Some(stage + 1)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranks_placed_in_blocks_make_one_stage_a_machine() {
        let topology = Topology::new(vec![5, 5, 9, 9]);
        assert_eq!((topology.stage(0), topology.stage(1)), (0..2, 2..4));
        let place = topology.place(1);
        assert_eq!((place.lane, place.previous, place.next), (Some(1), None, Some(3)));
        assert_eq!(topology.locals(3), [2, 3]);
    }

    #[test]
    fn ranks_placed_round_robin_keep_the_order_of_the_sum() {
        let topology = Topology::new(vec![0, 1, 0, 1]);
        let visited: Vec<_> = (0..4).flat_map(|stage| topology.stage(stage)).collect();
        assert_eq!(visited, [0, 1, 2, 3]);
        assert_eq!(topology.place(2).next, Some(3));
        assert_eq!(topology.locals(2), [0, 2]);
    }

    #[test]
    fn uneven_machines_have_as_many_lanes_as_the_smallest() {
        let topology = Topology::new(vec![0, 0, 0, 1]);
        assert_eq!(topology.place(0).next, Some(3));
        assert_eq!(topology.place(2).lane, None);
        assert_eq!(topology.place(3).previous, Some(0));
    }
}
