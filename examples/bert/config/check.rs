//! What no single field shows: values out of range, and fields that cannot stand together.
//!
//! Each message names the field by its path in the file, its value, and what to do.

use phalanx_data::format::TokenIndex;

use super::{Config, Data, Model};

impl Config {
    /// Of sections that other trainers do not have: there are none.
    #[expect(clippy::unused_self, reason = "a trainer with such sections looks at them")]
    pub(super) fn own_problem(&self) -> Option<String> {
        None
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
    pub(super) fn problem(&self, model: &Model) -> Option<String> {
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
