//! Which blocks each stage of the pipeline has.
//!
//! A pipeline is as fast as its longest stage, and the first has the embedding as well, the last the head over the whole vocabulary, which may take as long as several
//! blocks. Embedding, blocks and head are cut so that the longest stage is as short as it can be, by what they cost: as the model's dimensions say ([`Costs::of`]), or as it
//! was measured. Pure.

use phalanx_model_parallel::pipeline::partition::partition;
use phalanx_model_parallel::Mesh;

use super::batching::Batching;
use super::config::{Config, ConfigError, Model};

/// How the layers are cut.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Stages {
    /// By what layers cost, as the dimensions say.
    Auto,
    /// As many blocks each, or one more in the first ones.
    Even,
    /// By what layers take, as rank 0 measures it.
    Measured,
    /// So many blocks in each stage.
    Blocks(Vec<usize>),
}

impl std::str::FromStr for Stages {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let number = |part: &str| {
            part.trim().parse().map_err(|_not_a_number: std::num::ParseIntError| {
                format!("{text:?} is no cut into stages; there are auto, even, measured, and numbers of blocks such as 5,7")
            })
        };
        match text {
            "auto" => Ok(Stages::Auto),
            "even" => Ok(Stages::Even),
            "measured" => Ok(Stages::Measured),
            list => Ok(Stages::Blocks(list.split(',').map(number).collect::<Result<_, _>>()?)),
        }
    }
}

/// What parts of the model take, forward and backward of a micro-batch, in any unit.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Costs {
    /// Words, positions, and their gradients.
    pub(crate) embedding: f64,
    /// One block.
    pub(crate) block: f64,
    /// The last norm, the product with the vocabulary, and the loss.
    pub(crate) head: f64,
}

/// What a processor computes while it reads or writes one value of memory: 10 to 50 on a core with AVX-512 and on a GPU without tensor cores. It decides what the embedding
/// counts for, which computes next to nothing, and has a gradient as large as its table.
const FLOPS_A_VALUE: f64 = 32.0;
/// Each time that a gradient of weights is made and added to those before: one write, two reads, one write.
const GRADIENT_VALUES: f64 = 4.0;
/// Values of `hidden_size` and of `intermediate_size` that norms, activations, dropout and sums of a block read and write, in both passes.
const BLOCK_VALUES: [f64; 2] = [24.0, 8.0];
/// Values that the loss reads and writes for each word of a token: logits, their maximum, exponentials, sum and gradient.
const LOGIT_VALUES: f64 = 8.0;

impl Costs {
    /// By the dimensions of the model, as flops. `tp` cuts all of it alike, so it is left out.
    pub(crate) fn of(config: &Config, mesh: &Mesh, batching: Batching) -> Costs {
        let model = &config.model;
        let float = |value: i64| f64::from(i32::try_from(value).unwrap_or(i32::MAX));
        let number = |value: usize| f64::from(u32::try_from(value).unwrap_or(u32::MAX));
        let (hidden, inner) = (float(model.hidden_size), float(model.inner()));
        let length = number(config.data.sequence_length).min(float(model.max_position_embeddings));
        let tokens = number(batching.micro_batch) * length / number(mesh.shape().cp);
        // A product is as long forward as each of its two backwards.
        let passes = if config.train.recompute { 4.0 } else { 3.0 };
        let weights = float(model.block_count());
        // Of its experts a token goes through some.
        let idle = model.experts().map_or(0.0, |experts| {
            float(model.expert_count()) * float(experts.count - experts.top_k)
                / float(experts.count)
        });
        let table = float(model.vocab_size) * hidden;
        // Scores and their sum of values, of half of the tokens on average.
        let queries = float(model.num_attention_heads * model.head_dim());
        let products = 2.0 * tokens * (weights - idle + length * queries);
        let of_block = tokens * (BLOCK_VALUES[0] * hidden + BLOCK_VALUES[1] * inner);
        let of_head = tokens * LOGIT_VALUES * float(model.vocab_size);
        Costs {
            embedding: FLOPS_A_VALUE * (GRADIENT_VALUES * table + 4.0 * tokens * hidden),
            block: passes * products + FLOPS_A_VALUE * (GRADIENT_VALUES * weights + of_block),
            head: 6.0 * tokens * table + FLOPS_A_VALUE * (GRADIENT_VALUES * table + of_head),
        }
    }
}

/// Blocks of each of so many stages, from the first to the last. The first stage has the embedding, too, and the last the head.
pub(crate) fn cut(
    model: &Model,
    stages: (&Stages, usize),
    costs: Costs,
) -> Result<Vec<usize>, ConfigError> {
    let (stages, count) = stages;
    let blocks = usize::try_from(model.num_hidden_layers).unwrap_or(0);
    match stages {
        Stages::Even if blocks < count => Err(invalid(format!(
            "{count} stages are more than model.num_hidden_layers ({blocks}): some would have no layers; lower --pp, or the \
             chunks of --schedule, or take --stages auto"
        ))),
        Stages::Even => {
            let (each, more) = (blocks / count, blocks % count);
            Ok((0..count).map(|stage| each + usize::from(stage < more)).collect())
        }
        Stages::Blocks(list) => listed(list, blocks, count),
        Stages::Auto | Stages::Measured if blocks + 2 < count => Err(invalid(format!(
            "{count} stages are more than model.num_hidden_layers ({blocks}), the embedding and the head: some would have no \
             layers; lower --pp, or the chunks of --schedule"
        ))),
        Stages::Auto | Stages::Measured => {
            let mut times = vec![costs.block; blocks + 2];
            (times[0], times[blocks + 1]) = (costs.embedding, costs.head);
            let ranges = partition(&times, count).map_err(|error| invalid(error.to_string()))?;
            let of = |range: &std::ops::Range<usize>| range.end.min(blocks + 1) - range.start.max(1);
            Ok(ranges.iter().map(of).collect())
        }
    }
}

/// The user's own numbers.
fn listed(list: &[usize], blocks: usize, count: usize) -> Result<Vec<usize>, ConfigError> {
    let text = list.iter().map(ToString::to_string).collect::<Vec<_>>().join(",");
    let wrong = |what: String| Err(invalid(format!("--stages {text} {what}")));
    if list.len() != count {
        return wrong(format!(
            "has {} numbers and the pipeline {count} stages, ranks of --pp times chunks of --schedule; give one number for each",
            list.len()
        ));
    }
    let sum: usize = list.iter().sum();
    if sum != blocks {
        return wrong(format!(
            "are {sum} blocks and model.num_hidden_layers is {blocks}; give numbers that add up to it"
        ));
    }
    match (1..count.saturating_sub(1)).find(|stage| list[*stage] == 0) {
        Some(stage) => wrong(format!(
            "leaves stage {stage} without layers; only the first, which has the embedding, and the last, which has the head, may have no block"
        )),
        None => Ok(list.to_vec()),
    }
}

/// The cut in words.
pub(crate) fn described(cut: &[usize]) -> String {
    let last = cut.len() - 1;
    let stage = |(index, blocks): (usize, &usize)| {
        let parts = [
            (index == 0).then(|| "embedding".to_owned()),
            (*blocks > 0).then(|| format!("{blocks} block{}", if *blocks == 1 { "" } else { "s" })),
            (index == last).then(|| "head".to_owned()),
        ];
        parts.into_iter().flatten().collect::<Vec<_>>().join(" + ")
    };
    cut.iter().enumerate().map(stage).collect::<Vec<_>>().join(" | ")
}

fn invalid(message: String) -> ConfigError {
    ConfigError::Invalid { origin: "mesh".into(), message }
}
