//! Attention whose heads are cut over the ranks.

mod kept;
mod options;
mod plain;
mod rotary;

use tch::Tensor;

use super::column::ColumnLinear;
use super::cut;
use super::dropout::Dropout;
use super::parallel::TensorParallel;
use super::row::RowLinear;
use crate::error::{Error, Result};
use crate::layer::Pass;
pub use kept::KeyValues;
pub use options::AttentionOptions;
pub use plain::AttentionDropout;
use plain::Plain;
use rotary::Rotary;

/// The products that make queries, keys and values.
#[derive(Debug)]
#[expect(clippy::large_enum_variant, reason = "one for each attention")]
pub enum Projections {
    /// One matrix with the three side by side ([`LinearOptions::parts`](super::LinearOptions::parts)): GPT-2's.
    Fused(ColumnLinear),
    /// One each: Llama's.
    Separate {
        /// Of the queries.
        queries: ColumnLinear,
        /// Of the keys.
        keys: ColumnLinear,
        /// Of the values.
        values: ColumnLinear,
    },
}

/// How queries meet keys and values: what context parallelism puts in the place of the attention of one rank's tokens.
pub trait Attend: std::fmt::Debug + Send {
    /// Whether a token attends to itself and those before it alone.
    fn is_causal(&self) -> bool;

    /// What it drops of probabilities.
    fn dropout(&self) -> Option<AttentionDropout>;

    /// The output `[batch, heads, tokens, head_dim]` of queries of that shape, and keys and values `[batch, kv_heads, tokens, head_dim]`: each of them is of `heads / kv_heads` consecutive queries'
    /// heads. Positions are already in them. The heads are this rank's of tensor parallelism.
    ///
    /// # Errors
    /// Its own.
    fn attend(
        &self,
        queries: &Tensor,
        keys: &Tensor,
        values: &Tensor,
        pass: &Pass,
    ) -> Result<Tensor>;
}

/// Attention of several heads (Vaswani et al. 2017), with fewer heads of keys and values if wanted (Ainslie et al. 2023), causal or not, with rotary positions or
/// none.
///
/// # Example
/// ```
/// use phalanx_model_parallel::layer::{Builder, Pass};
/// use phalanx_model_parallel::tensor::{
///     Attention, AttentionOptions, ColumnLinear, LinearOptions, Projections, RowLinear, TensorParallel,
/// };
/// use tch::{nn, Device, Kind, Tensor};
///
/// let vs = nn::VarStore::new(Device::Cpu);
/// let attn = Builder::new(vs.root(), 1) / "attn";
/// let tp = TensorParallel::alone()?;
/// let options = AttentionOptions::new(64, 4);
/// let qkv = LinearOptions { parts: options.parts(), unit: options.head_dim, ..Default::default() };
/// let qkv = ColumnLinear::new(&(&attn / "c_attn"), 64, 192, qkv, &tp)?;
/// let out = RowLinear::new(&(&attn / "c_proj"), 64, 64, LinearOptions::default(), &tp)?;
/// let attention = Attention::new(Projections::Fused(qkv), out, options)?;
/// let x = Tensor::ones([2, 8, 64], (Kind::Float, Device::Cpu));
/// assert_eq!(attention.forward(&x, &Pass::evaluation())?.size(), [2, 8, 64]);
/// # Ok::<(), phalanx_model_parallel::Error>(())
/// ```
#[derive(Debug)]
pub struct Attention {
    projections: Projections,
    out: RowLinear,
    options: AttentionOptions,
    rotary: Option<Rotary>,
    attend: Box<dyn Attend>,
    /// Whether the rank has all tokens, and attends to them by itself.
    is_plain: bool,
    dropout: Option<AttentionDropout>,
    /// Heads of queries, and of keys and values, on this rank.
    heads: (i64, i64),
}

