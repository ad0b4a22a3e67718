//! Cuts of layers into stages, against all cuts.

use std::ops::Range;

use phalanx_model_parallel::layer::random::Key;
use phalanx_model_parallel::pipeline::partition::{partition, partition_into_chunks};
use phalanx_model_parallel::pipeline::schedule::{Schedule, ScheduleKind};
use phalanx_model_parallel::Error;

fn longest(times: &[f64], ranges: &[Range<usize>]) -> f64 {
    ranges.iter().map(|range| times[range.clone()].iter().sum()).fold(0.0, f64::max)
}

/// All cuts of `from..end` into so many ranges of one layer at least.
fn all(from: usize, end: usize, stages: usize) -> Vec<Vec<Range<usize>>> {
    if stages == 1 {
        return vec![vec![from..end]];
    }
    let mut cuts = Vec::new();
    for first in from + 1..=end + 1 - stages {
        for rest in all(first, end, stages - 1) {
            cuts.push(std::iter::once(from..first).chain(rest).collect());
        }
    }
    cuts
}

#[test]
fn the_longest_stage_is_as_short_as_in_any_cut() {
    let key = Key::of_seed(5);
    for layers in 1..=9 {
        for stages in 1..=layers {
            for case in 0..8_u64 {
                // Whole numbers add up without rounding; many are equal, some are nothing.
                let time = |layer| (key.numbered(case).uniform(layer) * 6.0).floor();
                let times: Vec<f64> = (0..layers as u64).map(time).collect();
                let cut = partition(&times, stages).unwrap();
                let best = all(0, layers, stages)
                    .iter()
                    .map(|other| longest(&times, other))
                    .fold(f64::INFINITY, f64::min);
                assert_eq!(longest(&times, &cut).to_bits(), best.to_bits(), "{times:?} {cut:?}");
                assert_eq!(cut.len(), stages);
                assert_eq!((cut[0].start, cut[stages - 1].end), (0, layers));
                assert!(cut.windows(2).all(|pair| pair[0].end == pair[1].start));
                assert!(cut.iter().all(|range| !range.is_empty()), "{times:?} {cut:?}");
            }
        }
    }
}

#[test]
fn chunks_are_the_stages_of_their_rank() {
    let schedule = Schedule::new(ScheduleKind::Interleaved { chunks: 2 }, 3, 3).unwrap();
    let times = [3.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 3.0];
    let all = partition(&times, 6).unwrap();
    for rank in 0..3 {
        let chunks = partition_into_chunks(&times, &schedule, rank).unwrap();
        assert_eq!(chunks, [all[rank].clone(), all[rank + 3].clone()]);
    }
}

#[test]
fn a_stage_without_layers_and_times_that_are_none_are_refused() {
    let error = partition(&[1.0; 3], 4).unwrap_err();
    assert!(matches!(error, Error::StageWithoutLayers { stages: 4, layers: 3 }), "{error}");
    assert!(error.to_string().starts_with("3 layers are too few for 4 stages"), "{error}");
    for times in [[1.0, f64::NAN], [1.0, -1.0], [f64::INFINITY, 1.0]] {
        assert!(matches!(partition(&times, 1), Err(Error::BadSetting { .. })), "{times:?}");
    }
    assert!(matches!(partition(&[1.0], 0), Err(Error::BadSetting { .. })));
}
