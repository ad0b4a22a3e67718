//! Which parameters that are needed whole come together when, and on which rank. Pure.
//!
//! Buckets go in waves: as many at once as leave every rank something to compute, but no more memory than is bounded.
//! Inside a wave the most expensive parameter goes first, each to the rank that has least to do so far (longest
//! processing time first: Graham 1969), ties to the lowest rank.

use std::ops::Range;

use crate::store::plan::{Plan, PARAMETER_ALIGNMENT_LEN};

/// Elements of a wave: it closes when it has as many as the first, and enough parameters, or as many as the second.
pub(super) const WAVE_LENS: (usize, usize) = (16 << 20, 64 << 20);

/// Buckets whose parameters come together at once.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Wave {
    /// Number of their parameters' kind.
    pub(super) kind: usize,
    /// Numbers of buckets, and where they lie in the wave's memory.
    pub(super) buckets: Vec<(usize, Range<usize>)>,
    /// In the order of their places.
    pub(super) members: Vec<Member>,
}

/// A parameter of a wave.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Member {
    pub(super) parameter: usize,
    /// The rank that computes it.
    pub(super) owner: usize,
    /// Where it lies in the wave's memory, with the padding behind it.
    pub(super) range: Range<usize>,
}

impl Wave {
    /// Elements of its memory.
    pub(super) fn len(&self) -> usize {
        self.buckets.last().map_or(0, |(_, range)| range.end)
    }
}

/// The waves of a plan, kind by kind; `costs` says what each parameter that is needed whole costs.
pub(super) fn waves(
    plan: &Plan,
    costs: &[Option<u64>],
    world_size: usize,
    (enough_len, most_len): (usize, usize),
) -> Vec<Wave> {
    let mut all: Vec<Wave> = Vec::new();
    let kind_count = plan.buckets.iter().map(|bucket| bucket.kind + 1).max().unwrap_or(0);
    for kind in 0..kind_count {
        let mut open = Wave { kind, buckets: Vec::new(), members: Vec::new() };
        for (index, bucket) in plan.buckets.iter().enumerate() {
            let is_needed = bucket.parameters.iter().any(|&parameter| costs[parameter].is_some());
            if bucket.kind != kind || !is_needed {
                continue;
            }
            let is_full = open.len() >= enough_len && open.members.len() >= 2 * world_size;
            if !open.members.is_empty() && (is_full || open.len() + bucket.range.len() > most_len) {
                let next = Wave { kind, buckets: Vec::new(), members: Vec::new() };
                all.push(std::mem::replace(&mut open, next));
            }
            let start = open.len();
            open.buckets.push((index, start..start + bucket.range.len()));
            for &parameter in bucket.parameters.iter().filter(|&&p| costs[p].is_some()) {
                let place = &plan.places[parameter].range;
                let from = start + (place.start - bucket.range.start);
                let len = place.len().next_multiple_of(PARAMETER_ALIGNMENT_LEN);
                open.members.push(Member { parameter, owner: 0, range: from..from + len });
            }
        }
        if !open.members.is_empty() {
            all.push(open);
        }
    }
    for wave in &mut all {
        assign(&mut wave.members, costs, world_size);
    }
    all
}

fn assign(members: &mut [Member], costs: &[Option<u64>], world_size: usize) {
    let cost = |member: &Member| costs[member.parameter].unwrap_or(0);
    let mut order: Vec<usize> = (0..members.len()).collect();
    // Stable: equal ones stay in the order of their places.
    order.sort_by_key(|&at| std::cmp::Reverse(cost(&members[at])));
    let mut loads = vec![0_u64; world_size];
    for at in order {
        let owner = (0..world_size).min_by_key(|&rank| loads[rank]).unwrap_or(0);
        loads[owner] = loads[owner].saturating_add(cost(&members[at]).max(1));
        members[at].owner = owner;
    }
}

