//! What no single field shows: values out of range, and fields that cannot stand together.
//!
//! Each message names the field by its path in the file, its value, and what to do.

use phalanx_data::format::TokenIndex;

use super::{Config, ConfigError, Data, Ddp, Model, Optimizer, Rule, Schedule};

impl Config {
    /// Checks what no single field shows; `origin` is where the values come from.
    pub(crate) fn validate(&self, origin: &str) -> Result<(), ConfigError> {
        let problem = self
            .model
            .problem()
            .or_else(|| self.data.problem(&self.model))
            .or_else(|| self.optimizer.problem(self.train.steps))
            .or_else(|| self.problem())
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
        let caps = [("bucket_mib", self.bucket_mib), ("first_bucket_mib", self.first_bucket_mib)];
        let (name, value) =
            caps.into_iter().find(|(_, value)| !(*value > 0.0 && *value <= 65_536.0))?;
        Some(format!("ddp.{name} is {value}; it must be above 0 and at most 65536"))
    }
}

impl Model {
    fn problem(&self) -> Option<String> {
        const SIZE_MAX: i64 = 1 << 24;
        for (name, value) in [
            ("vocab_size", self.vocab_size),
            ("hidden_size", self.hidden_size),
            ("num_hidden_layers", self.num_hidden_layers),
            ("num_attention_heads", self.num_attention_heads),
            ("intermediate_size", self.intermediate_size),
            ("max_position_embeddings", self.max_position_embeddings),
            ("type_vocab_size", self.type_vocab_size),
        ] {
            if !(1..=SIZE_MAX).contains(&value) {
                return Some(format!("model.{name} is {value}; it must be from 1 to {SIZE_MAX}"));
            }
        }
        if self.hidden_size % self.num_attention_heads != 0 {
            return Some(format!(
                "model.hidden_size ({}) is not a multiple of model.num_attention_heads ({}); \
                 change one of them",
                self.hidden_size, self.num_attention_heads
            ));
        }
        for (name, value) in [
            ("hidden_dropout_prob", self.hidden_dropout_prob),
            ("attention_probs_dropout_prob", self.attention_probs_dropout_prob),
        ] {
            if !(0.0..1.0).contains(&value) {
                return Some(format!("model.{name} is {value}; it must be at least 0 and below 1"));
            }
        }
        for (name, value) in
            [("initializer_range", self.initializer_range), ("layer_norm_eps", self.layer_norm_eps)]
        {
            if !(value > 0.0 && value.is_finite()) {
                return Some(format!("model.{name} is {value}; it must be above 0"));
            }
        }
        for (name, value, only) in [
            ("hidden_act", &self.hidden_act, "gelu"),
            ("model_type", &self.model_type, "bert"),
            ("position_embedding_type", &self.position_embedding_type, "absolute"),
        ] {
            if value != only {
                return Some(format!("model.{name} is \"{value}\"; only \"{only}\" is supported"));
            }
        }
        if !self.tie_word_embeddings {
            return Some(
                "model.tie_word_embeddings is false; only a tied decoder is supported".into(),
            );
        }
        match self.pad_token_id {
            Some(id) if !(0..self.vocab_size).contains(&id) => Some(format!(
                "model.pad_token_id is {id}; it must be below model.vocab_size ({}), or null",
                self.vocab_size
            )),
            _ => None,
        }
    }
}

impl Data {
    fn problem(&self, model: &Model) -> Option<String> {
        // Of a file of fixed batches length and tokens are checked when it is opened.
        let of_text = || self.problem_of_text(model);
        if let Some(problem) = self.batches.is_none().then(of_text).flatten() {
            return Some(problem);
        }
        if !(1..=64).contains(&self.prefetch_threads) {
            return Some(format!(
                "data.prefetch_threads is {}; it must be from 1 to 64",
                self.prefetch_threads
            ));
        }
        None
    }

    /// What only samples that are cut out of text heed.
    fn problem_of_text(&self, model: &Model) -> Option<String> {
        let length = i64::try_from(self.sequence_length).unwrap_or(i64::MAX);
        let vocab = i64::try_from(self.vocab_size).unwrap_or(i64::MAX);
        if !(8..=model.max_position_embeddings).contains(&length) {
            return Some(format!(
                "data.sequence_length is {length}; it must be from 8 to \
                 model.max_position_embeddings ({})",
                model.max_position_embeddings
            ));
        }
        // A folder that is prepared has a vocabulary, which is checked when it is opened.
        if vocab > model.vocab_size && !TokenIndex::is_in(&self.path) {
            return Some(format!(
                "data.vocab_size ({vocab}) is above model.vocab_size ({}); \
                 lower the first or raise the second",
                model.vocab_size
            ));
        }
        if !(self.mask_probability > 0.0 && self.mask_probability < 1.0) {
            return Some(format!(
                "data.mask_probability is {}; it must be above 0 and below 1",
                self.mask_probability
            ));
        }
        None
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
