//! What a rank updates: for each bucket its segment (ZeRO) or all of it, cut into pieces of parameters, and
//! neighbouring pieces that are treated alike joined into runs. Pure.
//!
//! Pieces end at the padding before the next parameter, so that every run is a multiple of the alignment:
//! no kernel's scalar tail ever computes different elements in one ZeRO stage than in the other. Padding
//! holds zeros and stays zero under every rule.

use std::ops::Range;

use crate::store::plan::{Bucket, Plan, PARAMETER_ALIGNMENT_LEN};

/// How a parameter is treated in a step: with which group's settings, and as which of its own steps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Treatment {
    pub(super) group: usize,
    pub(super) step: u64,
}

/// Neighbouring elements that are treated alike.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Run {
    /// Elements of the flat storage.
    pub(super) range: Range<usize>,
    /// The same elements in the rank's segment, as the optimizer's state has them.
    pub(super) state: Range<usize>,
    pub(super) treatment: Treatment,
}

/// A part of one parameter.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Piece {
    pub(super) parameter: usize,
    pub(super) run: Run,
}

/// A rank's part of a bucket.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Owned {
    pub(super) storage: usize,
    pub(super) pieces: Vec<Piece>,
    pub(super) runs: Vec<Run>,
}

/// A rank's parts of all buckets; `treatments` says of each parameter how it is treated, if it is updated.
pub(super) fn owned(
    plan: &Plan,
    segment: impl Fn(&Bucket) -> Range<usize>,
    treatments: &[Option<Treatment>],
) -> Vec<Owned> {
    let mut parts = Vec::with_capacity(plan.buckets.len());
    for bucket in &plan.buckets {
        let segment = segment(bucket);
        let mut pieces = Vec::new();
        for &parameter in &bucket.parameters {
            let place = &plan.places[parameter].range;
            let end = place.end.next_multiple_of(PARAMETER_ALIGNMENT_LEN).min(segment.end);
            let start = place.start.max(segment.start);
            let Some(treatment) = treatments[parameter].filter(|_| start < end) else { continue };
            let run = Run {
                range: start..end,
                state: start - segment.start..end - segment.start,
                treatment,
            };
            pieces.push(Piece { parameter, run });
        }
        parts.push(Owned { storage: bucket.storage, runs: joined(&pieces), pieces });
    }
    parts
}

fn joined(pieces: &[Piece]) -> Vec<Run> {
    let mut runs: Vec<Run> = Vec::new();
    for piece in pieces {
        match runs.last_mut() {
            Some(last)
                if last.treatment == piece.run.treatment
                    && last.range.end == piece.run.range.start =>
            {
                last.range.end = piece.run.range.end;
                last.state.end = piece.run.state.end;
            }
            _ => runs.push(piece.run.clone()),
        }
    }
    runs
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::plan::{Caps, Extent};

    #[test]
    fn the_ranks_parts_together_are_every_parameter_once() {
        let lens = [5000, 64, 1, 9000, 0, 2048, 77];
        let treatment = |group| Some(Treatment { group, step: 3 });
        let treatments =
            [0, 1, 1, 0, 0, 2, 1].map(|group| treatment(group).filter(|t| t.group < 2));
        let extents: Vec<Extent> =
            lens.iter().map(|&len| Extent { len, element_bytes: 4, kind: 0, unit: None }).collect();
        for world_size in [1, 2, 3, 4, 7] {
            let caps = Caps { bucket_bytes: &[100, 30000], world_size };
            let plan = Plan::new(&extents, &[6, 5, 4, 3, 2, 1, 0], caps);
            let mut covered: Vec<Vec<u32>> =
                plan.storage_lens.iter().map(|&len| vec![0; len]).collect();
            for rank in 0..world_size {
                let segment = |bucket: &Bucket| bucket.segment(rank, world_size);
                for part in &owned(&plan, segment, &treatments) {
                    let mut state = vec![0; segment(&plan.buckets[part.storage]).len()];
                    for run in &part.runs {
                        assert_eq!(run.range.len(), run.state.len());
                        assert_eq!(run.range.start % PARAMETER_ALIGNMENT_LEN, 0);
                        assert_eq!(run.range.len() % PARAMETER_ALIGNMENT_LEN, 0);
                        run.range.clone().for_each(|at| covered[part.storage][at] += 1);
                        run.state.clone().for_each(|at| state[at] += 1);
                    }
                    assert!(state.iter().all(|&count| count <= 1), "state is not shared");
                    for piece in &part.pieces {
                        assert_eq!(Some(piece.run.treatment), treatments[piece.parameter]);
                    }
                }
            }
            for (parameter, place) in plan.places.iter().enumerate() {
                let times = u32::from(treatments[parameter].is_some());
                let mut all = place.range.clone();
                assert!(all.all(|at| covered[place.storage][at] == times), "{world_size} ranks");
            }
            assert!(covered.iter().flatten().all(|&count| count <= 1));
        }
    }
}
