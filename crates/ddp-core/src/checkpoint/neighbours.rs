//! Which rank keeps whose share of a snapshot. Pure.
//!
//! A rank's share goes to a rank of the next node, the last node's to the first: whichever node is lost, all its shares are on another
//! one. On one node nobody keeps anything for others: the launcher's memory outlives a rank, and nothing outlives the node.

/// A rank's neighbours.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Neighbours {
    /// Who keeps this rank's share.
    pub(super) keeper: Option<usize>,
    /// Whose shares this rank keeps.
    pub(super) wards: Vec<usize>,
}

impl Neighbours {
    /// Those of `rank`, when rank `r` is on node `nodes[r]`.
    pub(super) fn of(rank: usize, nodes: &[usize]) -> Self {
        let is_ward = |other: &usize| keeper(*other, nodes) == Some(rank);
        Self { keeper: keeper(rank, nodes), wards: (0..nodes.len()).filter(is_ward).collect() }
    }
}

/// The rank of the next node that has the same place there as `rank` on its own; counted around where that node has fewer.
fn keeper(rank: usize, nodes: &[usize]) -> Option<usize> {
    let mine = *nodes.get(rank)?;
    let others = || nodes.iter().copied().filter(|&node| node != mine);
    let next = others().filter(|&node| node > mine).min().or_else(|| others().min())?;
    let ranks_of = |node| (0..nodes.len()).filter(move |&other| nodes[other] == node);
    let theirs: Vec<usize> = ranks_of(next).collect();
    let place = ranks_of(mine).position(|other| other == rank)?;
    theirs.get(place % theirs.len()).copied()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whichever_node_is_lost_every_share_is_elsewhere() {
        let worlds: [&[usize]; 6] = [
            &[0, 1],
            &[0, 0, 1, 1],
            &[0, 1, 2, 3],
            &[0, 0, 0, 1],
            &[0, 1, 1, 1, 2, 2],
            &[4, 0, 4, 0, 2], // in no order, with numbers that are left out
        ];
        for nodes in worlds {
            let all: Vec<_> = (0..nodes.len()).map(|rank| Neighbours::of(rank, nodes)).collect();
            for (rank, neighbours) in all.iter().enumerate() {
                let keeper = neighbours.keeper.unwrap();
                assert_ne!(nodes[keeper], nodes[rank], "{nodes:?}");
                let keepers = all.iter().filter(|other| other.wards.contains(&rank));
                assert_eq!(keepers.count(), 1, "{nodes:?}");
                assert!(all[keeper].wards.contains(&rank), "{nodes:?}");
            }
        }
        assert_eq!(Neighbours::of(1, &[0, 0, 1, 1]).keeper, Some(3));
        assert_eq!(Neighbours::of(3, &[0, 0, 0, 1]).wards, [0, 1, 2]);
    }

    #[test]
    fn on_one_node_nobody_keeps_anything_for_others() {
        for ranks in 1..4 {
            for rank in 0..ranks {
                assert_eq!(Neighbours::of(rank, &vec![3; ranks]), Neighbours::default());
            }
        }
    }
}
