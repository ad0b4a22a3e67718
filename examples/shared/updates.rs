//! What the section `optimizer` amounts to: the rule, the learning rates, and what to say where gradients are not finite.

use anyhow::Result;
use phalanx_ddp_core::optim::{
    self, Adafactor, Adam, AdamW, AdjustLr, Lamb, Lars, Lion, Muon, Sgd,
};
use phalanx_ddp_core::schedule::{Schedule, Shape};
use phalanx_ddp_core::Error;

use super::config::{self, Rule};

/// What to do about gradients that are not finite, in the words of this program.
pub(crate) fn advised(error: Error, step: u64) -> anyhow::Error {
    let is_non_finite = matches!(error, Error::NonFinite { .. });
    let error = anyhow::Error::from(error);
    match is_non_finite {
        true => error.context(format!(
            "step {step}: gradients are not finite; lower --lr, raise --warmup-steps, or take --non-finite skip_step"
        )),
        false => error,
    }
}

/// The update rule, with its numbers.
pub(crate) fn rule(optimizer: &config::Optimizer) -> Box<dyn optim::Rule> {
    let config::Optimizer { rule, lr, beta1, beta2, eps, weight_decay, .. } = *optimizer;
    let config::Optimizer { trust_coefficient, .. } = *optimizer;
    let (momentum, nesterov) = (optimizer.momentum(), optimizer.nesterov());
    match rule {
        Rule::Adamw => Box::new(AdamW { lr, beta1, beta2, eps, weight_decay }),
        Rule::Adam => Box::new(Adam { lr, beta1, beta2, eps, weight_decay }),
        Rule::Sgd => Box::new(Sgd { lr, momentum, dampening: 0.0, nesterov, weight_decay }),
        Rule::Lamb => Box::new(Lamb { lr, beta1, beta2, eps, weight_decay }),
        Rule::Lars => {
            let own = Lars { lr, momentum, nesterov, trust_coefficient, ..Lars::default() };
            Box::new(Lars { weight_decay, ..own })
        }
        Rule::Lion => Box::new(Lion { lr, beta1, beta2, weight_decay }),
        Rule::Muon => {
            let of_others = optimizer.adamw_lr.unwrap_or(lr);
            let adamw = AdamW { lr: of_others, beta1, beta2, eps, weight_decay };
            let adjust_lr = match optimizer.adjust_lr {
                config::AdjustLr::Original => AdjustLr::Original,
                config::AdjustLr::MatchRmsAdamw => AdjustLr::MatchRmsAdamW,
            };
            let own = Muon { lr, weight_decay, momentum, nesterov, ..Muon::default() };
            Box::new(Muon { adjust_lr, adamw, ..own })
        }
        Rule::Adafactor => Box::new(Adafactor { lr, weight_decay, ..Adafactor::default() }),
    }
}

/// The learning rate of every step.
pub(crate) fn schedule(optimizer: &config::Optimizer, steps: u64) -> Result<Schedule> {
    let config::Optimizer { lr, warmup_steps, min_lr, power, decay_steps, .. } = *optimizer;
    let (shape, floor) = match optimizer.schedule {
        config::Schedule::Constant => (Shape::Constant, 0.0),
        config::Schedule::Linear => (Shape::Linear, min_lr),
        config::Schedule::Cosine => (Shape::Cosine, min_lr),
        config::Schedule::Polynomial => (Shape::Polynomial { power }, min_lr),
        config::Schedule::WarmupStableDecay => (Shape::WarmupStableDecay { decay_steps }, min_lr),
    };
    // A run that is shorter than its warm-up ends in it.
    let bare = Schedule::new(shape, lr, steps.max(warmup_steps))?;
    Ok(bare.with_warmup(warmup_steps)?.with_floor(floor)?)
}

/// Counts of tokens stay far below 2^53.
pub(crate) fn count(value: impl TryInto<u32>) -> f64 {
    value.try_into().map_or(f64::NAN, f64::from)
}

/// The sum as a count again.
#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "a sum of counts: whole, not negative, far below 2^53"
)]
pub(crate) fn tokens(sum: f64) -> u64 {
    sum as u64
}
