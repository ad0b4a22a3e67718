//! A GPT-2 and a Llama of two blocks, of the layers under test.

use phalanx_model_parallel::layer::{Builder, Init, Pass};
use phalanx_model_parallel::tensor::{
    cross_entropy, logits, Attention, AttentionOptions, ColumnLinear, Dropout, Gelu, LayerNorm,
    LinearOptions, Mlp, PositionEmbedding, Projections, RmsNorm, RowLinear, SwiGlu, TensorParallel,
    VocabEmbedding,
};
use phalanx_model_parallel::Result;
use tch::Tensor;

pub(crate) const WIDTH: i64 = 24;
pub(crate) const INNER: i64 = 36;
pub(crate) const HEADS: i64 = 12;
/// No number of ranks divides it.
pub(crate) const VOCABULARY: i64 = 37;
pub(crate) const TOKENS: i64 = 12;
pub(crate) const EPS: f64 = 1e-5;
pub(crate) const THETA: f64 = 100.0;
const INIT: Init = Init::Normal { std: 0.02 };

/// Which model.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Kind {
    /// Layer norms, biases, fused and transposed products, tied head.
    Gpt,
    /// RMS norms, grouped queries, rotary positions, a head of its own.
    Llama { kv_heads: i64 },
}

enum Norm {
    Layer(LayerNorm),
    Rms(RmsNorm),
}

impl Norm {
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        match self {
            Self::Layer(norm) => norm.forward(x),
            Self::Rms(norm) => norm.forward(x),
        }
    }
}

enum Inner {
    Mlp(Mlp),
    SwiGlu(SwiGlu),
}

pub(crate) struct Block {
    norms: [Norm; 2],
    attention: Attention,
    inner: Inner,
    dropout: [Dropout; 2],
    tp: TensorParallel,
}

impl Block {
    fn new(h: &Builder<'_>, kind: Kind, p: f64, tp: &TensorParallel) -> Result<Self> {
        let drop = |name: &str| Dropout::new(p, (h / name).key());
        let dropout = [drop("drop_1")?, drop("drop_2")?];
        let tp = tp.clone();
        let mut options = AttentionOptions::new(WIDTH, HEADS);
        options.dropout = p;
        options.key = (h / "attn").key();
        let linear = |bias, transposed| LinearOptions { bias, transposed, ..Default::default() };
        let row = |name: &str, inputs, bias| {
            RowLinear::new(&(h / name), inputs, WIDTH, linear(bias, bias), &tp)
        };
        let column = |name: &str, outputs, options| {
            ColumnLinear::new(&(h / name), WIDTH, outputs, options, &tp)
        };
        match kind {
            Kind::Gpt => {
                let norm =
                    |name: &str| LayerNorm::new(&(h / name), WIDTH, EPS, &tp).map(Norm::Layer);
                let parts = options.parts();
                let all = LinearOptions { parts, unit: options.head_dim, ..linear(true, true) };
                let all = Projections::Fused(column("c_attn", 3 * WIDTH, all)?);
                let attention = Attention::new(all, row("attn_out", WIDTH, true)?, options)?;
                let up = column("c_fc", INNER, linear(true, true))?;
                let inner = Inner::Mlp(Mlp::new(up, row("c_proj", INNER, true)?, Gelu::Tanh)?);
                Ok(Self { norms: [norm("ln_1")?, norm("ln_2")?], attention, inner, dropout, tp })
            }
            Kind::Llama { kv_heads } => {
                let norm = |name: &str| RmsNorm::new(&(h / name), WIDTH, EPS, &tp).map(Norm::Rms);
                options = AttentionOptions { kv_heads, rotary: Some(THETA), ..options };
                let unit = options.head_dim;
                let of_heads = |name, heads| {
                    column(name, heads * unit, LinearOptions { unit, ..linear(false, false) })
                };
                let all = Projections::Separate {
                    queries: of_heads("q", HEADS)?,
                    keys: of_heads("k", kv_heads)?,
                    values: of_heads("v", kv_heads)?,
                };
                let attention = Attention::new(all, row("o", WIDTH, false)?, options)?;
                let [gate, up] =
                    ["gate", "up"].map(|name| column(name, INNER, linear(false, false)));
                let inner = SwiGlu::new(gate?, up?, row("down", INNER, false)?)?;
                let norms = [norm("ln_1")?, norm("ln_2")?];
                Ok(Self { norms, attention, inner: Inner::SwiGlu(inner), dropout, tp })
            }
        }
    }

