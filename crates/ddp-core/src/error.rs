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
    /// A checkpoint cannot be written or read.
    #[error(transparent)]
    Checkpoint(Box<phalanx_checkpoint::Error>),
    /// A checkpoint is not what was written. Every rank gets this same text.
    #[error("{reason} (found by rank {rank})")]
    CheckpointDamaged {
        /// The first rank that found damage.
        rank: usize,
        /// What it found.
        reason: String,
    },
    /// A checkpoint is of another training.
    #[error("{path} does not fit this training:\n{report}build the model and the optimizer as they were, or take another folder")]
    CheckpointMisfit {
        /// The checkpoint.
        path: PathBuf,
        /// One line for each difference.
        report: String,
    },
    /// The operating system refused.
    #[error("cannot {doing}: {source}")]
    System {
        /// What was tried.
        doing: &'static str,
        /// What it said.
        source: std::io::Error,
    },
    /// Snapshots are to be kept in memory, and a rank has none. Every rank gets this same text.
    #[error("rank {rank} has no memory for snapshots: {reason}")]
    NoSnapshotMemory {
        /// The first such rank.
        rank: usize,
        /// Why, and what to do.
        reason: &'static str,
    },
    /// A checkpoint was asked for between a backward and the step that belongs to it.
    #[error("{name} has a gradient that no step has used, and checkpoints hold no gradients; save after the optimizer's step")]
    MidStep {
        /// The first parameter.
        name: String,
    },
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
    /// A closure of the caller's failed: its own error.
    #[error("{0}")]
    Closure(#[source] Box<dyn std::error::Error + Send + std::marker::Sync>),
    /// A custom function's forward or backward broke the rules of [`autograd`](crate::autograd).
    #[error("{function}: {reason}")]
    Function {
        /// Its name.
        function: String,
        /// What is wrong, and what to do.
        reason: String,
    },
    /// What [`recompute`](crate::recompute) had to compute again could not be, or came out differently.
    #[error("checkpointed closure: {reason}")]
    Recompute {
        /// What is wrong, and what to do.
        reason: String,
    },
    /// Ranks hold different models. Every rank gets this same text.
    #[error("the ranks hold different models:\n{report}build the same model, in the same order, on every rank")]
    ModelMismatch {
        /// One line for each difference: parameter, and what each rank has there.
        report: String,
    },
    /// Ranks do different things. Every rank gets this same text.
    #[error("the ranks differ in {what}:\n{report}do the same on every rank")]
    RanksDiffer {
        /// In what.
        what: &'static str,
        /// What each rank has.
        report: String,
    },
    /// The parts of a model on its ranks do not make one model. Every rank gets this same text.
    #[error("the ranks' parts do not make one model:\n{report}give each rank its part of the same model, and `cuts` for the tensors that are cut")]
    PartsMismatch {
        /// What is wrong.
        report: String,
    },
    /// What several ranks of a model have is not the same on them. Every rank gets this same text.
    #[error(
        "{name} is not the same on ranks {} and {} of one model; give it in `cuts` if they have parts of it, begin with the same values, and add up \
         what each of them computes of its gradient", ranks.0, ranks.1
    )]
    PartsDiffer {
        /// The first tensor that differs.
        name: String,
        /// The first rank of the world that has it, and the first with other values.
        ranks: (usize, usize),
    },
    /// An optimizer needs a parameter whole that is cut over the ranks of a model. Every rank gets this same text.
    #[error(
        "{rule} needs {name} whole, and it is cut over the ranks of its model; name it among those that the rule takes by the element, or take \
         a rule that does so with all (AdamW, say)"
    )]
    CutParameter {
        /// The parameter.
        name: String,
        /// The rule.
        rule: &'static str,
    },
    /// Variables were added to the `VarStore` after it was wrapped.
    #[error(
        "{names} came into the VarStore after it was wrapped, so nobody exchanges their gradients; \
         build the whole model first, then Ddp::new"
    )]
    LateVariables {
        /// Their names (the first few).
        names: String,
    },
    /// A variable is not what it was when the model was wrapped.
    #[error("the model is not what was wrapped:\n{report}convert and move it before Ddp::new, or wrap it anew")]
    ModelChanged {
        /// One line for each variable.
        report: String,
    },
    /// A tensor was given under two names.
    #[error("{first} and {second} are one tensor; give it once")]
    SameTensorTwice {
        /// One name.
        first: String,
        /// The other.
        second: String,
    },
    /// A backward ended without a gradient for some parameters.
    #[error(
        "rank {rank}: backward ended without a gradient for {count} of {total} parameters: {names}; \
         use them in every loss, or freeze those that do not train (set_requires_grad(false)), \
         or set find_unused_parameters"
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
    /// A gradient came after its bucket was sent.
    #[error(
        "the gradient of {name} was ready again in one backward, after its bucket was sent; \
         where parameters get several gradients in one backward (from backwards inside of it), set static_graph"
    )]
    GradientTwice {
        /// The parameter.
        name: String,
    },
    /// A parameter got more gradients than in the first backward of a static graph.
    #[error(
        "{name} got {actual} gradients in this backward and {expected} in the first; with static_graph \
         every backward uses the same parameters equally often: set find_unused_parameters instead"
    )]
    StaticGraphChanged {
        /// The parameter.
        name: String,
        /// Gradients in the first exchanged backward.
        expected: u32,
        /// Gradients so far.
        actual: u32,
    },
    /// A parameter was frozen with gradients that no other rank has seen.
    #[error(
        "{name} was frozen while it held gradients that were not exchanged; exchange them first, or make \
         them undefined (zero_grad)"
    )]
    FrozenWithGradients {
        /// The parameter.
        name: String,
    },
    /// A gradient is sparse.
    #[error(
        "the gradient of {name} is sparse; set sparse_gradients to Densify, or make the embedding \
         with sparse: false"
    )]
    SparseGradient {
        /// The parameter.
        name: String,
    },
    /// A gradient is not finite. Every rank gets this same text.
    #[error(
        "rank {rank}: {count} of {total} elements of the gradient of {name} are not finite, in exchange \
         {exchange}; lower the learning rate or clip, or set non_finite to SkipStep"
    )]
    NonFinite {
        /// The rank that computed it.
        rank: usize,
        /// The first such parameter of that rank; on a GPU the first of its bucket.
        name: String,
        /// Elements that are not finite; on a GPU those of the bucket.
        count: usize,
        /// Elements of the parameter.
        total: usize,
        /// The number of the exchange, from 1.
        exchange: u64,
    },
    /// Ranks hold different parameters. Every rank gets this same text.
    #[error(
        "{name} is not the same on every rank: rank {ranks} differs; something changed it on some \
         ranks only: a step on gradients that were not exchanged, or a change by hand"
    )]
    ParametersDiffer {
        /// The first parameter that differs.
        name: String,
        /// The ranks that differ from most others.
        ranks: String,
    },
    /// The norm that gradients were to be clipped to is not finite; parameters stayed as they are, and gradients are gone.
    #[error(
        "the norm of all gradients is {norm}, so they cannot be clipped to it: lower the learning rate or the loss \
         scale, or take NonFinite::SkipStep without error_if_nonfinite"
    )]
    NonFiniteNorm {
        /// The norm.
        norm: f64,
    },
    /// Parameters were laid anew after averages of them had been made, so a rank has those of others than it should.
    #[error(
        "parameters were laid anew after they had been averaged: call Ema::update after the optimizer's step, never before \
         the first one, and no backward inside of Ema::with_averaged"
    )]
    AveragesMoved,
    /// Some gradients of a step were weighed and some were not.
    #[error(
        "gradients accumulated by Ddp::backward with a weight and by plain backward cannot be exchanged \
         together; use one of them for a whole step"
    )]
    MixedWeights,
    /// Gradients that were exchanged already would be exchanged again.
    #[error(
        "{name}: a gradient that was exchanged already is there; several losses before one step go \
         through Sync::Accumulate or no_sync but for the last; else step, or release_gradients, first"
    )]
    ExchangedTwice {
        /// The parameter.
        name: String,
    },
    /// Parameters changed while gradients that no other rank has seen were waiting for their exchange.
    #[error(
        "{name} was changed between accumulating gradients and exchanging them: a step on this rank's \
         own gradients lets the ranks drift apart; step after an exchanged backward"
    )]
    SteppedOnLocalGradients {
        /// The first parameter.
        name: String,
    },
    /// Sharded gradients, and no optimizer that can step on them.
    #[error(
        "with Zero::One each rank has the gradients of its segment alone, and no other optimizer than \
         phalanx's Optimizer can step on them: build one with Optimizer::new(&ddp, …) before backward, \
         or take Zero::Off"
    )]
    ShardedWithoutOptimizer,
    /// An exchange was asked for while a backward runs.
    #[error("an exchange cannot be started inside of a backward")]
    InsideBackward,
    /// The last backward failed before its gradients were exchanged, so the ranks are out of step.
    #[error("the last backward failed before its gradients were exchanged; build the Ddp anew")]
    BackwardAbandoned,
    /// An optimizer step without gradients to step on.
    #[error("no backward has exchanged gradients since the last step: call backward first")]
    NoGradients,
    /// Nothing requires gradients.
    #[error("the model has no parameter that requires gradients: nothing to train")]
    NothingToTrain,
    /// A layer got what it cannot work on.
    #[error("{name} got {actual}, expected {expected}")]
    BadInput {
        /// The layer.
        name: String,
        /// Kind and shape of what it got.
        actual: String,
        /// What it takes.
        expected: String,
    },
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

impl Error {
    /// An error of the caller's own, for the closures that this crate calls: it keeps its text.
    pub fn closure(
        error: impl Into<Box<dyn std::error::Error + Send + std::marker::Sync>>,
    ) -> Self {
        Self::Closure(error.into())
    }
}