impl Attention {
    /// Of products that the caller has made, under the names that its files have.
    ///
    /// # Errors
    /// [`Error::Indivisible`] where heads cannot be cut over the ranks; [`Error::BadSetting`] where the products do not have the heads' columns, each of them whole.
    pub fn new(
        projections: Projections,
        out: RowLinear,
        options: AttentionOptions,
    ) -> Result<Self> {
        options.check()?;
        let first = projections.first();
        let tp = first.tp().clone();
        let heads = heads(first.name(), &options, &tp)?;
        projections.check(&options, heads)?;
        if out.inputs() != heads.0 * options.head_dim {
            return Err(mismatch(out.inputs(), "heads × head_dim / n inputs of the last product"));
        }
        let dropout = match options.dropout > 0.0 {
            true => Some(AttentionDropout {
                dropout: Dropout::new(options.dropout, options.key)?,
                first_head: tp.rank() * heads.0,
            }),
            false => None,
        };
        let plain = Plain { causal: options.causal, dropout };
        let rotary = options.rotary.map(|theta| Rotary { theta, head_dim: options.head_dim });
        let attend = Box::new(plain);
        Ok(Self { projections, out, options, rotary, attend, is_plain: true, dropout, heads })
    }

    /// The same with another way of attending, which is as causal and has this one's [`dropout`](Self::dropout).
    ///
    /// # Errors
    /// [`Error::BadSetting`](crate::Error::BadSetting) where it differs from [`AttentionOptions`] in these.
    pub fn with_attend(self, attend: Box<dyn Attend>) -> Result<Self> {
        let bad = |setting, value: String, expected| Error::BadSetting { setting, value, expected };
        if attend.is_causal() != self.options.causal {
            let value = format!("{} of the way of attending", attend.is_causal());
            return Err(bad("causal", value, "that of the attention's options"));
        }
        if attend.dropout() != self.dropout {
            let value = format!("{:?} of the way of attending", attend.dropout());
            return Err(bad("dropout", value, "Attention::dropout, given with with_dropout"));
        }
        Ok(Self { attend, is_plain: false, ..self })
    }

    /// What this rank drops of probabilities, for another way of attending.
    #[must_use]
    pub fn dropout(&self) -> Option<AttentionDropout> {
        self.dropout
    }

    /// `[batch, tokens(/n), width]`, both ways.
    ///
    /// # Errors
    /// Those of the layers; libtorch's own.
    pub fn forward(&self, x: &Tensor, pass: &Pass) -> Result<Tensor> {
        let [queries, keys, values] = self.queries_keys_values(x, pass)?;
        let output = self.attend.attend(&queries, &keys, &values, pass)?;
        self.joined(&output)
    }

    /// The same of the next tokens alone, which attend to those in `before`, too, and are added to them. [`Pass::tokens`] says where they are. For evaluation: nothing
    /// is dropped.
    ///
    /// # Errors
    /// [`Error::BadSetting`] where tokens attend to later ones, or other ranks have some of them (context parallelism, sequence parallelism); as [`forward`](Self::forward).
    pub fn forward_next(&self, x: &Tensor, pass: &Pass, before: &mut KeyValues) -> Result<Tensor> {
        let cuts_tokens = self.projections.first().tp().cuts_tokens();
        if !self.is_plain || !self.options.causal || cuts_tokens {
            return Err(Error::BadSetting {
                setting: "keys and values of tokens before",
                value: format!("causal {}, tokens cut {}", self.options.causal, cuts_tokens || !self.is_plain),
                expected: "causal attention of a rank that has all tokens: without context and sequence parallelism",
            });
        }
        let [queries, keys, values] = self.queries_keys_values(x, pass)?;
        let is_first = before.tokens() == 0;
        let all = before.grown(&keys, &values)?;
        let output = match is_first {
            true => {
                self.attend.attend(&queries, &keys, &values, &Pass { train: false, ..*pass })?
            }
            false => kept::of_last(&queries, all)?,
        };
        self.joined(&output)
    }

