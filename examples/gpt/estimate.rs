//! How much memory a rank of a mesh takes.
//!
//! Parameters, gradients and the optimizer's state are cut over `tp` and into stages, experts over `ep` beside that, and under ZeRO all over the ranks with the same
//! parameters. Activations are counted tensor by
//! tensor, as the layers keep them for backward; a pipeline keeps those of as many micro-batches as its schedule says. What a rank takes beside that, libtorch first of all,
//! was measured.
//!
//! Source of the way of counting: Korthikanti et al., "Reducing Activation Recomputation in Large Transformer Models" (2022), section 4.

use phalanx_model_parallel::pipeline::schedule::ScheduleKind;
use phalanx_model_parallel::{Axes, Mesh};

use super::batching::Batching;
use super::config::{Config, Family, FloatKind, Precision};
pub(crate) use super::machine::Estimate;
use super::place;

/// Measured: a rank of the tiny model. Pages of libtorch's code are there once, whatever ranks a machine has.
const PRIVATE_BYTES: u64 = 64 << 20;
const CODE_BYTES: u64 = 100 << 20;
/// Measured: what larger models take beside what is counted, gradients on their way into buckets among it.
const GRADIENT_BYTES: u64 = 48 << 20;
/// Logits that the loss has at once, at most.
const LOGITS_BYTES_MAX: u64 = 128 << 20;

impl Estimate {
    /// For the rank with the most.
    pub(crate) fn new(config: &Config, mesh: &Mesh, batching: Batching) -> Estimate {
        let cut = place::expected_cut(config, mesh, batching);
        let stages = 0..mesh.shape().pp.max(1);
        let all = stages.map(|rank| Self::of_rank(config, mesh, batching, (&cut, rank)));
        let nothing =
            Estimate { parameters: 0, gradients: 0, optimizer: 0, activations: 0, runtime: 0 };
        all.max_by_key(Estimate::total).unwrap_or(nothing)
    }

    /// For the ranks that are the `rank`th of their pipeline, whose stages have so many blocks each.
    pub(crate) fn of_rank(
        config: &Config,
        mesh: &Mesh,
        batching: Batching,
        (cut, rank): (&[usize], usize),
    ) -> Estimate {
        let held = Held::new(config, mesh, (cut, rank));
        let parameters = held.parameters();
        let parameter_bytes = config.ddp.parameter_kind.map_or(4, FloatKind::bytes);
        let gradient_bytes = config.ddp.gradient_kind.map_or(4, FloatKind::bytes);
        let masters = if parameter_bytes < 4 { 4 * parameters } else { 0 };
        let states = 4 * config.optimizer.state_count(parameters, held.tables()) + masters;
        let ranks = number(config.ddp.shard_ranks.unwrap_or(mesh.group_size(Axes::DP_CP)));
        let shards = |from_stage: u8| if config.ddp.zero < from_stage { 1 } else { ranks };
        // Fewer ranks have the same experts.
        let of_rank = |bytes: u64, from_stage: u8| {
            let rest = share(bytes, parameters - held.of_experts(), parameters);
            let same = (shards(from_stage) / held.ep).max(1);
            rest.div_ceil(shards(from_stage)) + (bytes - rest).div_ceil(same)
        };
        Estimate {
            parameters: of_rank(parameters * parameter_bytes, 3),
            gradients: of_rank(parameters * gradient_bytes, 2)
                + parameters * config.ddp.hook.kept_bytes(),
            optimizer: of_rank(states, 1),
            activations: held.activations(batching),
            runtime: PRIVATE_BYTES
                + CODE_BYTES / number(mesh.world_size())
                + GRADIENT_BYTES.min(parameters * 4),
        }
    }
}

/// What a rank has of the model.
struct Held<'a> {
    config: &'a Config,
    tp: u64,
    cp: u64,
    ep: u64,
    /// Tokens between blocks are cut over so many.
    between: u64,
    /// Of all its chunks.
    blocks: u64,
    chunks: u64,
    /// Its place in a pipeline of so many.
    place: (usize, usize),
}

impl<'a> Held<'a> {
    fn new(config: &'a Config, mesh: &Mesh, (cut, rank): (&[usize], usize)) -> Self {
        let shape = mesh.shape();
        let stages = shape.pp.max(1);
        let blocks: usize = cut.iter().skip(rank).step_by(stages).sum();
        let tp = number(shape.tp);
        Held {
            config,
            tp,
            cp: number(shape.cp),
            ep: number(shape.ep),
            between: if config.mesh.sequence_parallel { tp } else { 1 },
            blocks: blocks as u64,
            chunks: number(cut.len() / stages),
            place: (rank, stages),
        }
    }

    fn embeds(&self) -> bool {
        self.place.0 == 0
    }

