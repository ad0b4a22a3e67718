//! BERT for masked language modelling.
//!
//! Post-layer-norm encoder, exact GELU, a prediction head whose decoder is the word embedding
//! itself. Variables carry the names of Hugging Face's `BertForMaskedLM`, so that its
//! `model.safetensors` loads here and ours loads there; they are registered in the order of the
//! forward pass, so that backward fills the last bucket first.
//!
//! Logits are computed at the masked positions alone: about one row in seven, which at a vocabulary
//! of 30 522 is most of the head's memory and time.
//!
//! Source: Devlin et al., "BERT: Pre-training of Deep Bidirectional Transformers" (2018);
//! `transformers/models/bert/modeling_bert.py`.

use anyhow::{Context as _, Result};
use phalanx_ddp_core::optim::{ParameterGroup, ParameterGroups};
use phalanx_ddp_core::recompute::checkpointed;
use phalanx_ddp_core::Error;
use tch::nn::{self, Path};
use tch::{Kind, Reduction, TchError, Tensor};

use super::config::{Model as Config, Rule};

/// Label of a position that is not to be predicted, as PyTorch's cross-entropy has it.
pub(crate) const IGNORED: i64 = -100;

/// Where the first values of the weights come from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Start {
    /// Drawn from a normal distribution by the generator that `tch::manual_seed` set.
    Random,
    /// Left as the allocator gives them: somebody overwrites all of them (rank 0's broadcast, or a
    /// file).
    Unset,
}

/// What one forward pass is asked for.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Pass {
    /// Dropout is on.
    pub(crate) train: bool,
    /// The type that matrix products run in; the caller opens the autocast region for any but
    /// `Kind::Float`.
    pub(crate) kind: Kind,
}

/// Token ids and what to predict, both `[samples, length]`.
#[derive(Debug)]
pub(crate) struct Inputs<'a> {
    /// i64 ids below the vocabulary size.
    pub(crate) ids: &'a Tensor,
    /// i64 labels, `IGNORED` where nothing is predicted.
    pub(crate) labels: &'a Tensor,
    /// 1 where a token stands, 0 where there is padding; none when there is no padding.
    pub(crate) attention_mask: Option<&'a Tensor>,
}

/// The sum of the losses over the masked positions, and how many there were.
#[derive(Debug)]
pub(crate) struct LossSum {
    /// A scalar in f32.
    pub(crate) loss: Tensor,
    /// Predicted positions.
    pub(crate) masked_count: i64,
}

/// The whole network.
#[derive(Debug)]
pub(crate) struct BertForMaskedLm {
    embeddings: Embeddings,
    layers: Vec<Layer>,
    head: Head,
    /// Whether backward computes each layer again instead of keeping what it needs of it.
    recompute: bool,
}

impl BertForMaskedLm {
    /// Registers every variable under `root`.
    pub(crate) fn new(root: &Path<'_>, config: &Config, start: Start) -> Result<Self, TchError> {
        let make = Make { deviation: config.initializer_range, eps: config.layer_norm_eps, start };
        let bert = root / "bert";
        let embeddings = Embeddings::new(&(&bert / "embeddings"), config, make)?;
        let layers = (0..config.num_hidden_layers)
            .map(|index| Layer::new(&(&bert / "encoder" / "layer" / index), config, make))
            .collect::<Result<_, _>>()?;
        let head = Head::new(&(root / "cls" / "predictions"), config, make)?;
        Ok(BertForMaskedLm { embeddings, layers, head, recompute: false })
    }

    /// Backward computes each layer again, instead of keeping what it needs of it.
    pub(crate) fn recomputing(self, recompute: bool) -> Self {
        BertForMaskedLm { recompute, ..self }
    }

