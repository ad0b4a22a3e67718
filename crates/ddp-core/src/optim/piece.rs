//! What a rank updates: for each bucket its segment (ZeRO) or all of it, cut into pieces of parameters, and
//! neighbouring pieces with the same weight decay joined into runs. Pure.
//!
//! Pieces end at the padding before the next parameter, so that every run is a multiple of the alignment:
//! no kernel's scalar tail ever computes different elements in one ZeRO stage than in the other. Padding
//! holds zeros and stays zero under AdamW and LAMB.

use std::ops::Range;

use crate::plan::{Plan, PARAMETER_ALIGNMENT_LEN};

/// Neighbouring elements with one weight decay.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Run {
    /// Elements of the flat storage.
    pub(super) range: Range<usize>,
    /// The same elements in the optimizer's state.
    pub(super) state: Range<usize>,
    pub(super) decays: bool,
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

/// A rank's parts of all buckets, and the elements of state that each storage needs.
pub(super) fn owned(
    plan: &Plan,
    rank: usize,
    world_size: usize,
    decays: &[bool],
) -> (Vec<Owned>, Vec<usize>) {
    let mut state_lens = vec![0; plan.storage_lens.len()];
    let mut parts = Vec::with_capacity(plan.buckets.len());
    for bucket in &plan.buckets {
        let segment = bucket.segment(rank, world_size);
        let state_len = &mut state_lens[bucket.storage];
        let mut pieces = Vec::new();
        for &parameter in &bucket.parameters {
            let place = &plan.places[parameter].range;
            let end = place.end.next_multiple_of(PARAMETER_ALIGNMENT_LEN).min(segment.end);
            let start = place.start.max(segment.start);
            if start >= end {
                continue;
            }
            let state_start = *state_len + (start - segment.start);
            let state = state_start..state_start + (end - start);
            let run = Run { range: start..end, state, decays: decays[parameter] };
            pieces.push(Piece { parameter, run });
        }
        *state_len += segment.len();
        parts.push(Owned { storage: bucket.storage, runs: joined(&pieces), pieces });
    }
    (parts, state_lens)
}

fn joined(pieces: &[Piece]) -> Vec<Run> {
    let mut runs: Vec<Run> = Vec::new();
    for piece in pieces {
        match runs.last_mut() {
            Some(last)
                if last.decays == piece.run.decays && last.range.end == piece.run.range.start =>
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
    use crate::plan::{Caps, Extent};

    #[test]
    fn the_ranks_parts_together_are_every_parameter_once() {
        let lens = [5000, 64, 1, 9000, 0, 2048, 77];
        let decays = [true, false, false, true, true, true, false];
        let extents: Vec<Extent> =
            lens.iter().map(|&len| Extent { len, element_bytes: 4, storage: 0 }).collect();
        for world_size in [1, 2, 3, 4, 7] {
            let caps = Caps { bucket_bytes: &[100, 30000], world_size };
            let plan = Plan::new(&extents, &[6, 5, 4, 3, 2, 1, 0], caps);
            let mut covered = vec![0; plan.storage_lens[0]];
            for rank in 0..world_size {
                let (parts, state_lens) = owned(&plan, rank, world_size, &decays);
                let mut state = vec![0; state_lens[0]];
                for run in parts.iter().flat_map(|part| &part.runs) {
                    assert_eq!(run.range.len(), run.state.len());
                    assert_eq!(run.range.start % PARAMETER_ALIGNMENT_LEN, 0);
                    assert_eq!(run.range.len() % PARAMETER_ALIGNMENT_LEN, 0);
                    run.range.clone().for_each(|at| covered[at] += 1);
                    run.state.clone().for_each(|at| state[at] += 1);
                }
                assert!(state.iter().all(|&count| count <= 1), "state is not shared");
                for piece in parts.iter().flat_map(|part| &part.pieces) {
                    assert_eq!(piece.run.decays, decays[piece.parameter]);
                }
            }
            for place in &plan.places {
                assert!(place.range.clone().all(|at| covered[at] == 1), "{world_size} ranks");
            }
            assert!(covered.iter().all(|&count| count <= 1));
        }
    }
}
