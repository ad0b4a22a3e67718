//! Section `train`: how long and in which portions.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// The type that matrix products run in; weights and optimizer state are fp32 always, gradients unless
/// `ddp.gradient_kind` says otherwise.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Precision {
    /// 32-bit floats.
    Fp32,
    /// bfloat16 under autocast.
    Bf16,
}

/// How long and in which portions.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct Train {
    /// Optimizer steps.
    pub(crate) steps: u64,
    /// Samples a step over all ranks.
    pub(crate) global_batch: Option<usize>,
    /// Samples that one rank computes at once.
    pub(crate) micro_batch: Option<usize>,
    /// Micro-batches a step on each rank.
    pub(crate) accumulate: Option<usize>,
    /// `fp32` or `bf16`.
    pub(crate) precision: Precision,
    /// Keep one input a layer for backward and compute the layer again there: less memory for a second forward, same bits.
    pub(crate) recompute: bool,
    /// Of weights, order, masks and dropout.
    pub(crate) seed: u64,
    /// Threads a rank computes with; by default cores ÷ ranks of this machine.
    pub(crate) threads: Option<usize>,
    /// Where weights, plot and metrics go.
    pub(crate) output: Option<PathBuf>,
}

impl Default for Train {
    fn default() -> Self {
        Train {
            steps: 100,
            global_batch: None,
            micro_batch: None,
            accumulate: None,
            precision: Precision::Fp32,
            recompute: false,
            seed: 42,
            threads: None,
            output: None,
        }
    }
}