    /// Loss over the masked positions of one micro-batch.
    pub(crate) fn loss(&self, inputs: &Inputs<'_>, pass: Pass) -> Result<LossSum, Error> {
        let mask = inputs.attention_mask.map(visible).transpose()?;
        let mut hidden = self.embeddings.forward(inputs.ids, pass)?;
        for layer in &self.layers {
            hidden = match self.recompute {
                true => recomputed(layer, &hidden, mask.as_ref(), pass)?,
                false => layer.forward(&hidden, mask.as_ref(), pass)?,
            };
        }
        let labels = inputs.labels.f_reshape([-1])?;
        let positions = labels.f_ne(IGNORED)?.f_nonzero()?.f_squeeze_dim(1)?;
        let width = self.head.dense.weight.size()[1];
        let hidden = hidden.f_reshape([-1, width])?.f_index_select(0, &positions)?;
        let logits = self.head.forward(&hidden, &self.embeddings.word, pass)?;
        let targets = labels.f_index_select(0, &positions)?;
        let loss = logits.f_to_kind(Kind::Float)?.f_cross_entropy_loss::<Tensor>(
            &targets,
            None,
            Reduction::Sum,
            IGNORED,
            0.0,
        )?;
        Ok(LossSum { loss, masked_count: positions.size()[0] })
    }
}

/// A layer of which only the input is kept for backward.
fn recomputed(
    layer: &Layer,
    hidden: &Tensor,
    mask: Option<&Tensor>,
    pass: Pass,
) -> Result<Tensor, Error> {
    // The closure outlives this call: it has names of its own for the layer's weights.
    let layer = layer.shallow_clone();
    let inputs: Vec<&Tensor> = std::iter::once(hidden).chain(mask).collect();
    let forward = move |given: &[Tensor]| Ok(vec![layer.forward(&given[0], given.get(1), pass)?]);
    checkpointed(&inputs, forward).map(|mut outputs| outputs.remove(0))
}

/// Weights that take part in weight decay: all but biases and layer norms, as BERT was trained.
pub(crate) fn groups(rule: Rule) -> ParameterGroups {
    let no_decay = ParameterGroup::matching(["*.bias", "*LayerNorm*"]).weight_decay(0.0);
    // The norm of a bias says nothing of how far it may move.
    let no_decay = if rule == Rule::Lars { no_decay.without_trust_ratio() } else { no_decay };
    ParameterGroups::default().with(no_decay)
}

/// Seeds the generator and says which process draws: every other one gets rank 0's values by
/// broadcast.
pub(crate) fn build(
    vs: &nn::VarStore,
    config: &Config,
    seed: u64,
    rank: usize,
) -> Result<BertForMaskedLm> {
    tch::manual_seed(seed.cast_signed());
    let start = if rank == 0 { Start::Random } else { Start::Unset };
    BertForMaskedLm::new(&vs.root(), config, start).context("building the model")
}

/// `[samples, length]` of ones and zeros as the boolean `[samples, 1, 1, length]` that attention
/// broadcasts.
fn visible(mask: &Tensor) -> Result<Tensor, TchError> {
    mask.f_ne(0)?.f_unsqueeze(1)?.f_unsqueeze(1)
}

/// How variables are made.
#[derive(Debug, Clone, Copy)]
struct Make {
    deviation: f64,
    eps: f64,
    start: Start,
}

impl Make {
    fn normal(self, path: &Path<'_>, name: &str, shape: &[i64]) -> Result<Tensor, TchError> {
        let mut values = Tensor::f_empty(shape, (Kind::Float, path.device()))?;
        if self.start == Start::Random {
            drop(values.f_normal_(0.0, self.deviation)?);
        }
        Ok(path.add(name, values, true))
    }

    fn constant(
        self,
        path: &Path<'_>,
        name: &str,
        len: i64,
        value: f64,
    ) -> Result<Tensor, TchError> {
        let values = Tensor::f_full([len], value, (Kind::Float, path.device()))?;
        Ok(path.add(name, values, true))
    }

    fn linear(self, path: &Path<'_>, input: i64, output: i64) -> Result<Linear, TchError> {
        let weight = self.normal(path, "weight", &[output, input])?;
        Ok(Linear { weight, bias: self.constant(path, "bias", output, 0.0)? })
    }