    /// By heads, with positions in them.
    fn queries_keys_values(&self, x: &Tensor, pass: &Pass) -> Result<[Tensor; 3]> {
        let (heads, kv_heads) = self.heads;
        let [queries, keys, values] = self.projections.forward(x)?;
        let queries = self.by_heads(&queries, heads)?;
        let keys = self.by_heads(&keys, kv_heads)?;
        let values = self.by_heads(&values, kv_heads)?;
        let (queries, keys) = match &self.rotary {
            None => (queries, keys),
            Some(rotary) => rotary.both(&queries, &keys, pass)?,
        };
        Ok([queries, keys, values])
    }

    /// `[batch, heads, tokens, head_dim]` → `[batch, tokens, columns]`, and the last product.
    fn joined(&self, output: &Tensor) -> Result<Tensor> {
        self.out.forward(&output.f_transpose(1, 2)?.f_flatten(2, 3)?)
    }

    /// `[batch, tokens, columns] → [batch, heads, tokens, head_dim]`.
    fn by_heads(&self, x: &Tensor, heads: i64) -> Result<Tensor> {
        let shape = x.size();
        let view = [shape[0], shape[1], heads, self.options.head_dim];
        Ok(x.f_reshape(view)?.f_transpose(1, 2)?)
    }
}

impl Projections {
    fn first(&self) -> &ColumnLinear {
        match self {
            Self::Fused(all) => all,
            Self::Separate { queries, .. } => queries,
        }
    }

    fn forward(&self, x: &Tensor) -> Result<[Tensor; 3]> {
        match self {
            Self::Fused(all) => {
                let whole = all.forward(x)?;
                // Not slices one by one, whose backwards would each make a gradient of the whole.
                let parts = whole.f_split_with_sizes(all.widths(), -1)?;
                three(parts)
            }
            Self::Separate { queries, keys, values } => {
                three(ColumnLinear::forward_all(&[queries, keys, values], x)?)
            }
        }
    }

    fn check(&self, options: &AttentionOptions, (heads, kv_heads): (i64, i64)) -> Result<()> {
        let widths = match self {
            Self::Fused(all) => all.widths(),
            Self::Separate { queries, keys, values } => {
                [queries, keys, values].iter().map(|layer| layer.outputs()).collect()
            }
        };
        let expected = [heads, kv_heads, kv_heads].map(|heads| heads * options.head_dim);
        if widths == expected {
            return Ok(());
        }
        Err(Error::BadSetting {
            setting: "projections",
            value: format!("{widths:?} columns a rank of queries, keys and values"),
            expected:
                "heads × head_dim of each: set `parts` of a fused one, and `unit` to head_dim",
        })
    }
}

/// Queries, keys and values.
fn three(all: Vec<Tensor>) -> Result<[Tensor; 3]> {
    let count = i64::try_from(all.len()).unwrap_or(i64::MAX);
    all.try_into().map_err(|_all| mismatch(count, "queries, keys and values"))
}

/// Heads of queries, and of keys and values, on each rank.
fn heads(layer: &str, options: &AttentionOptions, tp: &TensorParallel) -> Result<(i64, i64)> {
    let ranks = tp.size();
    if options.heads % ranks != 0 {
        return Err(cut::indivisible(layer, "heads", options.heads, ranks));
    }
    let kv_heads = options.kv_heads;
    if kv_heads % ranks == 0 {
        return Ok((options.heads / ranks, kv_heads / ranks));
    }
    if ranks % kv_heads == 0 {
        return Ok((options.heads / ranks, 1)); // on several ranks each
    }
    Err(cut::indivisible(layer, "heads of keys and values", kv_heads, ranks))
}

fn mismatch(actual: i64, expected: &'static str) -> Error {
    Error::BadSetting { setting: "products", value: actual.to_string(), expected }
}
