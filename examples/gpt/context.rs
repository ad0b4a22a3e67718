//! Which part of each sequence this rank has, and how its tokens attend to those of the others.
//!
//! Rank r of n has the r-th of 2n equal parts and the r-th from the end, so that a causal mask leaves all ranks as much to compute
//! ([`Order::Balanced`]); positions and dropout of the layers are those of these runs ([`Pass::tokens`](phalanx_model_parallel::layer::Pass)).

use phalanx_ddp_core::collective::TensorGroup;
use phalanx_model_parallel::context::{Order, RingAttention, Sequence};
use phalanx_model_parallel::layer::{Builder, Tokens};
use phalanx_model_parallel::tensor::Attention;
use phalanx_model_parallel::{Error, Result};
use tch::Tensor;

/// The dimension of tokens in `[batch, tokens, …]`.
const TOKENS: i64 = 1;

/// The ranks that have the other parts; without context parallelism none.
#[derive(Debug, Clone)]
pub(crate) struct Context(Option<Sequence>);

impl Context {
    /// Of the ranks of the axis `cp`.
    pub(crate) fn new(group: TensorGroup) -> Self {
        Context((group.world_size() > 1).then(|| Sequence::new(group, Order::Balanced)))
    }

    /// The ranks that have the other parts.
    pub(crate) fn group(&self) -> Option<&TensorGroup> {
        self.0.as_ref().map(Sequence::group)
    }

    /// This rank's part of `[batch, tokens]`.
    pub(crate) fn cut(&self, whole: &Tensor) -> Result<Tensor> {
        match &self.0 {
            Some(sequence) => sequence.cut(whole, TOKENS),
            None => Ok(whole.shallow_clone()),
        }
    }

    /// The whole of which this rank has a part, `[batch, tokens, …]`. Collective.
    pub(crate) fn join(&self, part: &Tensor) -> Result<Tensor> {
        match &self.0 {
            Some(sequence) => sequence.join(part, TOKENS),
            None => Ok(part.shallow_clone()),
        }
    }

    /// This rank's tokens of sequences of so many.
    pub(crate) fn tokens(&self, len: i64) -> Result<Tokens> {
        self.0.as_ref().map_or(Ok(Tokens::default()), |sequence| sequence.tokens(len))
    }

    /// The attention that meets the other ranks' tokens.
    pub(crate) fn attention(&self, attention: Attention, at: &Builder<'_>) -> Result<Attention> {
        let Some(sequence) = &self.0 else { return Ok(attention) };
        let ring = RingAttention::new(&at.name("attention"), sequence.clone(), true);
        let ring = ring.with_dropout(attention.dropout());
        attention.with_attend(Box::new(ring))
    }
}

/// A chunk that was given nothing to compute with.
pub(crate) fn nothing() -> Error {
    Error::BadInput {
        layer: "chunk of the model".to_owned(),
        actual: "no input".to_owned(),
        expected: "hidden states of the chunk before, and a head where a loss is asked for"
            .to_owned(),
    }
}
