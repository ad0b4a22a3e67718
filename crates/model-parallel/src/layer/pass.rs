//! Where the batch of a forward is in its step.

/// What a layer must know of a forward besides its input: where its sequences and tokens are among all of the step, whoever computes them.
///
/// Dropout and positions depend on it, so that they are those of one process on every mesh.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Pass {
    /// Whether the model trains: whether dropout drops.
    pub train: bool,
    /// Number of the optimizer's step.
    pub step: u64,
    /// Number of the first sequence of this batch among all sequences of the step, over all data-parallel ranks and micro-batches.
    pub first_sample: u64,
    /// Index, in its sequence, of the first token that this rank has; not 0 where sequences are cut over the context-parallel axis. What
    /// sequence parallelism cuts is not counted here.
    pub first_token: i64,
}

impl Pass {
    /// A forward without dropout, of whole sequences.
    #[must_use]
    pub fn evaluation() -> Self {
        Self::default()
    }

    /// A forward of a training step.
    #[must_use]
    pub fn training(step: u64, first_sample: u64) -> Self {
        Self { train: true, step, first_sample, first_token: 0 }
    }
}
