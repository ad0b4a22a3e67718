//! A block of any family: attention and feed-forward, which may be a mixture of experts, each behind a norm and added to what came in.

use phalanx_model_parallel::expert::{
    mixtral_expert, with_loss, ExpertOptions, ExpertParallel, Mixture, MixtureOfExperts,
};
use phalanx_model_parallel::layer::{Builder, Init, Pass};
use phalanx_model_parallel::tensor::{
    Attention, AttentionOptions, ColumnLinear, Dropout, Gelu, KeyValues, LinearOptions, Mlp,
    Projections, RowLinear, SwiGlu, TensorParallel,
};
use phalanx_model_parallel::Result;
use tch::Tensor;

use super::config::{Experts, Family, Model as Config};
use super::context::Context;
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
    Experts(Balanced),
}

/// Experts that are kept equally busy.
#[derive(Debug)]
struct Balanced {
    layer: MixtureOfExperts,
    /// What the layer's balance loss is multiplied by: the losses of all layers are a mean.
    coefficient: f64,
    context: Context,
}

impl Balanced {
    /// A batch of which `predicted` tokens have a loss: a mean over them and the balance are one loss then, as in transformers, but each layer has its own balance.
    fn forward(&self, x: &Tensor, pass: &Pass, predicted: f64) -> Result<Tensor> {
        let Mixture { output, routing, .. } = self.layer.forward(x)?;
        if !pass.train || self.coefficient <= 0.0 {
            return Ok(output);
        }
        let balance = match self.context.group() {
            Some(group) => routing.balance_loss_over(group)?,
            None => routing.balance_loss()?,
        };
        let balance = balance.f_mul_scalar(self.coefficient * predicted)?;
        Ok(with_loss(&output, &balance)?)
    }
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
            Family::Mixtral => {
                ["input_layernorm", "self_attn", "post_attention_layernorm", "block_sparse_moe"]
            }
        };
        let dropout = |name: &str| Dropout::new(config.resid_pdrop, (at / name / "drop").key());
        let dropout = [dropout(names[1])?, dropout(names[3])?];
        let before_attention = Norm::new(&(at / names[0]), config, tp)?;
        let attention = attention(&(at / names[1]), config, &make)?;
        let attention = together.context.attention(attention, &(at / names[1]))?;
        let before_inner = Norm::new(&(at / names[2]), config, tp)?;
        let inner = inner(&(at / names[3]), (config, together), &make)?;
        Ok(Block { before_attention, attention, before_inner, inner, dropout, tp: tp.clone() })
    }

    /// `[batch, tokens(/n), width]`, both ways. `predicted` is how many tokens of the batch's whole sequences have a loss.
    pub(super) fn forward(&self, x: &Tensor, pass: &Pass, predicted: f64) -> Result<Tensor> {
        let y = self.attention.forward(&self.before_attention.forward(x)?, pass)?;
        self.behind_attention((x, &y), pass, predicted)
    }

    /// The same of tokens behind those of which `before` has keys and values.
    pub(super) fn forward_next(
        &self,
        x: &Tensor,
        pass: &Pass,
        before: &mut KeyValues,
    ) -> Result<Tensor> {
        let y = self.attention.forward_next(&self.before_attention.forward(x)?, pass, before)?;
        self.behind_attention((x, &y), pass, 0.0)
    }

    fn behind_attention(
        &self,
        (x, y): (&Tensor, &Tensor),
        pass: &Pass,
        predicted: f64,
    ) -> Result<Tensor> {
        let place = self.tp.between_blocks(x);
        let x = &x.f_add(&self.dropout[0].forward(y, pass, place)?)?;
        let z = self.before_inner.forward(x)?;
        let z = match &self.inner {
            Inner::Mlp(inner) => inner.forward(&z)?,
            Inner::SwiGlu(inner) => inner.forward(&z)?,
            Inner::Experts(inner) => inner.forward(&z, pass, predicted)?,
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
        rotary: (config.model_type != Family::Gpt2).then(|| config.theta()),
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
        Family::Llama | Family::Mixtral => {
            let queries = make.of_heads(&(at / "q_proj"), heads)?;
            let keys = make.of_heads(&(at / "k_proj"), kv_heads)?;
            let values = make.of_heads(&(at / "v_proj"), kv_heads)?;
            (Projections::Separate { queries, keys, values }, "o_proj")
        }
    };
    Attention::new(projections, make.row(&(at / out), heads * head_dim)?, options)
}

fn inner(
    at: &Builder<'_>,
    (config, together): (&Config, &Together),
    make: &Make<'_>,
) -> Result<Inner> {
    if let Some(experts) = config.experts() {
        return Ok(Inner::Experts(balanced(at, (config, experts), together)?));
    }
    let inner = config.inner();
    Ok(match config.model_type {
        Family::Gpt2 => {
            let up = make.column(&(at / "c_fc"), inner)?;
            Inner::Mlp(Mlp::new(up, make.row(&(at / "c_proj"), inner)?, Gelu::Tanh)?)
        }
        Family::Llama | Family::Mixtral => {
            let gate = make.column(&(at / "gate_proj"), inner)?;
            let up = make.column(&(at / "up_proj"), inner)?;
            Inner::SwiGlu(SwiGlu::new(gate, up, make.row(&(at / "down_proj"), inner)?)?)
        }
    })
}

fn balanced(
    at: &Builder<'_>,
    (config, experts): (&Config, Experts),
    together: &Together,
) -> Result<Balanced> {
    let Experts { count, top_k, balance } = experts;
    let init = Init::Normal { std: config.initializer_range };
    let options = ExpertOptions { top_k, init, ..ExpertOptions::mixtral(count) };
    let parallel = match &together.experts {
        Some(parallel) => parallel.clone(),
        None => ExpertParallel { tp: together.tp.clone(), ..ExpertParallel::alone()? },
    };
    let (tp, sizes) = (parallel.of_experts(), (config.hidden_size, config.inner()));
    let layer =
        MixtureOfExperts::new(at, config.hidden_size, options, &parallel, |builder, _number| {
            mixtral_expert(builder, sizes, init, &tp)
        })?;
    let layers = u32::try_from(config.num_hidden_layers).unwrap_or(u32::MAX);
    let coefficient = balance / f64::from(layers);
    Ok(Balanced { layer, coefficient, context: together.context.clone() })
}