    fn ends(&self) -> bool {
        self.place.0 + 1 == self.place.1
    }

    /// A rank's rows of a table of words.
    fn words(&self) -> u64 {
        let model = &self.config.model;
        size(model.vocab_size).div_ceil(self.tp) * size(model.hidden_size)
    }

    /// Of embedding and head.
    fn tables(&self) -> u64 {
        let model = &self.config.model;
        let is_one = model.is_tied() && self.embeds() && self.ends();
        let count = u64::from(self.embeds()) + u64::from(self.ends()) - u64::from(is_one);
        // Positions are whole on every rank of `tp`.
        let all = size(model.vocab_size) * size(model.hidden_size);
        let positions = model.embedding_count().saturating_sub(all);
        count * self.words() + if self.embeds() { positions } else { 0 }
    }

    fn parameters(&self) -> u64 {
        let model = &self.config.model;
        let of_others = size(model.block_count() - model.expert_count());
        self.blocks * of_others.div_ceil(self.tp) + self.tables() + self.of_experts()
    }

    fn of_experts(&self) -> u64 {
        (self.blocks * size(self.config.model.expert_count())).div_ceil(self.tp * self.ep)
    }

    /// Tokens of a micro-batch that the rank has.
    fn tokens(&self, batching: Batching) -> u64 {
        let longest = size(self.config.model.max_position_embeddings);
        let length = (self.config.data.sequence_length as u64).min(longest).div_ceil(self.cp);
        batching.micro_batch as u64 * length
    }

    /// Bytes a token that a block keeps for its backward.
    fn of_block(&self) -> u64 {
        let model = &self.config.model;
        let width = if self.config.train.precision == Precision::Bf16 { 2 } else { 4 };
        // A token goes through several experts.
        let choices = model.experts().map_or(1, |experts| size(experts.top_k));
        let (hidden, inner) = (size(model.hidden_size), choices * size(model.inner()));
        let heads = |count: i64| size(count * model.head_dim());
        let queries = heads(model.num_attention_heads);
        let keys = match model.model_type {
            // Each head of keys and values stands once for every head of queries.
            Family::Llama | Family::Mixtral => queries,
            Family::Gpt2 => heads(model.kv_heads()),
        };
        // Between products: what comes into each of two norms, and what they give, of Llama's before and behind the weight.
        let norms = match model.model_type {
            Family::Gpt2 => 4,
            Family::Llama | Family::Mixtral => 6,
        };
        // Before and behind the activation; of SwiGLU the gate, too, and what it is multiplied with.
        let inners = match model.model_type {
            Family::Gpt2 => 2,
            Family::Llama | Family::Mixtral => 4,
        };
        let inside = 2 * queries + 2 * keys + inners * inner;
        norms * hidden * 4 / self.between + inside * width / self.tp
    }

    fn activations(&self, batching: Batching) -> u64 {
        let (model, tokens) = (&self.config.model, self.tokens(batching));
        let hidden = size(model.hidden_size);
        let kind = self.config.mesh.schedule().unwrap_or(ScheduleKind::OneFOneB);
        let (rank, stages) = self.place;
        let under_way = match stages * kind.chunk_count() {
            1 => 1,
            _ => kind.activations_max(stages, batching.accumulate, rank) as u64,
        };
        let input = hidden * 4 / self.between;
        let blocks = self.blocks.div_ceil(self.chunks);
        let kept = match self.config.train.recompute {
            true => under_way * blocks * input + self.of_block(),
            false => under_way * blocks * self.of_block(),
        };
        tokens * kept + self.of_tables(tokens)
    }

    /// What comes and goes with the tables of words: a gradient as large as the table of the embedding; of the head logits of some tokens, the gradients of hidden states
    /// and of the table, which the loss makes in forward, and the latter once more, by the factor that backward brings. The heap, which keeps what is freed, has holes of the
    /// size of the largest tensor.
    fn of_tables(&self, tokens: u64) -> u64 {
        let (model, hidden) = (&self.config.model, size(self.config.model.hidden_size));
        let table = self.words() * 4;
        let of_embedding = if self.embeds() { table } else { 0 };
        if !self.ends() {
            return of_embedding * 2;
        }
        let logits = tokens * size(model.vocab_size).div_ceil(self.tp) * 4;
        of_embedding + logits.min(LOGITS_BYTES_MAX) + tokens * hidden * 4 + 3 * table
    }
}

/// What `part` of `whole` has of so many bytes.
fn share(bytes: u64, part: u64, whole: u64) -> u64 {
    let share = u128::from(bytes) * u128::from(part) / u128::from(whole.max(1));
    u64::try_from(share).unwrap_or(bytes)
}

fn size(value: i64) -> u64 {
    u64::try_from(value).unwrap_or(0)
}

fn number(value: usize) -> u64 {
    value.max(1) as u64
}
