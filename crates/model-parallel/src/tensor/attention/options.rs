//! What an attention is.

use crate::error::{Error, Result};
use crate::layer::random::Key;

/// Shape and kind of an attention.
#[derive(Clone, Debug, PartialEq)]
pub struct AttentionOptions {
    /// Heads of queries, over all ranks.
    pub heads: i64,
    /// Heads of keys and values, which divides `heads`.
    pub kv_heads: i64,
    /// Columns of a head.
    pub head_dim: i64,
    /// Whether a token attends to itself and those before it alone.
    pub causal: bool,
    /// Rotary positions with this base (Su et al. 2021), in Llama's order: column i of a head turns with column i + `head_dim`/2.
    pub rotary: Option<f64>,
    /// How often a probability is dropped, by step, sequence, head, query and key.
    pub dropout: f64,
    /// What dropout draws from ([`Builder::key`](crate::layer::Builder::key)).
    pub key: Key,
}

impl AttentionOptions {
    /// Causal attention of `width` columns in `heads`, without rotary positions or dropout.
    #[must_use]
    pub fn new(width: i64, heads: i64) -> Self {
        Self {
            heads,
            kv_heads: heads,
            head_dim: width / heads.max(1),
            causal: true,
            rotary: None,
            dropout: 0.0,
            key: Key::of_seed(0),
        }
    }

    /// Columns of queries, keys and values: the `parts` of a fused product.
    #[must_use]
    pub fn parts(&self) -> Vec<i64> {
        [self.heads, self.kv_heads, self.kv_heads].map(|heads| heads * self.head_dim).to_vec()
    }

    pub(super) fn check(&self) -> Result<()> {
        let bad = |setting, value: i64, expected| {
            Err(Error::BadSetting { setting, value: value.to_string(), expected })
        };
        if self.heads < 1 || self.head_dim < 1 {
            return bad("heads", self.heads, "at least 1, of at least 1 column");
        }
        if self.kv_heads < 1 || self.heads % self.kv_heads != 0 {
            return bad("kv_heads", self.kv_heads, "a number that divides the heads");
        }
        if self.rotary.is_some() && self.head_dim % 2 != 0 {
            return bad("head_dim", self.head_dim, "an even number, for rotary positions");
        }
        Ok(())
    }
}
