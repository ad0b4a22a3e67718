//! What can go wrong in data-parallel training, in three families: arguments (nothing was sent), the group
//! (see [`phalanx_comm::Error`]), and libtorch's own errors.

use std::path::PathBuf;

use tch::Kind;

/// Result with [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// An error of this crate.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A collective or the group failed.
    #[error(transparent)]
    Comm(#[from] phalanx_comm::Error),
    /// Reading data failed.
    #[error(transparent)]
    Data(#[from] phalanx_data::Error),
    /// libtorch refused, called through tch.
    #[error("libtorch: {0}")]
    Tch(#[from] tch::TchError),
    /// libtorch refused, called through the shim.
    #[error("libtorch, in {call}: {message}")]
    Libtorch {
        /// Function of the shim.
        call: &'static str,
        /// libtorch's own text.
        message: String,
    },
    /// Ranks hold different models. Every rank gets this same text.
    #[error("the ranks hold different models:\n{report}build the same model, in the same order, on every rank")]
    ModelMismatch {
        /// One line for each difference: parameter, and what each rank has there.
        report: String,
    },
    /// A backward ended without a gradient for some parameters.
    #[error(
        "rank {rank}: backward ended without a gradient for {count} of {total} parameters: {names}; \
         every trainable parameter must take part in every loss: freeze those that do not, or use them"
    )]
    MissingGradients {
        /// This rank.
        rank: usize,
        /// How many are missing.
        count: usize,
        /// How many there are.
        total: usize,
        /// Their names (the first few).
        names: String,
    },
    /// A gradient was accumulated twice in one backward.
    #[error(
        "the gradient of {name} was ready twice in one backward, after its bucket may have been sent; \
         re-entrant backward (checkpointing) of a parameter used several times is not supported"
    )]
    GradientTwice {
        /// The parameter.
        name: String,
    },
    /// The last backward failed before its gradients were exchanged, so the ranks are out of step.
    #[error("the last backward failed before its gradients were exchanged; build the Ddp anew")]
    BackwardAbandoned,
    /// An optimizer step without gradients to step on.
    #[error("no backward has exchanged gradients since the last step: call backward first")]
    NoGradients,
    /// Nothing requires gradients.
    #[error("the model has no parameter that requires gradients: nothing to train")]
    NothingToTrain,
    /// A tensor's kind is not one that can be reduced.
    #[error("{name} has kind {kind:?}; parameters can be Float, Double, Half or BFloat16, autocast Half or BFloat16")]
    UnsupportedKind {
        /// The tensor.
        name: String,
        /// Its kind.
        kind: Kind,
    },
    /// The parameters are on a device that the group's backend cannot reach.
    #[error("{name} is on {device}, expected {expected}: build the VarStore there")]
    DeviceMismatch {
        /// The tensor.
        name: String,
        /// Its device.
        device: String,
        /// Where the group can work.
        expected: String,
    },
    /// A tensor's memory is not dense, so it cannot be laid flat.
    #[error("{name} is not dense in memory (strides {strides:?} for shape {shape:?}); call contiguous() first")]
    NotDense {
        /// The tensor.
        name: String,
        /// Its shape.
        shape: Vec<i64>,
        /// Its strides.
        strides: Vec<i64>,
    },
    /// More elements than libtorch can index.
    #[error("{elements} elements are more than a tensor can hold")]
    TooLarge {
        /// How many.
        elements: usize,
    },
    /// A setting is out of range.
    #[error("{setting} is {value}, expected {expected}")]
    BadSetting {
        /// Which.
        setting: &'static str,
        /// What it was.
        value: String,
        /// What it must be.
        expected: &'static str,
    },
    /// Another thread panicked while it held the reducer.
    #[error("a thread panicked inside the reducer; its state cannot be trusted: end this process")]
    Poisoned,
    /// A file could not be read or written.
    #[error("{doing} {path}: {source}", path = path.display())]
    Io {
        /// "reading", "writing" …
        doing: &'static str,
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// A file is not a valid safetensors file.
    #[error("{path} is not a valid safetensors file: {message}", path = path.display())]
    Safetensors {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        message: String,
    },
    /// A file's tensors do not fit the model.
    #[error("{path} does not fit the model:\n{report}use the weights of a model with the same configuration", path = path.display())]
    WeightsMismatch {
        /// The file.
        path: PathBuf,
        /// One line for each tensor that is missing or has another shape.
        report: String,
    },
}
