//! Weights from a file, several and their index, or a folder, as phalanx or transformers wrote them.

use std::path::{Path, PathBuf};

use anyhow::Result;
use phalanx_checkpoint::fs::Real;
use phalanx_checkpoint::{write_weights, Extent, Spec, Tensors, Weights};
use phalanx_ddp_core::checkpoint::{LoadOptions, WeightsOptions};
use phalanx_ddp_core::Ddp;

use super::config::{Experts, Family, Model};
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

/// Overwrites every variable of the wrapped model, of which each of `ddps` has some. Returns the names in the file that it does not have (masks, a head that is tied
/// here). Collective.
pub(crate) fn load(path: &Path, ddps: &[&Ddp]) -> Result<Vec<String>> {
    let names = |name: &str| match old_name(name) {
        old if old == name => vec![old],
        old => vec![name.to_owned(), old],
    };
    let mut left: Option<Vec<String>> = None;
    for ddp in ddps {
        let not_its_own = ddp.load_weights(path, &LoadOptions::with_names(names))?;
        left = Some(match left {
            Some(left) => left.into_iter().filter(|name| not_its_own.contains(name)).collect(),
            None => not_its_own,
        });
    }
    Ok(left.unwrap_or_default())
}

/// Writes all variables to rank 0's `path`. Each of several `ddps` is written by itself first: rank 0 then makes one file of them. Collective.
pub(crate) fn save(path: &Path, ddps: &[&Ddp], is_root: bool) -> Result<()> {
    let options = WeightsOptions::default();
    if let [ddp] = ddps {
        return Ok(ddp.save_weights(path, &options)?);
    }
    let beside = |number: usize| path.with_extension(format!("part-{number}.safetensors"));
    let parts: Vec<PathBuf> = (0..ddps.len()).map(beside).collect();
    for (ddp, part) in ddps.iter().zip(&parts) {
        ddp.save_weights(part, &options)?;
    }
    if is_root {
        let files = parts.iter().map(Weights::open).collect::<Result<_, _>>()?;
        write_weights(&Real, path, &Several(files), &options)?;
        parts.iter().try_for_each(std::fs::remove_file)?;
    }
    Ok(())
}

/// The tensors of several files, none of which has one of another's name.
struct Several(Vec<Weights>);

impl Tensors for Several {
    fn names(&self) -> Vec<&str> {
        let mut names: Vec<&str> = self.0.iter().flat_map(Tensors::names).collect();
        names.sort_unstable();
        names
    }

    fn spec(&self, name: &str) -> Option<Spec<'_>> {
        self.0.iter().find_map(|file| file.spec(name))
    }

    fn read(&self, name: &str, extent: &Extent, out: &mut [u8]) -> phalanx_checkpoint::Result<()> {
        let has = |file: &&Weights| file.spec(name).is_some();
        match self.0.iter().find(has).or(self.0.first()) {
            Some(file) => file.read(name, extent, out),
            None => Ok(()),
        }
    }
}

/// All tensors of the whole model.
fn tensors(model: &Model) -> Vec<(String, Vec<i64>)> {
    let (width, inner, words) = (model.hidden_size, model.inner(), model.vocab_size);
    let queries = model.num_attention_heads * model.head_dim();
    let keys = model.kv_heads() * model.head_dim();
    let is_gpt2 = model.model_type == Family::Gpt2;
    let mut of_block: Vec<(&str, Vec<i64>)> = match model.model_type {
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
        Family::Llama | Family::Mixtral => vec![
            ("input_layernorm.weight", vec![width]),
            ("self_attn.q_proj.weight", vec![queries, width]),
            ("self_attn.k_proj.weight", vec![keys, width]),
            ("self_attn.v_proj.weight", vec![keys, width]),
            ("self_attn.o_proj.weight", vec![width, queries]),
            ("post_attention_layernorm.weight", vec![width]),
        ],
    };
    let mut inside: Vec<(String, Vec<i64>)> = Vec::new();
    match (model.model_type, model.experts()) {
        (_, Some(Experts { count, .. })) => {
            inside.push(("block_sparse_moe.gate.weight".into(), vec![count, width]));
            for number in 0..count {
                let named = |name: &str| format!("block_sparse_moe.experts.{number}.{name}.weight");
                inside.extend(["w1", "w3"].map(|name| (named(name), vec![inner, width])));
                inside.push((named("w2"), vec![width, inner]));
            }
        }
        (Family::Gpt2, None) => {}
        (_, None) => {
            let named = |name: &str| format!("mlp.{name}_proj.weight");
            inside.extend(["gate", "up"].map(|name| (named(name), vec![inner, width])));
            inside.push((named("down"), vec![width, inner]));
        }
    }
    of_block.extend(inside.iter().map(|(name, shape)| (name.as_str(), shape.clone())));
    let blocks = if is_gpt2 { "transformer.h" } else { "model.layers" };
    let mut all: Vec<(String, Vec<i64>)> = match model.model_type {
        Family::Gpt2 => vec![
            ("transformer.wte.weight".into(), vec![words, width]),
            ("transformer.wpe.weight".into(), vec![model.max_position_embeddings, width]),
            ("transformer.ln_f.weight".into(), vec![width]),
            ("transformer.ln_f.bias".into(), vec![width]),
        ],
        Family::Llama | Family::Mixtral => vec![
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
