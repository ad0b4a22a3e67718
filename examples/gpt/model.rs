//! GPT-2, Llama and Mixtral as ranges of layers, of `phalanx_model_parallel`'s layers.
//!
//! A model is a list of chunks (one, without a pipeline), each of which has some blocks; the first has the embedding as well, the last the
//! last norm and the head. Variables carry the names of Hugging Face's `GPT2LMHeadModel`, `LlamaForCausalLM` and `MixtralForCausalLM`, so that their
//! `model.safetensors` loads here and ours loads there; they are registered in the order of the forward pass, so that backward fills the last
//! bucket first.
//!
//! Source: Radford et al., "Language Models are Unsupervised Multitask Learners" (2019); Touvron et al., "`LLaMA`" (2023);
//! `transformers/models/{gpt2,llama,mixtral}/modeling_*.py`.

use std::ops::Range;
use std::rc::Rc;
use std::sync::{Arc, Mutex, PoisonError};

use phalanx_ddp_core::optim::{ParameterGroup, ParameterGroups};
use phalanx_ddp_core::recompute::checkpointed_one;
use phalanx_model_parallel::expert::ExpertParallel;
use phalanx_model_parallel::layer::{Builder, Init, Pass};
use phalanx_model_parallel::tensor::{
    cross_entropy, logits, Dropout, KeyValues, LayerNorm, PositionEmbedding, RmsNorm,
    TensorParallel, VocabEmbedding,
};
use phalanx_model_parallel::Result;
use tch::Tensor;

use super::block::Block;
use super::config::{Family, Model as Config, Rule};
use super::context::{nothing, Context};

/// Which layers of the model a chunk has.
#[derive(Debug, Clone, PartialEq, Eq)]
#[expect(clippy::struct_excessive_bools, reason = "one of the first chunk, one of the last")]
pub(crate) struct Layers {
    /// Numbers of blocks.
    pub(crate) blocks: Range<usize>,
    /// Whether the embedding is before them.
    pub(crate) embeds: bool,
    /// Whether the last norm and the head are behind them.
    pub(crate) ends: bool,
}

/// The ranks with which this one computes a batch.
#[derive(Debug, Clone)]
pub(crate) struct Together {
    /// They have parts of the matrices.
    pub(crate) tp: TensorParallel,
    /// They have parts of the sequences.
    pub(crate) context: Context,
    /// They have other experts, in a model of experts.
    pub(crate) experts: Option<ExpertParallel>,
}

/// This rank's part of the network.
#[derive(Debug)]
pub(crate) struct Gpt {
    chunks: Vec<Chunk>,
    /// The table that is embedding or head, or both, of this rank.
    tied: Option<Tensor>,
    recompute: bool,
}

#[derive(Debug)]
struct Chunk {
    embedding: Option<Embedding>,
    /// Shared with what backward computes again.
    blocks: Vec<Arc<Mutex<Block>>>,
    head: Option<Head>,
    context: Context,
}

/// Words, positions and their dropout.
#[derive(Debug)]
struct Embedding {
    words: Rc<VocabEmbedding>,
    positions: Option<PositionEmbedding>,
    dropout: Dropout,
    tp: TensorParallel,
}

/// The last norm, and the matrix from hidden states to words.
#[derive(Debug)]
struct Head {
    norm: Norm,
    table: Rc<VocabEmbedding>,
    tp: TensorParallel,
}

/// A norm of either family.
#[derive(Debug)]
pub(super) enum Norm {
    Layer(LayerNorm),
    Rms(RmsNorm),
}

impl Norm {
    pub(super) fn new(builder: &Builder<'_>, config: &Config, tp: &TensorParallel) -> Result<Self> {
        let (width, eps) = (config.hidden_size, config.norm_eps);
        Ok(match config.model_type {
            Family::Gpt2 => Norm::Layer(LayerNorm::new(builder, width, eps, tp)?),
            Family::Llama | Family::Mixtral => Norm::Rms(RmsNorm::new(builder, width, eps, tp)?),
        })
    }

    pub(super) fn forward(&self, x: &Tensor) -> Result<Tensor> {
        match self {
            Norm::Layer(norm) => norm.forward(x),
            Norm::Rms(norm) => norm.forward(x),
        }
    }
}

/// What the families call their parts.
struct Names {
    model: &'static str,
    words: &'static str,
    blocks: &'static str,
    norm: &'static str,
}

