//! What no single field of a trainer's configuration shows: values out of range, and fields that cannot stand together. The sections that
//! trainers have in common; `model` and `data` the including module checks itself.
//!
//! Each message names the field by its path in the file, its value, and what to do.

use super::{Config, ConfigError, Ddp, Optimizer, Rule, Schedule};

impl Config {
    /// Checks what no single field shows; `origin` is where the values come from.
    pub(crate) fn validate(&self, origin: &str) -> Result<(), ConfigError> {
        let problem = self
            .model
            .problem()
            .or_else(|| self.data.problem(&self.model))
            .or_else(|| self.optimizer.problem(self.train.steps))
            .or_else(|| self.problem())
            .or_else(|| self.own_problem())
            .or_else(|| self.nccl.check_values().err().map(|error| error.to_string()));
        match problem {
            Some(message) => Err(ConfigError::Invalid { origin: origin.into(), message }),
            None => Ok(()),
        }
    }

    fn problem(&self) -> Option<String> {
        let train = &self.train;
        for (name, value) in [
            ("global_batch", train.global_batch),
            ("micro_batch", train.micro_batch),
            ("accumulate", train.accumulate),
            ("threads", train.threads),
        ] {
            if value == Some(0) {
                return Some(format!("train.{name} is 0; it must be at least 1"));
            }
        }
        if train.steps == 0 {
            return Some("train.steps is 0; it must be at least 1".into());
        }
        if let Some(problem) = self.ddp.problem().or_else(|| self.checkpoint.problem()) {
            return Some(problem);
        }
        let times = [("ddp", self.ddp.timeout_s), ("data", self.data.timeout_s)];
        let (section, _) = times.into_iter().find(|(_, seconds)| *seconds == 0)?;
        Some(format!("{section}.timeout_s is 0; it must be at least 1"))
    }
}

impl Ddp {
    fn problem(&self) -> Option<String> {
        if self.zero > 3 {
            return Some(format!(
                "ddp.zero is {}; stages are 0 (nothing is sharded), 1 (optimizer state), 2 (gradients, too) and 3 \
                 (parameters, too)",
                self.zero
            ));
        }
        if self.find_unused_parameters && self.static_graph {
            return Some(
                "ddp.find_unused_parameters and ddp.static_graph are both true; turn the first off: the second \
                 finds unused parameters in the first backward"
                    .into(),
            );
        }
        if !(0.5..=86_400.0).contains(&self.dead_after_s) {
            return Some(format!(
                "ddp.dead_after_s is {}; it must be at least 0.5 (5 is usual) and at most 86400",
                self.dead_after_s
            ));
        }
        let caps = [("bucket_mib", self.bucket_mib), ("first_bucket_mib", self.first_bucket_mib)];
        let (name, value) =
            caps.into_iter().find(|(_, value)| !(*value > 0.0 && *value <= 65_536.0))?;
        Some(format!("ddp.{name} is {value}; it must be above 0 and at most 65536"))
    }
}

impl Optimizer {
    fn problem(&self, steps: u64) -> Option<String> {
        let Self { lr, weight_decay, max_grad_norm, .. } = *self;
        if !(lr > 0.0 && lr.is_finite()) {
            return Some(format!("optimizer.lr is {lr}; it must be above 0"));
        }
        let rest = [("weight_decay", weight_decay), ("max_grad_norm", max_grad_norm)];
        rest.into_iter()
            .find(|(_, v)| !(*v >= 0.0 && v.is_finite()))
            .map(|(name, value)| format!("optimizer.{name} is {value}; it must not be negative"))
            .or_else(|| self.problem_of_rule())
            .or_else(|| self.problem_of_schedule(steps))
    }

    /// What the rule heeds, and no other.
    fn problem_of_rule(&self) -> Option<String> {
        let (momentum, nesterov) = (self.momentum(), self.nesterov());
        let of_momentum = || {
            if !(momentum >= 0.0 && momentum.is_finite()) {
                return Some(format!("optimizer.momentum is {momentum}; it must not be negative"));
            }
            if momentum >= 1.0 && self.rule != Rule::Sgd {
                return Some(format!("optimizer.momentum is {momentum}; it must be below 1"));
            }
            (nesterov && momentum <= 0.0).then(|| {
                "optimizer.nesterov is true and optimizer.momentum is 0; give a momentum (0.9), or turn \
                 nesterov off"
                    .into()
            })
        };
        let positive = |name: &str, value: f64| {
            let is_right = value > 0.0 && value.is_finite();
            (!is_right).then(|| format!("optimizer.{name} is {value}; it must be above 0"))
        };
        let of_betas = || {
            let betas = [("beta1", self.beta1), ("beta2", self.beta2)];
            let (name, value) = betas.into_iter().find(|(_, v)| !(0.0..1.0).contains(v))?;
            Some(format!("optimizer.{name} is {value}; it must be at least 0 and below 1"))
        };
        match self.rule {
            Rule::Adamw | Rule::Adam | Rule::Lamb => positive("eps", self.eps).or_else(of_betas),
            Rule::Sgd => of_momentum(),
            Rule::Lars => {
                of_momentum().or_else(|| positive("trust_coefficient", self.trust_coefficient))
            }
            Rule::Lion => of_betas(),
            Rule::Muon => of_momentum()
                .or_else(|| positive("adamw_lr", self.adamw_lr.unwrap_or(self.lr)))
                .or_else(|| positive("eps", self.eps))
                .or_else(of_betas),
            Rule::Adafactor => None,
        }
    }

    /// What the schedule heeds, and no other.
    fn problem_of_schedule(&self, steps: u64) -> Option<String> {
        let Self { schedule, lr, min_lr, power, warmup_steps, decay_steps, .. } = self;
        if *schedule != Schedule::Constant && !(0.0..=*lr).contains(min_lr) {
            return Some(format!(
                "optimizer.min_lr is {min_lr}; it must be from 0 to optimizer.lr ({lr})"
            ));
        }
        if *schedule == Schedule::Polynomial && !(*power >= 0.0 && power.is_finite()) {
            return Some(format!("optimizer.power is {power}; it must not be negative"));
        }
        if *schedule != Schedule::WarmupStableDecay {
            return None;
        }
        if *decay_steps == 0 {
            return Some(
                "optimizer.decay_steps is 0; the schedule warmup_stable_decay needs at least 1"
                    .into(),
            );
        }
        (warmup_steps.saturating_add(*decay_steps) > steps).then(|| {
            format!(
                "optimizer.warmup_steps ({warmup_steps}) and optimizer.decay_steps ({decay_steps}) are more than \
                 train.steps ({steps}); lower one of the first or raise the last"
            )
        })
    }
}
