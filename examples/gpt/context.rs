//! Which part of each sequence this rank has, and how its tokens attend to those of the others.

use phalanx_model_parallel::layer::Builder;
use phalanx_model_parallel::tensor::Attention;
use phalanx_model_parallel::{Error, Result};
use tch::Tensor;

use super::config::Model as Config;

/// The ranks that have the other parts; without context parallelism none.
#[derive(Debug, Clone)]
pub(crate) struct Context;

impl Context {
    /// Whole sequences.
    pub(crate) fn alone() -> Self {
        Context
    }

    /// This rank's part of `[batch, tokens]`.
    pub(crate) fn cut(&self, whole: &Tensor) -> Result<Tensor> {
        Ok(whole.shallow_clone())
    }

    /// The whole of which this rank has a part, `[batch, tokens, …]`.
    pub(crate) fn join(&self, part: &Tensor) -> Result<Tensor> {
        Ok(part.shallow_clone())
    }

    /// The attention that meets the other ranks' tokens.
    pub(crate) fn attention(
        &self,
        attention: Attention,
        _at: &Builder<'_>,
        _config: &Config,
    ) -> Result<Attention> {
        Ok(attention)
    }

    /// A chunk that was given nothing to compute with.
    pub(crate) fn nothing(&self) -> Result<Tensor> {
        Err(Error::BadInput {
            layer: "chunk of the model".to_owned(),
            actual: "no input".to_owned(),
            expected: "hidden states of the chunk before, and a head where a loss is asked for".to_owned(),
        })
    }
}
