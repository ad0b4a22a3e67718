//! What a rank updates: for each bucket its segment (ZeRO) or all of it, cut into pieces of parameters, and
//! neighbouring pieces that are treated alike joined into runs. Pure.
//!
//! Pieces end at the padding before the next parameter, so that every run is a multiple of the alignment:
//! no kernel's scalar tail ever computes different elements in one ZeRO stage than in the other. Padding
//! holds zeros and stays zero under every rule.

use std::ops::Range;

use crate::store::plan::{Bucket, Plan, PARAMETER_ALIGNMENT_LEN};

/// How a parameter is treated in a step: with which group's settings, as which of its own steps, and whether the rule
/// takes it whole.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Treatment {
    pub(super) group: usize,
    pub(super) step: u64,
    pub(super) is_whole: bool,
}

/// Neighbouring elements that are treated alike.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Run {
    /// Elements of the flat storage.
    pub(super) range: Range<usize>,
    /// The same elements in the optimizer's state of parameters that are taken whole, or of the others.
    pub(super) state: Range<usize>,
    /// The same elements in the rank's segment of the bucket.
    pub(super) segment: Range<usize>,
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

/// Elements of state that each storage needs for `everything` that a rank owns: of parameters that are taken by the
/// element, and of those that are taken whole.
pub(super) fn state_lens(everything: &[Owned], storage_count: usize) -> Vec<[usize; 2]> {
    let mut lens = vec![[0; 2]; storage_count];
    for owned in everything {
        for run in &owned.runs {
            let len: &mut usize = &mut lens[owned.storage][usize::from(run.treatment.is_whole)];
            *len = run.state.end.max(*len);
        }
    }
    lens
}

/// A rank's parts of all buckets; `treatments` says of each parameter how it is treated, if it `is_updated`.
pub(super) fn owned(
    plan: &Plan,
    segment: impl Fn(&Bucket) -> Range<usize>,
    treatments: &[Treatment],
    is_updated: &[bool],
) -> Vec<Owned> {
    let mut state_ends = vec![[0; 2]; plan.storage_lens.len()];
    let mut parts = Vec::with_capacity(plan.buckets.len());
    for bucket in &plan.buckets {
        let segment = segment(bucket);
        let mut pieces = Vec::new();
        for &parameter in &bucket.parameters {
            let place = &plan.places[parameter].range;
            let end = place.end.next_multiple_of(PARAMETER_ALIGNMENT_LEN).min(segment.end);
            let start = place.start.max(segment.start);
            if start >= end {
                continue;
            }
            let treatment = treatments[parameter];
            let state_end: &mut usize =
                &mut state_ends[bucket.storage][usize::from(treatment.is_whole)];
            let state = *state_end..*state_end + (end - start);
            *state_end = state.end;
            if is_updated[parameter] {
                let of_segment = start - segment.start..end - segment.start;
                let run = Run { range: start..end, state, segment: of_segment, treatment };
                pieces.push(Piece { parameter, run });
            }
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
                last.segment.end = piece.run.segment.end;
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
        let groups = [0, 1, 1, 0, 0, 2, 1];
        let treatments = groups.map(|group| Treatment { group, step: 3, is_whole: group == 0 });
        let is_updated = groups.map(|group| group < 2);
        let extents: Vec<Extent> =
            lens.iter().map(|&len| Extent { len, element_bytes: 4, kind: 0, unit: None }).collect();
        for world_size in [1, 2, 3, 4, 7] {
            let caps = Caps { bucket_bytes: &[100, 30000], world_size };
            let plan = Plan::new(&extents, &[6, 5, 4, 3, 2, 1, 0], caps);
            let mut covered: Vec<Vec<u32>> =
                plan.storage_lens.iter().map(|&len| vec![0; len]).collect();
            for rank in 0..world_size {
                let segment = |bucket: &Bucket| bucket.segment(rank, world_size);
                let everything = owned(&plan, segment, &treatments, &[true; 7]);
                let of_state = state_lens(&everything, plan.storage_lens.len());
                for part in &owned(&plan, segment, &treatments, &is_updated) {
                    let mut state = of_state[part.storage].map(|len| vec![0; len]);
                    let bucket = segment(&plan.buckets[part.storage]);
                    for run in &part.runs {
                        assert_eq!(run.range.len(), run.state.len());
                        assert_eq!(run.range.start, bucket.start + run.segment.start);
                        assert_eq!(run.range.end, bucket.start + run.segment.end);
                        assert_eq!(run.range.start % PARAMETER_ALIGNMENT_LEN, 0);
                        assert_eq!(run.range.len() % PARAMETER_ALIGNMENT_LEN, 0);
                        run.range.clone().for_each(|at| covered[part.storage][at] += 1);
                        let state = &mut state[usize::from(run.treatment.is_whole)];
                        run.state.clone().for_each(|at| state[at] += 1);
                    }
                    assert!(state.iter().flatten().all(|&count| count <= 1), "state is not shared");
                    for piece in &part.pieces {
                        assert_eq!(piece.run.treatment, treatments[piece.parameter]);
                    }
                }
                let all = everything.iter().flat_map(|part| &part.pieces);
                let len: usize = all.map(|piece| piece.run.state.len()).sum();
                assert_eq!(
                    of_state.iter().flatten().sum::<usize>(),
                    len,
                    "state is for what is owned"
                );
            }
            for (parameter, place) in plan.places.iter().enumerate() {
                let times = u32::from(is_updated[parameter]);
                let mut all = place.range.clone();
                assert!(all.all(|at| covered[place.storage][at] == times), "{world_size} ranks");
            }
            assert!(covered.iter().flatten().all(|&count| count <= 1));
        }
    }
}