    fn layer_norm(self, path: &Path<'_>, width: i64) -> Result<LayerNorm, TchError> {
        let weight = self.constant(path, "weight", width, 1.0)?;
        Ok(LayerNorm { weight, bias: self.constant(path, "bias", width, 0.0)?, eps: self.eps })
    }
}

#[derive(Debug)]
struct Linear {
    weight: Tensor,
    bias: Tensor,
}

impl Linear {
    fn shallow_clone(&self) -> Self {
        Linear { weight: self.weight.shallow_clone(), bias: self.bias.shallow_clone() }
    }

    fn forward(&self, input: &Tensor) -> Result<Tensor, TchError> {
        input.f_linear(&self.weight, Some(&self.bias))
    }
}

#[derive(Debug)]
struct LayerNorm {
    weight: Tensor,
    bias: Tensor,
    eps: f64,
}

impl LayerNorm {
    fn shallow_clone(&self) -> Self {
        let (weight, bias) = (self.weight.shallow_clone(), self.bias.shallow_clone());
        LayerNorm { weight, bias, eps: self.eps }
    }

    fn forward(&self, input: &Tensor) -> Result<Tensor, TchError> {
        input.f_layer_norm(self.bias.size(), Some(&self.weight), Some(&self.bias), self.eps, false)
    }
}

/// Dropout that keeps one byte an element for backward (`at::dropout` on the CPU keeps the scaled
/// noise: four).
fn dropout(input: Tensor, probability: f64, pass: Pass) -> Result<Tensor, TchError> {
    if pass.train && probability > 0.0 {
        Ok(input.f_native_dropout(probability, true)?.0)
    } else {
        Ok(input)
    }
}

#[derive(Debug)]
struct Embeddings {
    word: Tensor,
    position: Tensor,
    token_type: Tensor,
    norm: LayerNorm,
    padding_index: i64,
    dropout: f64,
}

impl Embeddings {
    fn new(path: &Path<'_>, config: &Config, make: Make) -> Result<Self, TchError> {
        let table =
            |name: &str, rows| make.normal(&(path / name), "weight", &[rows, config.hidden_size]);
        let word = table("word_embeddings", config.vocab_size)?;
        if let (Start::Random, Some(padding)) = (make.start, config.pad_token_id) {
            drop(tch::no_grad(|| word.f_select(0, padding)?.f_zero_())?);
        }
        Ok(Embeddings {
            word,
            position: table("position_embeddings", config.max_position_embeddings)?,
            token_type: table("token_type_embeddings", config.type_vocab_size)?,
            norm: make.layer_norm(&(path / "LayerNorm"), config.hidden_size)?,
            padding_index: config.pad_token_id.unwrap_or(-1),
            dropout: config.hidden_dropout_prob,
        })
    }

    /// All tokens are of type 0: one sentence, or one run of sentences.
    fn forward(&self, ids: &Tensor, pass: Pass) -> Result<Tensor, TchError> {
        let length = ids.size()[1];
        let sum = Tensor::f_embedding(&self.word, ids, self.padding_index, false, false)?
            .f_add(&self.token_type.f_select(0, 0)?)?
            .f_add(&self.position.f_narrow(0, 0, length)?)?;
        dropout(self.norm.forward(&sum)?, self.dropout, pass)
    }
}

#[derive(Debug)]
struct Layer {
    query: Linear,
    key: Linear,
    value: Linear,
    attention_dense: Linear,
    attention_norm: LayerNorm,
    intermediate: Linear,
    output_dense: Linear,
    output_norm: LayerNorm,
    head_count: i64,
    hidden_dropout: f64,
    attention_dropout: f64,
}

