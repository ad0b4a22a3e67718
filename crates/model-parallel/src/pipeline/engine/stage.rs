//! What a stage is, and what a step comes to.

use std::time::Duration;

use tch::{Kind, Tensor};

use crate::error::Result;

/// Shape and kind of what a stage gives to the next.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Shaped {
    /// Its shape.
    pub shape: Vec<i64>,
    /// Its kind: f64, f32, f16 or bf16.
    pub kind: Kind,
}

impl Shaped {
    /// Of a tensor.
    pub(super) fn of(tensor: &Tensor) -> Result<Self> {
        Ok(Self { shape: tensor.size(), kind: tensor.f_kind()? })
    }
}

impl std::fmt::Display for Shaped {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:?} of shape {:?}", self.kind, self.shape)
    }
}

/// This rank's part of the model. A closure `|chunk, micro_batch, input| …` is one.
pub trait Stage {
    /// Runs the micro-batch through the chunk. The model's first chunk gets no input, and finds its samples by the number of the micro-batch; the last one returns the
    /// *sum* of the losses of the micro-batch's samples or tokens, one number. It is not to change its input in place.
    ///
    /// # Errors
    /// Its own: they end the step on every rank.
    fn forward(
        &mut self,
        chunk: usize,
        micro_batch: usize,
        input: Option<Tensor>,
    ) -> Result<Tensor>;

    /// What the chunk gives to the next one, where that is known without running it: [`Pipeline::agree`](super::Pipeline::agree) runs micro-batch 0 without it.
    fn output(&self, chunk: usize) -> Option<Shaped> {
        _ = chunk;
        None
    }
}

impl<F: FnMut(usize, usize, Option<Tensor>) -> Result<Tensor>> Stage for F {
    fn forward(
        &mut self,
        chunk: usize,
        micro_batch: usize,
        input: Option<Tensor>,
    ) -> Result<Tensor> {
        self(chunk, micro_batch, input)
    }
}

/// What came of a step: the same losses on every rank of the pipeline.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct StepOutput {
    /// By micro-batch: what the last stage returned.
    pub losses: Vec<f64>,
    /// How long this rank had nothing to compute: it waited for messages of other stages, and at the end for the last of them.
    pub idle: Duration,
    /// How long the step took, the exchange of gradients included.
    pub elapsed: Duration,
    /// How long this rank computed.
    pub computing: Computing,
}

/// How long a rank computed in a step, by pass. On a GPU, which is not waited for, it is how long that took to ask for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Computing {
    /// Forward.
    pub forward: Duration,
    /// Backward: where it is two, that of the inputs.
    pub backward: Duration,
    /// Gradients of weights, where they are by themselves.
    pub weights: Duration,
}

impl StepOutput {
    /// The sum of the losses, in the order of the micro-batches.
    #[must_use]
    pub fn loss_sum(&self) -> f64 {
        self.losses.iter().sum()
    }
}
