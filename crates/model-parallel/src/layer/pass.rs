//! Where the batch of a forward is in its step.

use std::ops::Range;

use tch::{Device, Kind, Tensor};

use crate::error::{Error, Result};

/// What a layer must know of a forward besides its input: where its sequences and tokens are among all of the step, whoever computes them.
///
/// Dropout and positions depend on it, so that they are those of one process on every mesh.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Pass {
    /// Whether the model trains: whether dropout drops.
    pub train: bool,
    /// Number of the optimizer's step.
    pub step: u64,
    /// Number of the first sequence of this batch among all sequences of the step, over all data-parallel ranks and micro-batches.
    pub first_sample: u64,
    /// Which tokens of its sequences this rank has; not all where they are cut over the context-parallel axis. What
    /// sequence parallelism cuts is not counted here.
    pub tokens: Tokens,
}

impl Pass {
    /// A forward without dropout, of whole sequences.
    #[must_use]
    pub fn evaluation() -> Self {
        Self::default()
    }

    /// A forward of a training step.
    #[must_use]
    pub fn training(step: u64, first_sample: u64) -> Self {
        Self { train: true, step, first_sample, tokens: Tokens::default() }
    }
}

/// Runs of consecutive tokens that a rank can have of a sequence.
const RUNS_MAX: usize = 4;

/// Which tokens of a sequence a rank has: a few runs of consecutive ones, which it has one behind the other. The default is the whole sequence.
///
/// # Example
/// ```
/// use phalanx_model_parallel::layer::Tokens;
///
/// // Of eight tokens the first two and the last two.
/// let tokens = Tokens::of(&[0..2, 6..8])?;
/// assert_eq!(tokens.part(1, 2)?, [1..2, 6..7]);
/// assert_eq!(Tokens::from(5).part(1, 2)?, [6..8]);
/// # Ok::<(), phalanx_model_parallel::Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tokens {
    /// Index of each run's first token, and how many it has; runs behind the last have none.
    runs: [(i64, i64); RUNS_MAX],
}

impl Default for Tokens {
    fn default() -> Self {
        Self::from(0)
    }
}

impl From<i64> for Tokens {
    /// All from this one on.
    fn from(first: i64) -> Self {
        let mut runs = [(0, 0); RUNS_MAX];
        runs[0] = (first, i64::MAX);
        Self { runs }
    }
}

impl Tokens {
    /// Those of the runs, in this order. Neighbours that follow each other are one run.
    ///
    /// # Errors
    /// [`Error::BadSetting`] for more than four runs, or one that begins below 0.
    pub fn of(runs: &[Range<i64>]) -> Result<Self> {
        let mut joined: Vec<(i64, i64)> = Vec::new();
        for run in runs.iter().filter(|run| !run.is_empty()) {
            let len = run.end - run.start;
            match joined.last_mut() {
                Some((first, before)) if *first + *before == run.start => *before += len,
                _ => joined.push((run.start, len)),
            }
        }
        if joined.len() > RUNS_MAX || joined.iter().any(|(first, _)| *first < 0) {
            return Err(Error::BadSetting {
                setting: "tokens of a pass",
                value: format!("{runs:?}"),
                expected: "at most 4 runs of consecutive tokens, from 0 on",
            });
        }
        joined.resize(RUNS_MAX, (0, 0));
        Ok(Self { runs: joined.try_into().unwrap_or([(0, 0); RUNS_MAX]) })
    }

    /// Where in the sequence the rank's tokens from the `start`-th on are, `len` of them.
    ///
    /// # Errors
    /// [`Error::BadInput`] where it has not as many.
    pub fn part(&self, start: i64, len: i64) -> Result<Vec<Range<i64>>> {
        let (mut skipped, mut left) = (start, len);
        let mut parts = Vec::new();
        for &(first, count) in &self.runs {
            let skips = skipped.min(count);
            let takes = left.min(count - skips);
            if takes > 0 {
                parts.push(first + skips..first + skips + takes);
            }
            skipped -= skips;
            left -= takes;
        }
        if left == 0 {
            return Ok(parts);
        }
        let count: i64 = self.runs.iter().map(|(_, count)| *count).sum();
        Err(Error::BadInput {
            layer: "tokens of a pass".to_owned(),
            actual: format!("{} tokens", start + len),
            expected: format!("at most the {count} that Pass::tokens has"),
        })
    }
}

/// All numbers of the ranges, one behind the other, as a tensor.
pub(crate) fn numbers(
    ranges: &[Range<i64>],
    at: (Kind, Device),
) -> phalanx_ddp_core::Result<Tensor> {
    let all: Vec<Tensor> = ranges
        .iter()
        .map(|range| Tensor::f_arange_start(range.start, range.end, at))
        .collect::<std::result::Result<_, _>>()?;
    Ok(match all.as_slice() {
        [] => Tensor::f_zeros([0], at)?,
        [one] => one.shallow_clone(),
        _ => Tensor::f_cat(&all, 0)?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every part of every list of up to four runs of up to three tokens is what the list written out has there.
    #[test]
    fn parts_are_those_of_the_tokens_written_out() {
        let run = |number: i64, len: i64| 10 * number..10 * number + len;
        for code in 0..256_i64 {
            let lens = [0, 1, 2, 3].map(|at| (code >> (2 * at)) & 3);
            let runs: Vec<_> = (0..4).zip(lens).map(|(number, len)| run(3 - number, len)).collect();
            let tokens = Tokens::of(&runs).expect("four runs");
            let written: Vec<i64> = runs.iter().cloned().flatten().collect();
            let count = written.len();
            for start in 0..=count {
                for end in start..=count {
                    let [first, len] = [start, end - start].map(|n| i64::try_from(n).expect("few"));
                    let part = tokens.part(first, len).expect("as many");
                    let found: Vec<i64> = part.into_iter().flatten().collect();
                    assert_eq!(found, written[start..end], "{runs:?}");
                }
            }
            let all = i64::try_from(count).expect("few");
            assert!(tokens.part(0, all + 1).is_err() && tokens.part(all, 1).is_err());
        }
    }

    #[test]
    fn neighbours_are_one_run_and_five_runs_are_an_error() {
        let joined = Tokens::of(&[0..2, 2..3, 5..5, 7..9]).expect("two runs");
        assert_eq!(joined, Tokens::of(&[0..3, 7..9]).expect("two runs"));
        let apart: Vec<Range<i64>> = (0..5).map(|at| 3 * at..3 * at + 2).collect();
        assert!(Tokens::of(&apart).is_err());
        assert!(Tokens::of(std::slice::from_ref(&(-1..2))).is_err());
        let endless = Tokens::default().part(7, 2).expect("no end");
        assert_eq!(endless.into_iter().flatten().collect::<Vec<_>>(), [7, 8]);
    }
}
