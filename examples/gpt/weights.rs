//! Weights from a file, several and their index, or a folder, as phalanx or transformers wrote them.

use std::path::Path;

use anyhow::Result;
use phalanx_ddp_core::checkpoint::LoadOptions;
use phalanx_ddp_core::Ddp;

use super::config::{Family, Model};
use super::weights_file;

/// What GPT-2's own files leave out before names; `save_pretrained` writes it.
const PREFIX: &str = "transformer.";

/// Compares names and shapes with the model's before anything is started; reads headers alone.
pub(crate) fn check(path: &Path, model: &Model) -> Result<()> {
    weights_file::check(path, tensors(model), old_name)
}

fn old_name(name: &str) -> String {
    name.strip_prefix(PREFIX).unwrap_or(name).to_owned()
}

/// Overwrites every variable of the wrapped model. Returns the names in the file that it does not have (masks, a head that is tied here). Collective.
pub(crate) fn load(path: &Path, ddp: &Ddp) -> Result<Vec<String>> {
    let names = |name: &str| match old_name(name) {
        old if old == name => vec![old],
        old => vec![name.to_owned(), old],
    };
    Ok(ddp.load_weights(path, &LoadOptions::with_names(names))?)
}

/// All tensors of the whole model.
fn tensors(model: &Model) -> Vec<(String, Vec<i64>)> {
    let (width, inner, words) = (model.hidden_size, model.inner(), model.vocab_size);
    let queries = model.num_attention_heads * model.head_dim();
    let keys = model.kv_heads() * model.head_dim();
    let is_gpt2 = model.model_type == Family::Gpt2;
    let of_block: Vec<(&str, Vec<i64>)> = match model.model_type {
        Family::Gpt2 => vec![
            ("ln_1.weight", vec![width]),
            ("ln_1.bias", vec![width]),
            ("attn.c_attn.weight", vec![width, queries + 2 * keys]),
            ("attn.c_attn.bias", vec![queries + 2 * keys]),
            ("attn.c_proj.weight", vec![queries, width]),
            ("attn.c_proj.bias", vec![width]),
            ("ln_2.weight", vec![width]),
            ("ln_2.bias", vec![width]),
            ("mlp.c_fc.weight", vec![width, inner]),
            ("mlp.c_fc.bias", vec![inner]),
            ("mlp.c_proj.weight", vec![inner, width]),
            ("mlp.c_proj.bias", vec![width]),
        ],
        Family::Llama => vec![
            ("input_layernorm.weight", vec![width]),
            ("self_attn.q_proj.weight", vec![queries, width]),
            ("self_attn.k_proj.weight", vec![keys, width]),
            ("self_attn.v_proj.weight", vec![keys, width]),
            ("self_attn.o_proj.weight", vec![width, queries]),
            ("post_attention_layernorm.weight", vec![width]),
            ("mlp.gate_proj.weight", vec![inner, width]),
            ("mlp.up_proj.weight", vec![inner, width]),
            ("mlp.down_proj.weight", vec![width, inner]),
        ],
    };
    let blocks = if is_gpt2 { "transformer.h" } else { "model.layers" };
    let mut all: Vec<(String, Vec<i64>)> = match model.model_type {
        Family::Gpt2 => vec![
            ("transformer.wte.weight".into(), vec![words, width]),
            ("transformer.wpe.weight".into(), vec![model.max_position_embeddings, width]),
            ("transformer.ln_f.weight".into(), vec![width]),
            ("transformer.ln_f.bias".into(), vec![width]),
        ],
        Family::Llama => vec![
            ("model.embed_tokens.weight".into(), vec![words, width]),
            ("model.norm.weight".into(), vec![width]),
        ],
    };
    if !model.is_tied() {
        all.push(("lm_head.weight".into(), vec![words, width]));
    }
    for number in 0..model.num_hidden_layers {
        let named =
            |(name, shape): &(&str, Vec<i64>)| (format!("{blocks}.{number}.{name}"), shape.clone());
        all.extend(of_block.iter().map(named));
    }
    all
}
