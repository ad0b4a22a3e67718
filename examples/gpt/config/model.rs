//! Section `model`: Hugging Face's `GPT2Config`, `LlamaConfig` and `MixtralConfig` in one, under Llama's names; GPT-2's are read too, and written for it.

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::Ignored;

/// Which architecture.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Family {
    /// Learned positions, layer norms, biases, GELU, a tied head.
    Gpt2,
    /// Rotary positions, RMS norms, no biases, `SwiGLU`, grouped queries.
    Llama,
    /// Llama with experts: each token goes through the best few of several feed-forward blocks.
    Mixtral,
}

/// The network. What is left out is GPT-2's, but for dropout, which is none.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct Model {
    /// `gpt2`, `llama` or `mixtral`.
    pub(crate) model_type: Family,
    /// Rows of the word embedding; may be more than the tokenizer has.
    pub(crate) vocab_size: i64,
    /// Width of the residual stream.
    #[serde(alias = "n_embd")]
    pub(crate) hidden_size: i64,
    /// Blocks.
    #[serde(alias = "n_layer")]
    pub(crate) num_hidden_layers: i64,
    /// Heads of queries; divides `hidden_size`.
    #[serde(alias = "n_head")]
    pub(crate) num_attention_heads: i64,
    /// Heads of keys and values; null: as many as of queries.
    pub(crate) num_key_value_heads: Option<i64>,
    /// Columns of a head; null: `hidden_size` ÷ heads.
    pub(crate) head_dim: Option<i64>,
    /// Width inside the feed-forward block; null: 4 × `hidden_size`.
    #[serde(alias = "n_inner")]
    pub(crate) intermediate_size: Option<i64>,
    /// Longest sequence.
    #[serde(alias = "n_positions")]
    pub(crate) max_position_embeddings: i64,
    /// `gelu_new` of GPT-2, `silu` of Llama; null is that.
    #[serde(alias = "activation_function")]
    pub(crate) hidden_act: Option<String>,
    /// Added to the variance, or to the mean square, in norms.
    #[serde(alias = "layer_norm_epsilon", alias = "rms_norm_eps")]
    pub(crate) norm_eps: f64,
    /// Base of the rotary positions; null: 10 000, and of Mixtral 1 000 000.
    pub(crate) rope_theta: Option<f64>,
    /// The same, as later files of transformers have it.
    pub(crate) rope_parameters: Option<RopeParameters>,
    /// Standard deviation of the first weights.
    pub(crate) initializer_range: f64,
    /// Dropout of the embeddings.
    pub(crate) embd_pdrop: f64,
    /// Dropout after attention and feed-forward.
    pub(crate) resid_pdrop: f64,
    /// Dropout of the attention's probabilities.
    #[serde(alias = "attention_dropout")]
    pub(crate) attn_pdrop: f64,
    /// Whether the head is the word embedding; null: GPT-2's is, others are not.
    pub(crate) tie_word_embeddings: Option<bool>,
    /// Of `mixtral`: experts of a layer; null: 8.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) num_local_experts: Option<i64>,
    /// Of `mixtral`: experts of a token; null: 2.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) num_experts_per_tok: Option<i64>,
    /// Of `mixtral`: how much the balance of its experts counts beside the loss; null: 0.001.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) router_aux_loss_coef: Option<f64>,
    // Only their usual values are supported.
    #[serde(skip_serializing_if = "Option::is_none")]
    attention_bias: Option<bool>,
    #[serde(skip_serializing_if = "Option::is_none")]
    mlp_bias: Option<bool>,
    #[serde(skip_serializing_if = "Option::is_none")]
    add_cross_attention: Option<bool>,
    #[serde(skip_serializing_if = "Option::is_none")]
    scale_attn_by_inverse_layer_idx: Option<bool>,
    #[serde(skip_serializing_if = "Option::is_none")]
    scale_attn_weights: Option<bool>,
    #[serde(skip_serializing_if = "Option::is_none")]
    rope_scaling: Option<Value>,
    #[serde(skip_serializing_if = "Option::is_none")]
    sliding_window: Option<Value>,
    #[serde(skip_serializing_if = "Option::is_none")]
    router_jitter_noise: Option<f64>,
    // What else transformers writes; pre-training does not use it.
    #[serde(skip_serializing)]
    architectures: Ignored,
    #[serde(skip_serializing)]
    bos_token_id: Ignored,
    #[serde(skip_serializing)]
    eos_token_id: Ignored,
    #[serde(skip_serializing)]
    pad_token_id: Ignored,
    #[serde(skip_serializing)]
    use_cache: Ignored,
    #[serde(skip_serializing)]
    transformers_version: Ignored,
    #[serde(skip_serializing)]
    torch_dtype: Ignored,
    #[serde(skip_serializing)]
    dtype: Ignored,
    #[serde(skip_serializing)]
    pretraining_tp: Ignored,
    #[serde(skip_serializing)]
    summary_type: Ignored,
    #[serde(skip_serializing)]
    summary_use_proj: Ignored,
    #[serde(skip_serializing)]
    summary_activation: Ignored,
    #[serde(skip_serializing)]
    summary_proj_to_labels: Ignored,
    #[serde(skip_serializing)]
    summary_first_dropout: Ignored,
    #[serde(skip_serializing)]
    reorder_and_upcast_attn: Ignored,
    /// `n_positions` once more.
    #[serde(skip_serializing)]
    n_ctx: Ignored,
    #[serde(skip_serializing)]
    task_specific_params: Ignored,
    #[serde(skip_serializing)]
    output_router_logits: Ignored,
}

