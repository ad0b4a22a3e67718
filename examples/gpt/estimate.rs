//! How much memory a rank of a mesh takes.
//!
//! Parameters, gradients and the optimizer's state are cut over `tp` and `pp`, and under ZeRO over the ranks with the same parameters; activations over
//! `tp` in part, or with sequence parallelism all, and over `cp`. Experts are cut over `ep` beside that. A pipeline keeps those of as many micro-batches as it has stages.
//!
//! Source of the activation count: Korthikanti et al., "Reducing Activation Recomputation in Large Transformer Models" (2022), section 4, adapted to the types that
//! are kept on the CPU.

use phalanx_model_parallel::{Axes, Mesh};

use super::batching::Batching;
use super::config::{Config, FloatKind, Precision};
pub(crate) use super::machine::Estimate;

/// Measured: a rank of the tiny model, libtorch's private pages included.
const RUNTIME_BYTES: u64 = 160 << 20;

impl Estimate {
    /// For the rank with the most.
    pub(crate) fn new(config: &Config, mesh: &Mesh, batching: Batching) -> Estimate {
        let (model, shape) = (&config.model, mesh.shape());
        let number = |value: usize| value.max(1) as u64;
        let (tp, pp) = (number(shape.tp), number(shape.pp));
        let size = |value: i64| u64::try_from(value).unwrap_or(0);
        let blocks = size(model.num_hidden_layers).div_ceil(pp);
        // The first stage has the embedding, the last the head.
        let tables = model.embedding_count() * if pp == 1 && !model.is_tied() { 2 } else { 1 };
        let of_experts = (blocks * size(model.expert_count())).div_ceil(tp * number(shape.ep));
        let of_others = size(model.block_count() - model.expert_count());
        let parameters = (blocks * of_others + tables).div_ceil(tp) + of_experts;
        let parameter_bytes = config.ddp.parameter_kind.map_or(4, FloatKind::bytes);
        let gradient_bytes = config.ddp.gradient_kind.map_or(4, FloatKind::bytes);
        let masters = if parameter_bytes < 4 { 4 * parameters } else { 0 };
        let states = 4 * config.optimizer.state_count(parameters, tables.div_ceil(tp)) + masters;
        let ranks = number(config.ddp.shard_ranks.unwrap_or(mesh.group_size(Axes::DP_CP)));
        let shards = |from_stage: u8| if config.ddp.zero < from_stage { 1 } else { ranks };
        // Fewer ranks have the same experts.
        let of_rank = |bytes: u64, from_stage: u8| {
            let rest = share(bytes, parameters - of_experts, parameters);
            let same = (shards(from_stage) / number(shape.ep)).max(1);
            rest.div_ceil(shards(from_stage)) + (bytes - rest).div_ceil(same)
        };
        let under_way = pp.min(number(batching.accumulate));
        Estimate {
            parameters: of_rank(parameters * parameter_bytes, 3),
            gradients: of_rank(parameters * gradient_bytes, 2)
                + parameters * config.ddp.hook.kept_bytes(),
            optimizer: of_rank(states, 1),
            activations: under_way * activations(config, mesh, batching, blocks),
            runtime: RUNTIME_BYTES,
        }
    }
}

/// What `part` of `whole` has of so many bytes.
fn share(bytes: u64, part: u64, whole: u64) -> u64 {
    let share = u128::from(bytes) * u128::from(part) / u128::from(whole.max(1));
    u64::try_from(share).unwrap_or(bytes)
}

/// Of one micro-batch.
fn activations(config: &Config, mesh: &Mesh, batching: Batching, blocks: u64) -> u64 {
    let (model, shape) = (&config.model, mesh.shape());
    let size = |value: i64| u64::try_from(value).unwrap_or(0);
    let (tp, cp) = (shape.tp.max(1) as u64, shape.cp.max(1) as u64);
    let longest = size(model.max_position_embeddings);
    let length = (config.data.sequence_length as u64).min(longest).div_ceil(cp);
    let tokens = batching.micro_batch as u64 * length;
    let width = if config.train.precision == Precision::Bf16 { 2 } else { 4 };
    // A token goes through several experts.
    let choices = model.experts().map_or(1, |experts| size(experts.top_k));
    let (hidden, inner) = (size(model.hidden_size), choices * size(model.inner()));
    let between = if config.mesh.sequence_parallel { tp } else { 1 };
    // Between blocks: what comes in, what two norms give, and what two products add; inside: queries, keys, values, the attention's output, and the
    // feed-forward's inside twice.
    let token = 5 * hidden * 4 / between + (4 * hidden + 3 * inner) * width / tp;
    let kept = match config.train.recompute {
        true => tokens * (blocks * hidden * 4 / between + token),
        false => tokens * token * blocks,
    };
    // A chunk of logits, and the gradients of hidden states and table that the loss keeps.
    let words = size(model.vocab_size).div_ceil(tp);
    kept + (tokens * words * 4).min(128 << 20) + (tokens + words) * hidden * 4
}
