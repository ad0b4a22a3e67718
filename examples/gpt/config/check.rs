//! What no single field of `model` and `data` shows: values out of range, and fields that cannot stand together.

use phalanx_data::format::TokenIndex;

use super::{Config, Data, Experts, Family, Model};

impl Config {
    /// Of sections that other trainers do not have.
    pub(super) fn own_problem(&self) -> Option<String> {
        let in_memory = self.checkpoint.memory_every_steps > 0;
        if self.model.experts().is_some() && in_memory {
            return Some(
                "checkpoint.memory_every_steps is set; a model with experts is saved in two parts, to a folder alone: take \
                 checkpoint.every_steps"
                    .into(),
            );
        }
        self.mesh.problem()
    }
}

impl Model {
    pub(super) fn problem(&self) -> Option<String> {
        const SIZE_MAX: i64 = 1 << 24;
        for (name, value) in [
            ("vocab_size", self.vocab_size),
            ("hidden_size", self.hidden_size),
            ("num_hidden_layers", self.num_hidden_layers),
            ("num_attention_heads", self.num_attention_heads),
            ("num_key_value_heads", self.kv_heads()),
            ("intermediate_size", self.inner()),
            ("max_position_embeddings", self.max_position_embeddings),
        ] {
            if !(1..=SIZE_MAX).contains(&value) {
                return Some(format!("model.{name} is {value}; it must be from 1 to {SIZE_MAX}"));
            }
        }
        let (width, heads, kv_heads) =
            (self.hidden_size, self.num_attention_heads, self.kv_heads());
        if self.head_dim.is_none() && width % heads != 0 {
            return Some(format!(
                "model.hidden_size ({width}) is not a multiple of model.num_attention_heads ({heads}); change one of them"
            ));
        }
        if heads % kv_heads != 0 {
            return Some(format!(
                "model.num_attention_heads ({heads}) is not a multiple of model.num_key_value_heads ({kv_heads}); change one of them"
            ));
        }
        if self.model_type != Family::Gpt2 && self.head_dim() % 2 != 0 {
            return Some(format!(
                "heads have {} columns; rotary positions need an even number",
                self.head_dim()
            ));
        }
        for (name, value) in [
            ("embd_pdrop", self.embd_pdrop),
            ("resid_pdrop", self.resid_pdrop),
            ("attn_pdrop", self.attn_pdrop),
        ] {
            if !(0.0..1.0).contains(&value) {
                return Some(format!("model.{name} is {value}; it must be at least 0 and below 1"));
            }
        }
        for (name, value) in [
            ("initializer_range", self.initializer_range),
            ("norm_eps", self.norm_eps),
            ("rope_theta", self.theta()),
        ] {
            if !(value > 0.0 && value.is_finite()) {
                return Some(format!("model.{name} is {value}; it must be above 0"));
            }
        }
        self.problem_of_experts().or_else(|| self.unsupported())
    }
}

impl Model {
    fn problem_of_experts(&self) -> Option<String> {
        const EXPERTS_MAX: i64 = 4096;
        let Some(Experts { count, top_k, balance }) = self.experts() else {
            let given = self.num_local_experts.or(self.num_experts_per_tok).is_some();
            return given.then(|| {
                "model.num_local_experts and num_experts_per_tok are of model_type mixtral; leave them out, or take that".into()
            });
        };
        if !(1..=EXPERTS_MAX).contains(&count) {
            return Some(format!(
                "model.num_local_experts is {count}; it must be from 1 to {EXPERTS_MAX}"
            ));
        }
        if !(1..=count).contains(&top_k) {
            return Some(format!(
                "model.num_experts_per_tok is {top_k}; it must be from 1 to model.num_local_experts ({count})"
            ));
        }
        let is_right = balance >= 0.0 && balance.is_finite();
        (!is_right)
            .then(|| format!("model.router_aux_loss_coef is {balance}; it must not be negative"))
    }
}

impl Data {
    pub(super) fn problem(&self, model: &Model) -> Option<String> {
        if !(1..=64).contains(&self.prefetch_threads) {
            return Some(format!(
                "data.prefetch_threads is {}; it must be from 1 to 64",
                self.prefetch_threads
            ));
        }
        // Of a file of fixed batches length and tokens are checked when it is opened.
        if self.batches.is_some() {
            return None;
        }
        let length = i64::try_from(self.sequence_length).unwrap_or(i64::MAX);
        if !(1..=model.max_position_embeddings).contains(&length) {
            return Some(format!(
                "data.sequence_length is {length}; it must be from 1 to model.max_position_embeddings ({})",
                model.max_position_embeddings
            ));
        }
        // A folder that is prepared has a vocabulary, which is checked when it is opened.
        let vocab = i64::try_from(self.vocab_size).unwrap_or(i64::MAX);
        (vocab > model.vocab_size && !TokenIndex::is_in(&self.path)).then(|| {
            format!(
                "data.vocab_size ({vocab}) is above model.vocab_size ({}); lower the first or raise the second",
                model.vocab_size
            )
        })
    }
}
