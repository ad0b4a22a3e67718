//! Which layers each stage has: ranges of them whose longest takes as little time as possible. Pure.
//!
//! A pipeline is as fast as its longest stage. Where layers differ (an embedding before them, a head behind them), equal numbers of layers are not equal
//! times. The exact answer is found by dynamic programming: with L(s, n) the longest stage of the best cut of the first n layers into s stages,
//! L(s, n) = min over k of max(L(s − 1, k), time of layers k to n). It costs stages × layers² steps.

use std::ops::Range;

use super::schedule::Schedule;
use crate::error::{Error, Result};

/// Cuts layers that take `times` (any unit) into `stages` ranges, of one layer at least, whose longest is as short as it can be. Of equally good cuts it is the
/// one whose first stages are the shortest, so that all ranks come to the same.
///
/// # Errors
/// [`Error::StageWithoutLayers`] where there are fewer layers than stages; [`Error::BadSetting`] for a time that is negative or not finite, and for no stages.
///
/// # Example
/// ```
/// use phalanx_model_parallel::pipeline::partition::partition;
///
/// // An embedding, six layers, and a head that takes as long as two and a half.
/// let times = [0.5, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 2.5];
/// assert_eq!(partition(&times, 2)?, [0..5, 5..8]);
/// # Ok::<(), phalanx_model_parallel::Error>(())
/// ```
pub fn partition(times: &[f64], stages: usize) -> Result<Vec<Range<usize>>> {
    check(times, stages)?;
    let layers = times.len();
    // Sums from each layer on are taken anew: differences of running sums would round.
    let time = |range: Range<usize>| times[range].iter().sum::<f64>();
    // By number of layers: the longest stage of the best cut so far; by stage, where its last stage begins.
    let mut best: Vec<f64> = (0..=layers).map(|end| time(0..end)).collect();
    let mut starts = vec![vec![0; layers + 1]];
    for stage in 1..stages {
        let mut next = vec![f64::INFINITY; layers + 1];
        let mut start_of = vec![0; layers + 1];
        for end in stage + 1..=layers {
            let mut last = 0.0;
            for start in (stage..end).rev() {
                last += times[start];
                let longest = best[start].max(last);
                if longest <= next[end] {
                    (next[end], start_of[end]) = (longest, start);
                }
            }
        }
        best = next;
        starts.push(start_of);
    }
    let mut end = layers;
    let mut ranges: Vec<Range<usize>> = Vec::with_capacity(stages);
    for start_of in starts.iter().rev() {
        let start = start_of[end];
        ranges.push(start..end);
        end = start;
    }
    ranges.reverse();
    Ok(ranges)
}

/// As [`partition`], for a schedule: of each chunk of `rank` its layers, from the chunk nearest to the model's input on.
///
/// # Errors
/// As [`partition`].
///
/// # Example
/// ```
/// use phalanx_model_parallel::pipeline::partition::partition_into_chunks;
/// use phalanx_model_parallel::pipeline::schedule::{Schedule, ScheduleKind};
///
/// let schedule = Schedule::new(ScheduleKind::Interleaved { chunks: 2 }, 2, 4)?;
/// assert_eq!(partition_into_chunks(&[1.0; 8], &schedule, 0)?, [0..2, 4..6]);
/// assert_eq!(partition_into_chunks(&[1.0; 8], &schedule, 1)?, [2..4, 6..8]);
/// # Ok::<(), phalanx_model_parallel::Error>(())
/// ```
pub fn partition_into_chunks(
    times: &[f64],
    schedule: &Schedule,
    rank: usize,
) -> Result<Vec<Range<usize>>> {
    let ranges = partition(times, schedule.stage_count())?;
    let chunks = 0..schedule.chunk_count();
    Ok(chunks.map(|chunk| ranges[schedule.stage(rank, chunk)].clone()).collect())
}

fn check(times: &[f64], stages: usize) -> Result<()> {
    let bad =
        |setting, value: String, expected| Err(Error::BadSetting { setting, value, expected });
    if stages == 0 {
        return bad("stages", stages.to_string(), "1 or more");
    }
    if let Some(time) = times.iter().find(|time| !time.is_finite() || **time < 0.0) {
        return bad("time of a layer", time.to_string(), "a number ≥ 0");
    }
    match times.len() < stages {
        true => Err(Error::StageWithoutLayers { stages, layers: times.len() }),
        false => Ok(()),
    }
}