impl Names {
    const fn of(family: Family) -> Self {
        match family {
            Family::Gpt2 => Names { model: "transformer", words: "wte", blocks: "h", norm: "ln_f" },
            Family::Llama | Family::Mixtral => {
                Names { model: "model", words: "embed_tokens", blocks: "layers", norm: "norm" }
            }
        }
    }
}

impl Gpt {
    /// Registers the variables of these layers under `root`: they begin alike on every mesh.
    pub(crate) fn new(
        root: &Builder<'_>,
        config: &Config,
        layers: &[Layers],
        together: &Together,
    ) -> Result<Self> {
        let names = Names::of(config.model_type);
        let model = root / names.model;
        let (mut chunks, mut words) = (Vec::new(), None);
        for part in layers {
            let embedding = match part.embeds {
                true => Some(Embedding::new(&model, config, &together.tp, &mut words)?),
                false => None,
            };
            let block = |number: usize| {
                let block = Block::new(&(&model / names.blocks / number), config, together)?;
                Ok(Arc::new(Mutex::new(block)))
            };
            let blocks = part.blocks.clone().map(block).collect::<Result<_>>()?;
            let head = match part.ends {
                true => Some(Head::new((root, &model), config, &together.tp, &mut words)?),
                false => None,
            };
            chunks.push(Chunk { embedding, blocks, head, context: together.context.clone() });
        }
        let tied = words.filter(|_| config.is_tied()).map(|table| table.weight().shallow_clone());
        Ok(Gpt { chunks, tied, recompute: false })
    }

    /// Backward computes each block again, instead of keeping what it needs of it.
    pub(crate) fn recomputing(self, recompute: bool) -> Self {
        Gpt { recompute, ..self }
    }

    /// The name and this rank's copy, if it has one, of the table that is embedding and head, where they may be on two stages.
    pub(crate) fn tied(&self, config: &Config) -> Option<(String, Option<&Tensor>)> {
        let names = Names::of(config.model_type);
        let name = format!("{}.{}.weight", names.model, names.words);
        config.is_tied().then_some((name, self.tied.as_ref()))
    }

    /// What a chunk makes of its input (a batch of which `predicted` tokens have a loss), which is hidden states (`[batch, tokens(/n), width]`), or of the ids (`[batch, tokens]`) where it has the embedding.
    pub(crate) fn hidden(
        &self,
        chunk: usize,
        (ids, input): (&Tensor, Option<Tensor>),
        (pass, predicted): (&Pass, f64),
    ) -> Result<Tensor> {
        let chunk = &self.chunks[chunk];
        let mut x = match (&chunk.embedding, input) {
            (Some(embedding), _) => embedding.forward(&chunk.context.cut(ids)?, pass)?,
            (None, Some(input)) => input,
            (None, None) => return Err(nothing()),
        };
        for block in &chunk.blocks {
            x = match self.recompute && pass.train {
                true => recomputed(block, &x, (*pass, predicted))?,
                false => lock(block).forward(&x, pass, predicted)?,
            };
        }
        match &chunk.head {
            Some(head) => head.norm.forward(&x),
            None => Ok(x),
        }
    }

    /// [`hidden`](Self::hidden) of the next tokens of whole sequences, in evaluation: `before` has what each block of the chunk keeps of those before them.
    pub(crate) fn next_hidden(
        &self,
        chunk: usize,
        (ids, input): (&Tensor, Option<Tensor>),
        (pass, before): (&Pass, &mut Vec<KeyValues>),
    ) -> Result<Tensor> {
        let chunk = &self.chunks[chunk];
        let mut x = match (&chunk.embedding, input) {
            (Some(embedding), _) => embedding.forward(ids, pass)?,
            (None, Some(input)) => input,
            (None, None) => return Err(nothing()),
        };
        before.resize_with(chunk.blocks.len(), KeyValues::default);
        for (block, of_block) in chunk.blocks.iter().zip(before) {
            x = lock(block).forward_next(&x, pass, of_block)?;
        }
        match &chunk.head {
            Some(head) => head.norm.forward(&x),
            None => Ok(x),
        }
    }

    /// Whether the chunk is the model's last.
    pub(crate) fn ends(&self, chunk: usize) -> bool {
        self.chunks[chunk].head.is_some()
    }