/// Of the rotary positions.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct RopeParameters {
    /// The base.
    rope_theta: f64,
    /// `default` only.
    #[serde(default)]
    rope_type: Option<String>,
}

/// Experts of a layer.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Experts {
    /// How many there are.
    pub(crate) count: i64,
    /// Through how many a token goes.
    pub(crate) top_k: i64,
    /// What the mean of the layers' balance losses is multiplied by.
    pub(crate) balance: f64,
}

impl Default for Model {
    fn default() -> Self {
        Model {
            model_type: Family::Gpt2,
            vocab_size: 50_257,
            hidden_size: 768,
            num_hidden_layers: 12,
            num_attention_heads: 12,
            num_key_value_heads: None,
            head_dim: None,
            intermediate_size: None,
            max_position_embeddings: 1024,
            hidden_act: None,
            norm_eps: 1e-5,
            rope_theta: None,
            rope_parameters: None,
            initializer_range: 0.02,
            embd_pdrop: 0.0,
            resid_pdrop: 0.0,
            attn_pdrop: 0.0,
            tie_word_embeddings: None,
            num_local_experts: None,
            num_experts_per_tok: None,
            router_aux_loss_coef: None,
            attention_bias: None,
            mlp_bias: None,
            add_cross_attention: None,
            scale_attn_by_inverse_layer_idx: None,
            scale_attn_weights: None,
            rope_scaling: None,
            sliding_window: None,
            router_jitter_noise: None,
            architectures: Ignored,
            bos_token_id: Ignored,
            eos_token_id: Ignored,
            pad_token_id: Ignored,
            use_cache: Ignored,
            transformers_version: Ignored,
            torch_dtype: Ignored,
            dtype: Ignored,
            pretraining_tp: Ignored,
            summary_type: Ignored,
            summary_use_proj: Ignored,
            summary_activation: Ignored,
            summary_proj_to_labels: Ignored,
            summary_first_dropout: Ignored,
            reorder_and_upcast_attn: Ignored,
            n_ctx: Ignored,
            task_specific_params: Ignored,
            output_router_logits: Ignored,
        }
    }
}

impl Model {
    /// Heads of keys and values.
    pub(crate) fn kv_heads(&self) -> i64 {
        self.num_key_value_heads.unwrap_or(self.num_attention_heads)
    }

    /// Columns of a head.
    pub(crate) fn head_dim(&self) -> i64 {
        self.head_dim.unwrap_or(self.hidden_size / self.num_attention_heads.max(1))
    }

    /// Width inside the feed-forward block.
    pub(crate) fn inner(&self) -> i64 {
        self.intermediate_size.unwrap_or(4 * self.hidden_size)
    }

    /// What there is of experts.
    pub(crate) fn experts(&self) -> Option<Experts> {
        (self.model_type == Family::Mixtral).then(|| Experts {
            count: self.num_local_experts.unwrap_or(8),
            top_k: self.num_experts_per_tok.unwrap_or(2),
            balance: self.router_aux_loss_coef.unwrap_or(0.001),
        })
    }

    /// Parameters of a block's experts.
    pub(crate) fn expert_count(&self) -> i64 {
        let of_one = 3 * self.hidden_size * self.inner();
        self.experts().map_or(0, |experts| experts.count * of_one)
    }

    /// Whether the head is the word embedding.
    pub(crate) fn is_tied(&self) -> bool {
        self.tie_word_embeddings.unwrap_or(self.model_type == Family::Gpt2)
    }

    /// Base of the rotary positions.
    pub(crate) fn theta(&self) -> f64 {
        let usual = if self.model_type == Family::Mixtral { 1e6 } else { 1e4 };
        let theta = self.rope_theta.unwrap_or(usual);
        self.rope_parameters.as_ref().map_or(theta, |parameters| parameters.rope_theta)
    }

