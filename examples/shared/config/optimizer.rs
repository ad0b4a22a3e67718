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
    /// Momentum scaled by layer-wise norms, for large batches.
    Lars,
    /// The sign of a momentum.
    Lion,
    /// Momentum made orthogonal, of the hidden layers' matrices; AdamW for all else.
    Muon,
    /// Second moments by row and by column.
    Adafactor,
}

/// How Muon's step follows from a matrix's shape.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum AdjustLr {
    /// The square root of rows by columns, where there are more rows.
    Original,
    /// Elements move as AdamW's do, so that its learning rates serve.
    MatchRmsAdamw,
}

/// How weights are updated.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct Optimizer {
    /// `adamw`, `adam`, `sgd`, `lamb`, `lars`, `lion`, `muon` or `adafactor`.
    pub(crate) rule: Rule,
    /// Learning rate at its peak.
    pub(crate) lr: f64,
    /// Decay of the first moment; not of `sgd`, `lars` and `adafactor`, like the next.
    pub(crate) beta1: f64,
    /// Decay of the second moment; of `lion` that of its momentum.
    pub(crate) beta2: f64,
    /// Added to the root of the second moment; not of `lion` either.
    pub(crate) eps: f64,
    /// Decay of the momentum of `sgd`, `lars` and `muon`; 0 keeps none. `null`: 0 of `sgd`, 0.9 of `lars`, 0.95 of
    /// `muon`.
    pub(crate) momentum: Option<f64>,
    /// Whether they look ahead along their momentum. `null`: `muon` does.
    pub(crate) nesterov: Option<bool>,
    /// By which part of its norm `lars` may move a parameter.
    pub(crate) trust_coefficient: f64,
    /// How the step of `muon` follows from a matrix's shape.
    pub(crate) adjust_lr: AdjustLr,
    /// Learning rate of what `muon` leaves to AdamW, at its peak. `null`: `lr`.
    pub(crate) adamw_lr: Option<f64>,
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
            momentum: None,
            nesterov: None,
            trust_coefficient: 1e-3,
            adjust_lr: AdjustLr::MatchRmsAdamw,
            adamw_lr: None,
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

impl Optimizer {
    /// Decay of the momentum of the rule in force.
    pub(crate) fn momentum(&self) -> f64 {
        self.momentum.unwrap_or(match self.rule {
            Rule::Lars => 0.9,
            Rule::Muon => 0.95,
            _ => 0.0,
        })
    }

    /// Whether the rule in force looks ahead.
    pub(crate) fn nesterov(&self) -> bool {
        self.nesterov.unwrap_or(self.rule == Rule::Muon)
    }

    /// How many values of a state there are for a model of so many parameters, so many of them embeddings.
    pub(crate) fn state_count(&self, parameters: u64, embeddings: u64) -> u64 {
        match self.rule {
            Rule::Adamw | Rule::Adam | Rule::Lamb => 2 * parameters,
            Rule::Sgd | Rule::Lars if self.momentum() > 0.0 => parameters,
            Rule::Lion => parameters,
            // AdamW's of embeddings; the few biases aside.
            Rule::Muon => parameters + embeddings,
            // Rows and columns are few.
            Rule::Sgd | Rule::Lars | Rule::Adafactor => 0,
        }
    }
}