    pub(crate) fn forward(&self, x: &Tensor, pass: &Pass) -> Result<Tensor> {
        let place = self.tp.between_blocks(x);
        let y = self.attention.forward(&self.norms[0].forward(x)?, pass)?;
        let x = x + self.dropout[0].forward(&y, pass, place)?;
        let y = self.norms[1].forward(&x)?;
        let y = match &self.inner {
            Inner::Mlp(inner) => inner.forward(&y)?,
            Inner::SwiGlu(inner) => inner.forward(&y)?,
        };
        Ok(&x + self.dropout[1].forward(&y, pass, place)?)
    }
}

pub(crate) struct Model {
    words: VocabEmbedding,
    positions: Option<PositionEmbedding>,
    dropout: Dropout,
    pub(crate) blocks: Vec<Block>,
    last: Norm,
    head: Option<VocabEmbedding>,
    tp: TensorParallel,
}

impl Model {
    pub(crate) fn new(root: &Builder<'_>, kind: Kind, p: f64, tp: &TensorParallel) -> Result<Self> {
        let last = root / "ln_f";
        let table = |name: &str| VocabEmbedding::new(&(root / name), VOCABULARY, WIDTH, INIT, tp);
        let (positions, last, head) = match kind {
            Kind::Gpt => (
                Some(PositionEmbedding::new(&(root / "wpe"), TOKENS + 3, WIDTH, INIT, tp)?),
                Norm::Layer(LayerNorm::new(&last, WIDTH, EPS, tp)?),
                None,
            ),
            Kind::Llama { .. } => {
                (None, Norm::Rms(RmsNorm::new(&last, WIDTH, EPS, tp)?), Some(table("head")?))
            }
        };
        let block = |at: usize| Block::new(&(root / "h" / at), kind, p, tp);
        let blocks = (0..2).map(block).collect::<Result<_>>()?;
        let dropout = Dropout::new(p, (root / "drop").key())?;
        Ok(Self { words: table("wte")?, positions, dropout, blocks, last, head, tp: tp.clone() })
    }

    pub(crate) fn embedded(&self, ids: &Tensor, pass: &Pass) -> Result<Tensor> {
        let mut x = self.words.forward(ids)?;
        if let Some(positions) = &self.positions {
            x += positions.forward(ids.size()[1], pass)?;
        }
        self.dropout.forward(&x, pass, self.tp.between_blocks(&x))
    }

    pub(crate) fn hidden(&self, ids: &Tensor, pass: &Pass) -> Result<Tensor> {
        let mut x = self.embedded(ids, pass)?;
        for block in &self.blocks {
            x = block.forward(&x, pass)?;
        }
        self.last.forward(&x)
    }

    pub(crate) fn loss(&self, hidden: &Tensor, targets: &Tensor) -> Result<Tensor> {
        cross_entropy(hidden, self.table(), targets, &self.tp)
    }

    pub(crate) fn logits(&self, hidden: &Tensor) -> Result<Tensor> {
        logits(hidden, self.table(), &self.tp)
    }

    pub(crate) fn last(&self, x: &Tensor) -> Result<Tensor> {
        self.last.forward(x)
    }

    fn table(&self) -> &Tensor {
        self.head.as_ref().unwrap_or(&self.words).weight()
    }
}
