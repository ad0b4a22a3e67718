//! A block of either family: attention and feed-forward, each behind a norm and added to what came in.

use phalanx_model_parallel::layer::{Builder, Init, Pass};
use phalanx_model_parallel::tensor::{
    Attention, AttentionOptions, ColumnLinear, Dropout, Gelu, LinearOptions, Mlp, Projections,
    RowLinear, SwiGlu, TensorParallel,
};
use phalanx_model_parallel::Result;
use tch::Tensor;

use super::config::{Family, Model as Config};
use super::model::{Norm, Together};

#[derive(Debug)]
pub(super) struct Block {
    before_attention: Norm,
    attention: Attention,
    before_inner: Norm,
    inner: Inner,
    dropout: [Dropout; 2],
    tp: TensorParallel,
}

/// The feed-forward part.
#[derive(Debug)]
enum Inner {
    Mlp(Mlp),
    SwiGlu(SwiGlu),
}

/// How the products of a block are made.
struct Make<'a> {
    config: &'a Config,
    tp: &'a TensorParallel,
}

impl Make<'_> {
    fn options(&self) -> LinearOptions {
        let is_gpt2 = self.config.model_type == Family::Gpt2;
        let init = Init::Normal { std: self.config.initializer_range };
        LinearOptions { bias: is_gpt2, transposed: is_gpt2, init, ..LinearOptions::default() }
    }

    fn column(&self, at: &Builder<'_>, outputs: i64) -> Result<ColumnLinear> {
        ColumnLinear::new(at, self.config.hidden_size, outputs, self.options(), self.tp)
    }

    /// A product of `heads`, none of which is cut.
    fn of_heads(&self, at: &Builder<'_>, heads: i64) -> Result<ColumnLinear> {
        let unit = self.config.head_dim();
        let options = LinearOptions { unit, ..self.options() };
        ColumnLinear::new(at, self.config.hidden_size, heads * unit, options, self.tp)
    }

    /// A product into the residual stream. GPT-2's begin smaller, the more of them add up.
    fn row(&self, at: &Builder<'_>, inputs: i64) -> Result<RowLinear> {
        let Config { initializer_range: std, num_hidden_layers: layers, hidden_size, .. } =
            *self.config;
        let mut options = self.options();
        if self.config.model_type == Family::Gpt2 {
            let layers = u32::try_from(layers).unwrap_or(u32::MAX);
            options.init = Init::Normal { std: std / (2.0 * f64::from(layers)).sqrt() };
        }
        RowLinear::new(at, inputs, hidden_size, options, self.tp)
    }
}

impl Block {
    /// Variables under `at`, in the order of the forward pass.
    pub(super) fn new(at: &Builder<'_>, config: &Config, together: &Together) -> Result<Self> {
        let tp = &together.tp;
        let make = Make { config, tp };
        let names = match config.model_type {
            Family::Gpt2 => ["ln_1", "attn", "ln_2", "mlp"],
            Family::Llama => ["input_layernorm", "self_attn", "post_attention_layernorm", "mlp"],
        };
        let dropout = |name: &str| Dropout::new(config.resid_pdrop, (at / name / "drop").key());
        let dropout = [dropout(names[1])?, dropout(names[3])?];
        let before_attention = Norm::new(&(at / names[0]), config, tp)?;
        let attention = attention(&(at / names[1]), config, &make)?;
        let attention = together.context.attention(attention, &(at / names[1]));
        let before_inner = Norm::new(&(at / names[2]), config, tp)?;
        let inner = inner(&(at / names[3]), config, &make)?;
        Ok(Block { before_attention, attention, before_inner, inner, dropout, tp: tp.clone() })
    }

    /// `[batch, tokens(/n), width]`, both ways.
    pub(super) fn forward(&self, x: &Tensor, pass: &Pass) -> Result<Tensor> {
        let place = self.tp.between_blocks(x);
        let y = self.attention.forward(&self.before_attention.forward(x)?, pass)?;
        let x = &x.f_add(&self.dropout[0].forward(&y, pass, place)?)?;
        let z = self.before_inner.forward(x)?;
        let z = match &self.inner {
            Inner::Mlp(inner) => inner.forward(&z)?,
            Inner::SwiGlu(inner) => inner.forward(&z)?,
        };
        Ok(x.f_add(&self.dropout[1].forward(&z, pass, place)?)?)
    }
}

fn attention(at: &Builder<'_>, config: &Config, make: &Make<'_>) -> Result<Attention> {
    let (heads, kv_heads, head_dim) =
        (config.num_attention_heads, config.kv_heads(), config.head_dim());
    let options = AttentionOptions {
        kv_heads,
        head_dim,
        rotary: (config.model_type == Family::Llama).then(|| config.theta()),
        dropout: config.attn_pdrop,
        key: at.key(),
        ..AttentionOptions::new(config.hidden_size, heads)
    };
    let (projections, out) = match config.model_type {
        Family::Gpt2 => {
            let parts = options.parts();
            let outputs = parts.iter().sum();
            let all = LinearOptions { parts, unit: head_dim, ..make.options() };
            let width = config.hidden_size;
            let all = ColumnLinear::new(&(at / "c_attn"), width, outputs, all, make.tp)?;
            (Projections::Fused(all), "c_proj")
        }
        Family::Llama => {
            let queries = make.of_heads(&(at / "q_proj"), heads)?;
            let keys = make.of_heads(&(at / "k_proj"), kv_heads)?;
            let values = make.of_heads(&(at / "v_proj"), kv_heads)?;
            (Projections::Separate { queries, keys, values }, "o_proj")
        }
    };
    Attention::new(projections, make.row(&(at / out), heads * head_dim)?, options)
}

fn inner(at: &Builder<'_>, config: &Config, make: &Make<'_>) -> Result<Inner> {
    let inner = config.inner();
    Ok(match config.model_type {
        Family::Gpt2 => {
            let up = make.column(&(at / "c_fc"), inner)?;
            Inner::Mlp(Mlp::new(up, make.row(&(at / "c_proj"), inner)?, Gelu::Tanh)?)
        }
        Family::Llama => {
            let gate = make.column(&(at / "gate_proj"), inner)?;
            let up = make.column(&(at / "up_proj"), inner)?;
            Inner::SwiGlu(SwiGlu::new(gate, up, make.row(&(at / "down_proj"), inner)?)?)
        }
    })
}