impl Layer {
    fn new(path: &Path<'_>, config: &Config, make: Make) -> Result<Self, TchError> {
        let (width, inner) = (config.hidden_size, config.intermediate_size);
        let attention = path / "attention";
        let (inputs, output) = (&attention / "self", &attention / "output");
        Ok(Layer {
            query: make.linear(&(&inputs / "query"), width, width)?,
            key: make.linear(&(&inputs / "key"), width, width)?,
            value: make.linear(&(&inputs / "value"), width, width)?,
            attention_dense: make.linear(&(&output / "dense"), width, width)?,
            attention_norm: make.layer_norm(&(&output / "LayerNorm"), width)?,
            intermediate: make.linear(&(path / "intermediate" / "dense"), width, inner)?,
            output_dense: make.linear(&(path / "output" / "dense"), inner, width)?,
            output_norm: make.layer_norm(&(path / "output" / "LayerNorm"), width)?,
            head_count: config.num_attention_heads,
            hidden_dropout: config.hidden_dropout_prob,
            attention_dropout: config.attention_probs_dropout_prob,
        })
    }

    /// The same weights under other names.
    fn shallow_clone(&self) -> Self {
        Layer {
            query: self.query.shallow_clone(),
            key: self.key.shallow_clone(),
            value: self.value.shallow_clone(),
            attention_dense: self.attention_dense.shallow_clone(),
            attention_norm: self.attention_norm.shallow_clone(),
            intermediate: self.intermediate.shallow_clone(),
            output_dense: self.output_dense.shallow_clone(),
            output_norm: self.output_norm.shallow_clone(),
            ..*self
        }
    }

    fn forward(
        &self,
        hidden: &Tensor,
        mask: Option<&Tensor>,
        pass: Pass,
    ) -> Result<Tensor, TchError> {
        let attended = self.attention_dense.forward(&self.attend(hidden, mask, pass)?)?;
        let attended = dropout(attended, self.hidden_dropout, pass)?;
        let hidden = self.attention_norm.forward(&attended.f_add(hidden)?)?;
        let inner = self.intermediate.forward(&hidden)?.f_gelu("none")?;
        let output = dropout(self.output_dense.forward(&inner)?, self.hidden_dropout, pass)?;
        self.output_norm.forward(&output.f_add(&hidden)?)
    }

    fn attend(
        &self,
        hidden: &Tensor,
        mask: Option<&Tensor>,
        pass: Pass,
    ) -> Result<Tensor, TchError> {
        // Cast once: autocast would cast the activations, and keep them for backward, once for each
        // of the three.
        let hidden = hidden.f_to_kind(pass.kind)?;
        let (samples, length, width) = hidden.size3()?;
        let heads = |projection: &Linear| {
            projection
                .forward(&hidden)?
                .f_view([samples, length, self.head_count, width / self.head_count])?
                .f_transpose(1, 2)
        };
        let probability = if pass.train { self.attention_dropout } else { 0.0 };
        Tensor::f_scaled_dot_product_attention(
            &heads(&self.query)?,
            &heads(&self.key)?,
            &heads(&self.value)?,
            mask,
            probability,
            false,
            None,
            false,
        )?
        .f_transpose(1, 2)?
        .f_reshape([samples, length, width])
    }
}

/// `cls.predictions`: dense, GELU, layer norm, then the word embedding as decoder with a bias of
/// its own.
#[derive(Debug)]
struct Head {
    dense: Linear,
    norm: LayerNorm,
    bias: Tensor,
}

impl Head {
    fn new(path: &Path<'_>, config: &Config, make: Make) -> Result<Self, TchError> {
        let transform = path / "transform";
        Ok(Head {
            dense: make.linear(&(&transform / "dense"), config.hidden_size, config.hidden_size)?,
            norm: make.layer_norm(&(&transform / "LayerNorm"), config.hidden_size)?,
            bias: make.constant(path, "bias", config.vocab_size, 0.0)?,
        })
    }

    fn forward(&self, hidden: &Tensor, word: &Tensor, _pass: Pass) -> Result<Tensor, TchError> {
        let transformed = self.norm.forward(&self.dense.forward(hidden)?.f_gelu("none")?)?;
        transformed.f_linear(word, Some(&self.bias))
    }
}