    /// The network's name in transformers.
    pub(crate) fn architecture(&self) -> &'static str {
        match self.model_type {
            Family::Gpt2 => "GPT2LMHeadModel",
            Family::Llama => "LlamaForCausalLM",
            Family::Mixtral => "MixtralForCausalLM",
        }
    }

    /// Number of trained values; a tied head counts once.
    pub(crate) fn parameter_count(&self) -> u64 {
        let head = if self.is_tied() { 0 } else { self.vocab_size * self.hidden_size };
        let others = self.num_hidden_layers * self.block_count() + self.norm_count() + head;
        self.embedding_count() + u64::try_from(others).unwrap_or(0)
    }

    /// Of which of embeddings.
    pub(crate) fn embedding_count(&self) -> u64 {
        let positions = match self.model_type {
            Family::Gpt2 => self.max_position_embeddings,
            Family::Llama | Family::Mixtral => 0,
        };
        u64::try_from((self.vocab_size + positions) * self.hidden_size).unwrap_or(0)
    }

    /// Of a block.
    pub(crate) fn block_count(&self) -> i64 {
        let (width, inner) = (self.hidden_size, self.inner());
        let (queries, keys) =
            (self.num_attention_heads * self.head_dim(), self.kv_heads() * self.head_dim());
        let attention = width * (2 * queries + 2 * keys);
        let (feed_forward, biases) = match self.model_type {
            Family::Gpt2 => (2 * width * inner, queries + 2 * keys + width + inner + width),
            Family::Llama | Family::Mixtral => (3 * width * inner, 0),
        };
        let feed_forward = match self.experts() {
            Some(Experts { count, .. }) => count * (feed_forward + width),
            None => feed_forward,
        };
        attention + feed_forward + biases + 2 * self.norm_count()
    }

    fn norm_count(&self) -> i64 {
        match self.model_type {
            Family::Gpt2 => 2 * self.hidden_size,
            Family::Llama | Family::Mixtral => self.hidden_size,
        }
    }

    /// What is not supported of it, in words; the sizes are checked elsewhere.
    pub(super) fn unsupported(&self) -> Option<String> {
        let only = match self.model_type {
            Family::Gpt2 => "gelu_new",
            Family::Llama | Family::Mixtral => "silu",
        };
        if let Some(act) = self.hidden_act.as_ref().filter(|act| *act != only) {
            let family = format!("{:?}", self.model_type).to_lowercase();
            return Some(format!(
                "model.hidden_act is \"{act}\"; of {family} only \"{only}\" is supported"
            ));
        }
        let flags = [("attention_bias", self.attention_bias), ("mlp_bias", self.mlp_bias)];
        if let Some((name, _)) = flags.into_iter().find(|(_, value)| *value == Some(true)) {
            return Some(format!(
                "model.{name} is true; products of llama and mixtral have no bias here"
            ));
        }
        let fixed = [
            ("add_cross_attention", self.add_cross_attention, true),
            ("scale_attn_by_inverse_layer_idx", self.scale_attn_by_inverse_layer_idx, true),
            ("scale_attn_weights", self.scale_attn_weights, false),
        ];
        if let Some((name, _, bad)) = fixed.into_iter().find(|(_, is, bad)| *is == Some(*bad)) {
            return Some(format!("model.{name} is {bad}, which is not supported"));
        }
        let scaled = self.rope_parameters.as_ref().and_then(|rope| rope.rope_type.as_ref());
        if self.rope_scaling.is_some() || scaled.is_some_and(|kind| kind != "default") {
            return Some(
                "model.rope_scaling is set; only plain rotary positions are supported".into(),
            );
        }
        if self.sliding_window.is_some() {
            return Some("model.sliding_window is set; attention is to all tokens before".into());
        }
        if self.router_jitter_noise.is_some_and(|noise| noise != 0.0) {
            return Some("model.router_jitter_noise is set; routers have no noise here".into());
        }
        if self.model_type == Family::Gpt2 && !self.is_tied() {
            return Some("model.tie_word_embeddings is false; gpt2 has a tied head".into());
        }
        None
    }

    /// As transformers calls the fields.
    pub(crate) fn for_hugging_face(&self) -> serde_json::Result<Value> {
        let mut value = serde_json::to_value(self)?;
        let names: &[(&str, &str)] = match self.model_type {
            Family::Gpt2 => &[
                ("hidden_size", "n_embd"),
                ("num_hidden_layers", "n_layer"),
                ("num_attention_heads", "n_head"),
                ("intermediate_size", "n_inner"),
                ("max_position_embeddings", "n_positions"),
                ("hidden_act", "activation_function"),
                ("norm_eps", "layer_norm_epsilon"),
                ("num_key_value_heads", ""),
                ("head_dim", ""),
                ("rope_theta", ""),
                ("rope_parameters", ""),
            ],
            Family::Llama | Family::Mixtral => &[
                ("norm_eps", "rms_norm_eps"),
                ("attn_pdrop", "attention_dropout"),
                ("embd_pdrop", ""),
                ("resid_pdrop", ""),
            ],
        };
        let Some(object) = value.as_object_mut() else { return Ok(value) };
        for (ours, theirs) in names {
            let field = object.remove(*ours);
            if let Some(field) = field.filter(|_| !theirs.is_empty()) {
                object.insert((*theirs).into(), field);
            }
        }
        object.retain(|_, field| !field.is_null());
        object.insert("tie_word_embeddings".into(), self.is_tied().into());
        if self.model_type != Family::Gpt2 {
            object.insert("intermediate_size".into(), self.inner().into());
            object.insert("rope_theta".into(), self.theta().into());
        }
        Ok(value)
    }
}