/// What a matrix costs that a parameter of this shape is, its first dimension by all others: min² × max
/// multiplications, as an orthogonalisation has them.
pub(super) fn cost(shape: &[i64]) -> u64 {
    let sizes = shape.iter().map(|&size| u64::try_from(size).unwrap_or(0));
    let rows = sizes.clone().next().unwrap_or(1);
    let columns = sizes.skip(1).fold(1_u64, u64::saturating_mul);
    let (least, most) = (rows.min(columns), rows.max(columns));
    least.saturating_mul(least).saturating_mul(most)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::plan::{Caps, Extent};

    /// Three kinds of sizes; every third parameter is not needed whole.
    fn planned(world_size: usize) -> (Plan, Vec<Option<u64>>) {
        let lens = [5000, 64, 1, 9000, 700, 2048, 77, 4096, 3000];
        let extents: Vec<Extent> = (lens.iter().enumerate())
            .map(|(at, &len)| Extent {
                len,
                element_bytes: 4,
                kind: usize::from(at == 4),
                unit: None,
            })
            .collect();
        let order: Vec<usize> = (0..lens.len()).rev().collect();
        let plan = Plan::new(&extents, &order, Caps { bucket_bytes: &[100, 30000], world_size });
        let costs = (lens.iter().enumerate())
            .map(|(at, &len)| (at % 3 != 2).then_some(len as u64))
            .collect();
        (plan, costs)
    }

    #[test]
    fn every_parameter_that_is_needed_whole_is_in_one_wave_once() {
        for world_size in [1, 2, 3, 4, 7] {
            let (plan, costs) = planned(world_size);
            for lens in [(1, 1), (1, 1 << 20), (20_000, 1 << 20), (1 << 20, 1 << 20)] {
                let waves = waves(&plan, &costs, world_size, lens);
                let mut seen = vec![0; costs.len()];
                for wave in &waves {
                    let mut end = 0;
                    for (bucket, range) in &wave.buckets {
                        assert_eq!(range.start, end);
                        assert_eq!(range.len(), plan.buckets[*bucket].range.len());
                        assert_eq!(plan.buckets[*bucket].kind, wave.kind);
                        end = range.end;
                    }
                    for member in &wave.members {
                        seen[member.parameter] += 1;
                        assert!(member.owner < world_size && member.range.end <= end);
                        let place = &plan.places[member.parameter];
                        let (_, range) =
                            wave.buckets.iter().find(|(b, _)| *b == place.bucket).unwrap();
                        let offset = place.range.start - plan.buckets[place.bucket].range.start;
                        assert_eq!(member.range.start, range.start + offset);
                    }
                    assert!(wave.len() <= lens.1 || wave.buckets.len() == 1, "memory is bounded");
                }
                for (count, cost) in seen.iter().zip(&costs) {
                    assert_eq!(*count, usize::from(cost.is_some()));
                }
            }
        }
    }

    #[test]
    fn no_rank_has_more_than_its_share_and_one_parameter() {
        for world_size in [1, 2, 3, 4] {
            let (plan, costs) = planned(world_size);
            for wave in waves(&plan, &costs, world_size, WAVE_LENS) {
                let mut loads = vec![0; world_size];
                for member in &wave.members {
                    loads[member.owner] += costs[member.parameter].unwrap();
                }
                let sum: u64 = loads.iter().sum();
                let largest = wave.members.iter().filter_map(|m| costs[m.parameter]).max().unwrap();
                let most = loads.iter().max().unwrap();
                assert!(*most <= sum / world_size as u64 + largest, "{loads:?}");
            }
        }
    }

    #[test]
    fn a_matrix_costs_what_its_short_side_makes_of_it() {
        assert_eq!(cost(&[3, 5]), 45);
        assert_eq!(cost(&[5, 3]), 45);
        assert_eq!(cost(&[4, 2, 3, 3]), 16 * 18);
        assert_eq!(cost(&[7]), 7);
    }
}
