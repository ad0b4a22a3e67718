//! How much memory a run takes, and whether that much is there.
//!
//! The estimate counts what training BERT keeps: weights, gradients, both moments, the bf16 copies
//! of autocast, the activations that backward needs. `machine::check` compares it with what is free.
//!
//! Source of the activation count: Korthikanti et al., "Reducing Activation Recomputation in Large
//! Transformer Models" (2022), section 4, adapted to the types that autocast keeps on the CPU.

use super::config::{Config, FloatKind, Model, Precision, Rule};
use super::machine::Estimate;

/// Measured: a rank of the tiny model, libtorch's private pages included.
const RUNTIME_BYTES: u64 = 160 << 20;

/// Where matrices come together that a rule needs whole: a wave of buckets of 25 MiB.
const TOGETHER_BYTES: u64 = 96 << 20;

impl Estimate {
    /// For one rank of `world_size`.
    pub(crate) fn new(config: &Config, world_size: usize, micro_batch: usize) -> Estimate {
        let (of_all, of_embeddings) =
            (config.model.parameter_count(), config.model.embedding_count());
        let parameter_bytes = config.ddp.parameter_kind.map_or(4, FloatKind::bytes);
        let parameters = of_all * parameter_bytes;
        let gradient_bytes = config.ddp.gradient_kind.map_or(4, FloatKind::bytes);
        let has_masters = parameter_bytes < 4 || config.ddp.offload_optimizer;
        let masters = if has_masters { 4 * of_all } else { 0 };
        let states = 4 * config.optimizer.state_count(of_all, of_embeddings) + masters;
        let together = match config.optimizer.rule {
            Rule::Muon | Rule::Adafactor => (4 * of_all).min(TOGETHER_BYTES),
            _ => 0,
        };
        let ranks = config.ddp.shard_ranks.unwrap_or(world_size).max(1) as u64;
        let shards = |from_stage: u8| if config.ddp.zero < from_stage { 1 } else { ranks };
        let gradients = of_all * gradient_bytes;
        Estimate {
            parameters: parameters.div_ceil(shards(3)),
            gradients: gradients.div_ceil(shards(2))
                + exchange(config, gradient_bytes)
                + of_all * config.ddp.hook.kept_bytes(),
            optimizer: states.div_ceil(shards(1)) + together,
            activations: activations(config, micro_batch as u64),
            runtime: RUNTIME_BYTES,
        }
    }
}

/// What gradients are exchanged in, where no rank keeps all of them: three usual buckets, and one for the word embedding.
fn exchange(config: &Config, gradient_bytes: u64) -> u64 {
    if config.ddp.zero < 2 {
        return 0;
    }
    let Model { vocab_size, hidden_size, .. } = config.model;
    let embedding = u64::try_from(vocab_size * hidden_size).unwrap_or(0) * gradient_bytes;
    // A bucket closes with the parameter that fills it.
    3 * 2 * 25 * (1 << 20) + embedding
}

fn activations(config: &Config, samples: u64) -> u64 {
    let Model {
        hidden_size,
        intermediate_size,
        num_attention_heads,
        num_hidden_layers,
        vocab_size,
        ..
    } = config.model;
    let size = |value: i64| u64::try_from(value).unwrap_or(0);
    let (hidden, inner, vocab) = (size(hidden_size), size(intermediate_size), size(vocab_size));
    // Fixed batches may be shorter than the configuration says, never longer than the model allows.
    let length =
        (config.data.sequence_length as u64).min(size(config.model.max_position_embeddings));
    let tokens = samples * length;
    let half = config.train.precision == Precision::Bf16;
    let width = if half { 2 } else { 4 };
    // Kept of each token: q, k, v, the attention's output and the casts of three inputs in the
    // compute type; the sum before and the output of both layer norms in fp32, two dropout masks in
    // bytes; the feed-forward's inside twice.
    let casts = if half { 3 } else { 0 };
    let token = hidden * ((4 + casts) * width + 4 * 4 + 2) + 2 * inner * width;
    // Probabilities, their dropout noise and the product of both.
    let attention = 3 * size(num_attention_heads) * length * width;
    // Recomputed layers keep their input in fp32, and one of them at a time everything.
    let layers = match (config.train.recompute, size(num_hidden_layers)) {
        (true, count) => tokens * (count * hidden * 4 + token + attention),
        (false, count) => count * tokens * (token + attention),
    };
    let weights = if half { 2 * config.model.parameter_count() } else { 0 };
    // One token in six is predicted; logits, their log-softmax and both gradients.
    let logits = tokens / 6 * vocab * (4 + 4 + 2 * width);
    // The embedding gets a gradient from the lookup and one from the decoder, each dense, before
    // they are added.
    layers + weights + logits + 2 * vocab * hidden * 4
}