    /// The sum of the losses of this rank's tokens, of the last chunk's hidden states and the whole sequences' `labels`.
    pub(crate) fn loss(&self, chunk: usize, hidden: &Tensor, labels: &Tensor) -> Result<Tensor> {
        let chunk = &self.chunks[chunk];
        let Some(head) = &chunk.head else { return Err(nothing()) };
        cross_entropy(hidden, head.table.weight(), &chunk.context.cut(labels)?, &head.tp)
    }

    /// Logits of all words, at all tokens of the whole sequences.
    pub(crate) fn logits(&self, chunk: usize, hidden: &Tensor) -> Result<Tensor> {
        let chunk = &self.chunks[chunk];
        let Some(head) = &chunk.head else { return Err(nothing()) };
        chunk.context.join(&logits(hidden, head.table.weight(), &head.tp)?)
    }
}

/// A block of which only the input is kept for backward.
fn recomputed(
    block: &Arc<Mutex<Block>>,
    x: &Tensor,
    (pass, predicted): (Pass, f64),
) -> Result<Tensor> {
    let block = Arc::clone(block);
    let again = move |input: &Tensor| {
        lock(&block).forward(input, &pass, predicted).map_err(phalanx_ddp_core::Error::closure)
    };
    Ok(checkpointed_one(x, again)?)
}

fn lock(block: &Mutex<Block>) -> std::sync::MutexGuard<'_, Block> {
    block.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The table of words: the one that the rank has already, or a new one.
fn words(
    model: &Builder<'_>,
    config: &Config,
    tp: &TensorParallel,
    table: &mut Option<Rc<VocabEmbedding>>,
) -> Result<Rc<VocabEmbedding>> {
    if let Some(table) = table {
        return Ok(Rc::clone(table));
    }
    let init = Init::Normal { std: config.initializer_range };
    let path = model / Names::of(config.model_type).words;
    let made = VocabEmbedding::new(&path, config.vocab_size, config.hidden_size, init, tp)?;
    Ok(Rc::clone(table.insert(Rc::new(made))))
}

impl Embedding {
    fn new(
        model: &Builder<'_>,
        config: &Config,
        tp: &TensorParallel,
        table: &mut Option<Rc<VocabEmbedding>>,
    ) -> Result<Self> {
        let words = words(model, config, tp, table)?;
        let init = Init::Normal { std: config.initializer_range };
        let positions = match config.model_type {
            Family::Gpt2 => {
                let (count, width) = (config.max_position_embeddings, config.hidden_size);
                Some(PositionEmbedding::new(&(model / "wpe"), count, width, init, tp)?)
            }
            Family::Llama | Family::Mixtral => None,
        };
        let dropout = Dropout::new(config.embd_pdrop, (model / "drop").key())?;
        Ok(Embedding { words, positions, dropout, tp: tp.clone() })
    }

    fn forward(&self, ids: &Tensor, pass: &Pass) -> Result<Tensor> {
        let mut x = self.words.forward(ids)?;
        if let Some(positions) = &self.positions {
            x = x.f_add(&positions.forward(ids.size()[1], pass)?)?;
        }
        self.dropout.forward(&x, pass, self.tp.between_blocks(&x))
    }
}

impl Head {
    fn new(
        (root, model): (&Builder<'_>, &Builder<'_>),
        config: &Config,
        tp: &TensorParallel,
        table: &mut Option<Rc<VocabEmbedding>>,
    ) -> Result<Self> {
        let norm = Norm::new(&(model / Names::of(config.model_type).norm), config, tp)?;
        let table = match config.is_tied() {
            true => words(model, config, tp, table)?,
            false => {
                let init = Init::Normal { std: config.initializer_range };
                let (rows, width) = (config.vocab_size, config.hidden_size);
                Rc::new(VocabEmbedding::new(&(root / "lm_head"), rows, width, init, tp)?)
            }
        };
        Ok(Head { norm, table, tp: tp.clone() })
    }
}

/// Weights that take part in weight decay: all but biases and norms.
pub(crate) fn groups(rule: Rule) -> ParameterGroups {
    let no_decay = ["*.bias", "*ln_1.weight", "*ln_2.weight", "*ln_f.weight", "*norm.weight"];
    let no_decay = ParameterGroup::matching(no_decay).weight_decay(0.0);
    // The norm of a bias says nothing of how far it may move.
    let no_decay = if rule == Rule::Lars { no_decay.without_trust_ratio() } else { no_decay };
    ParameterGroups::default().with(no_decay)
}
