//! Section `optimizer`: rules, their numbers, and the learning rate's way. What the rule or the schedule in force does
//! not heed is not checked either, so that a flag can choose another one than the file.

use serde::{Deserialize, Serialize};

/// Which rule updates the weights.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Rule {
    /// Adam with decoupled weight decay.
    Adamw,
    /// Adam with weight decay as a term of the loss.
    Adam,
    /// Gradient descent, with momentum.
    Sgd,
    /// Layer-wise adaptive rates, for large batches.
    Lamb,
}

/// How weights are updated.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct Optimizer {
    /// `adamw`, `adam`, `sgd` or `lamb`.
    pub(crate) rule: Rule,
    /// Learning rate at its peak.
    pub(crate) lr: f64,
    /// Decay of the first moment; not of `sgd`, like the next two.
    pub(crate) beta1: f64,
    /// Decay of the second moment.
    pub(crate) beta2: f64,
    /// Added to the root of the second moment.
    pub(crate) eps: f64,
    /// Decay of the momentum of `sgd`; 0 keeps none.
    pub(crate) momentum: f64,
    /// Whether `sgd` looks ahead along its momentum.
    pub(crate) nesterov: bool,
    /// Decay of weights, biases and layer norms excepted.
    pub(crate) weight_decay: f64,
    /// Global gradient norm that is clipped to; 0 turns clipping off.
    pub(crate) max_grad_norm: f64,
    /// Steps in which the learning rate rises linearly from 0. A run of fewer steps ends before the peak.
    pub(crate) warmup_steps: u64,
    /// What follows the warm-up.
    pub(crate) schedule: Schedule,
    /// Learning rate at the last step, and at least; not of `constant`.
    pub(crate) min_lr: f64,
    /// Of `polynomial`.
    pub(crate) power: f64,
    /// Steps in which `warmup_stable_decay` falls at the end.
    pub(crate) decay_steps: u64,
}

/// The learning rate after the warm-up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Schedule {
    /// Falls linearly to `min_lr` at the last step.
    Linear,
    /// Stays.
    Constant,
    /// Falls by half a cosine to `min_lr` at the last step.
    Cosine,
    /// Falls by the power `power` of the steps that are left.
    Polynomial,
    /// Stays, and falls by half a cosine in the last `decay_steps` steps.
    WarmupStableDecay,
}

impl Default for Optimizer {
    fn default() -> Self {
        Optimizer {
            rule: Rule::Adamw,
            lr: 1e-4,
            beta1: 0.9,
            beta2: 0.999,
            eps: 1e-8,
            momentum: 0.0,
            nesterov: false,
            weight_decay: 0.01,
            max_grad_norm: 1.0,
            warmup_steps: 0,
            schedule: Schedule::Linear,
            min_lr: 0.0,
            power: 1.0,
            decay_steps: 0,
        }
    }
}

impl Rule {
    /// How many values of the size of a parameter are kept for it.
    pub(crate) fn state_count(self, momentum: f64) -> u64 {
        match self {
            Rule::Adamw | Rule::Adam => 2,
            // Both moments, and the direction that is scaled by its norm.
            Rule::Lamb => 3,
            Rule::Sgd => u64::from(momentum > 0.0),
        }
    }
}
