//! Reads `tests/fixtures/parity.json`, and compares what came out of a run with one of its rows.

use std::collections::BTreeMap;
use std::path::Path;

use serde::Deserialize;

/// Greatest difference, relative to PyTorch's number. Processors round differently, so the arithmetic alone moves numbers: a
/// gradient by a few last bits of terms near 1, which an optimizer with eps of 2^-5 turns into less than a thousandth of this.
const TOLERANCE: f64 = 1e-5;

/// Running statistics are means of values near 1, each some eight roundings (2^-24) from exact, whatever they come to: at most
/// 8 × 2^-24 off, which is `TOLERANCE` of a number of this size.
const SIZE: f64 = 0.05;

/// The whole file.
#[derive(Debug, Deserialize)]
pub(crate) struct Fixtures {
    pub(crate) schedules: Schedules,
    cases: Vec<Row>,
}

/// One case on one number of ranks.
#[derive(Debug, Deserialize)]
pub(crate) struct Row {
    name: String,
    pub(crate) world_size: usize,
    losses: Vec<f64>,
    weights: BTreeMap<String, String>,
    /// By rank.
    #[serde(default)]
    buffers: Vec<BTreeMap<String, String>>,
    #[serde(default)]
    gradient_norms: Vec<f64>,
    #[serde(default)]
    scales: Vec<f64>,
    #[serde(default)]
    skipped: Vec<bool>,
    #[serde(default)]
    rates: Vec<f64>,
}

/// Learning rates of PyTorch's schedulers, step by step, and what they were made with.
#[derive(Debug, Deserialize)]
pub(crate) struct Schedules {
    pub(crate) peak: f64,
    pub(crate) warmup_steps: u64,
    pub(crate) total_steps: u64,
    pub(crate) power: f64,
    pub(crate) decay_steps: u64,
    pub(crate) rows: Vec<Schedule>,
}

/// One scheduler's.
#[derive(Debug, Deserialize)]
pub(crate) struct Schedule {
    pub(crate) name: String,
    pub(crate) floor: f64,
    pub(crate) rates: Vec<f64>,
}

/// What one rank's run came to.
#[derive(Clone, Debug, Default)]
pub(crate) struct Outcome {
    /// Of this rank's own batches.
    pub(crate) losses: Vec<f64>,
    pub(crate) gradient_norms: Vec<f64>,
    pub(crate) scales: Vec<f64>,
    pub(crate) skipped: Vec<bool>,
    pub(crate) rates: Vec<f64>,
    pub(crate) tensors: BTreeMap<String, Vec<f32>>,
}

impl Fixtures {
    pub(crate) fn read() -> Self {
        let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/parity.json");
        let text = std::fs::read_to_string(file).expect("the fixtures are part of the repository");
        serde_json::from_str(&text).expect("scripts/parity_fixtures.py wrote it")
    }

    /// The rows of a case: two ranks and three.
    pub(crate) fn rows(&self, name: &str) -> Vec<&Row> {
        let rows: Vec<_> = self.cases.iter().filter(|row| row.name == name).collect();
        assert_eq!(rows.len(), 2, "rows of {name}");
        rows
    }

    pub(crate) fn names(&self) -> Vec<&str> {
        self.cases.iter().map(|row| row.name.as_str()).collect()
    }
}

impl Row {
    /// All of `ranks` against this row; `what` says how they trained.
    pub(crate) fn compare(&self, ranks: &[Outcome], what: &str) {
        let what = format!("{} on {} ranks, {what}", self.name, self.world_size);
        for (rank, outcome) in ranks.iter().enumerate() {
            for (name, digits) in &self.weights {
                let tensor = format!("{what}: rank {rank}: {name}");
                let ours = &outcome.tensors[name];
                assert!(*ours == ranks[0].tensors[name], "{tensor} is not rank 0's");
                close(&tensor, ours.iter().map(|&x| f64::from(x)), &decoded(digits));
            }
            assert_eq!(outcome.skipped, self.skipped, "{what}: rank {rank}: skipped steps");
            close(&format!("{what}: scales"), outcome.scales.iter().copied(), &self.scales);
            close(&format!("{what}: learning rates"), outcome.rates.iter().copied(), &self.rates);
            let norms = outcome.gradient_norms.iter().copied();
            close(&format!("{what}: gradient norms"), norms, &self.gradient_norms);
        }
        let steps = ranks.iter().map(|outcome| outcome.losses.len()).max().unwrap_or(0);
        let losses = (0..steps).map(|step| {
            let there: Vec<f64> =
                ranks.iter().filter_map(|outcome| outcome.losses.get(step).copied()).collect();
            there.iter().sum::<f64>() / there.len() as f64
        });
        close(&format!("{what}: losses"), losses, &self.losses);
    }

    /// The buffers of `ranks` against those that PyTorch left on rank `of(rank)`.
    pub(crate) fn compare_buffers(&self, ranks: &[Outcome], of: impl Fn(usize) -> usize) {
        assert!(!self.buffers.is_empty(), "{} has no buffers", self.name);
        for (rank, outcome) in ranks.iter().enumerate() {
            for (name, digits) in &self.buffers[of(rank)] {
                let what =
                    format!("{} on {} ranks: rank {rank}: {name}", self.name, self.world_size);
                let ours = outcome.tensors[name].iter().map(|&x| f64::from(x));
                close_at(&what, ours, &decoded(digits), SIZE);
            }
        }
    }
}

/// f32 values of eight hexadecimal digits each.
fn decoded(digits: &str) -> Vec<f64> {
    let words = digits.as_bytes().chunks(8);
    words
        .map(|word| {
            let word = std::str::from_utf8(word).expect("digits");
            f64::from(f32::from_bits(u32::from_str_radix(word, 16).expect("hexadecimal digits")))
        })
        .collect()
}

fn close(what: &str, ours: impl ExactSizeIterator<Item = f64>, theirs: &[f64]) {
    close_at(what, ours, theirs, 0.0);
}

/// Of numbers that were as large as `size` on the way.
fn close_at(what: &str, ours: impl ExactSizeIterator<Item = f64>, theirs: &[f64], size: f64) {
    assert_eq!(ours.len(), theirs.len(), "{what}: how many");
    for (at, (left, right)) in ours.zip(theirs).enumerate() {
        let (off, most) = ((left - right).abs(), TOLERANCE * right.abs().max(size));
        assert!(off <= most, "{what}: {at}: {left}, and PyTorch's {right}");
    }
}
