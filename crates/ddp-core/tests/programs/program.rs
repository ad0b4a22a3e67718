//! A program: what every rank builds and does, as a value.

use phalanx_comm::environment::HostLink;
use phalanx_ddp_core::{Buffers, NonFinite, Zero};
use tch::Kind;

/// A whole program.
#[derive(Clone, Debug)]
pub(crate) struct Program {
    pub(crate) world_size: usize,
    pub(crate) models: Vec<Model>,
    pub(crate) settings: Settings,
    pub(crate) optimizer: Optimizer,
    pub(crate) clip: Option<f64>,
    /// Whether `p1` of each model has a learning rate of its own, with our optimizers.
    pub(crate) grouped: bool,
    /// Whether losses are summed and weighed (`Ddp::backward`) or plain tch's.
    pub(crate) weighted: bool,
    /// With it ranks may run out of steps at different times: how many each has.
    pub(crate) join: Option<Vec<usize>>,
    pub(crate) steps: Vec<Vec<Statement>>,
    pub(crate) ends_with_compare: bool,
    pub(crate) mistake: Option<Mistake>,
}

/// One line for each thing, to be read.
impl std::fmt::Display for Program {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { world_size, optimizer, clip, grouped, weighted, join, .. } = self;
        writeln!(f, "{world_size} ranks, {optimizer:?}, clip {clip:?}, grouped {grouped}, weighted {weighted}, join {join:?}")?;
        writeln!(f, "{:?}", self.settings)?;
        for (number, model) in self.models.iter().enumerate() {
            writeln!(f, "m{number}, buffers {}:", model.has_buffers)?;
            for (index, parameter) in model.parameters.iter().enumerate() {
                writeln!(f, "  p{index}: {parameter:?}")?;
            }
        }
        for (number, step) in self.steps.iter().enumerate() {
            writeln!(f, "step {number}:")?;
            for statement in step {
                match statement {
                    Statement::Backward { parts, sync, tolerated } => {
                        writeln!(f, "  Backward, sync {sync}, tolerated {tolerated}:")?;
                        for (rank, part) in parts.iter().enumerate() {
                            writeln!(f, "    rank {rank}: {part:?}")?;
                        }
                    }
                    other => writeln!(f, "  {other:?}")?,
                }
            }
        }
        writeln!(f, "compare at the end {}, {:?}", self.ends_with_compare, self.mistake)
    }
}

/// A model of parameters `p0`, `p1`, …, and its buffers if it has any.
#[derive(Clone, Debug)]
pub(crate) struct Model {
    pub(crate) parameters: Vec<Parameter>,
    pub(crate) has_buffers: bool,
}

#[derive(Clone, Copy, Debug)]
pub(crate) struct Parameter {
    pub(crate) len: i64,
    pub(crate) kind: Kind,
    /// In how many places of a loss it is used.
    pub(crate) places: u64,
    /// Whether it is frozen when the model is wrapped.
    pub(crate) frozen: bool,
}

#[derive(Clone, Debug)]
pub(crate) struct Settings {
    pub(crate) bucket_bytes: Vec<usize>,
    pub(crate) zero: Zero,
    /// How ranks talk: whether they share memory.
    pub(crate) link: HostLink,
    pub(crate) buffers: Buffers,
    pub(crate) find_unused_parameters: bool,
    pub(crate) static_graph: bool,
    pub(crate) gradient_kind: Option<Kind>,
    pub(crate) non_finite: NonFinite,
    pub(crate) fingerprint_interval: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Optimizer {
    TchSgd,
    TchMomentum,
    TchAdamW,
    Sgd,
    Momentum,
    AdamW,
    Adam,
    Lamb,
}

impl Optimizer {
    pub(crate) fn is_tchs(self) -> bool {
        matches!(self, Self::TchSgd | Self::TchMomentum | Self::TchAdamW)
    }
}

/// Who executes a statement.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Who {
    All,
    Only(usize),
}

impl Who {
    pub(crate) fn has(self, rank: usize) -> bool {
        self == Self::All || self == Self::Only(rank)
    }
}

#[derive(Clone, Debug)]
pub(crate) enum Statement {
    /// `Ddp::at_step`, by rank.
    AtStep(Vec<u64>),
    /// By rank what it does; `sync` exchanges. `tolerated`: gradients that are not finite are an error after which
    /// ranks go on.
    Backward {
        parts: Vec<Part>,
        sync: bool,
        tolerated: bool,
    },
    SetTrains {
        who: Who,
        model: usize,
        parameter: usize,
        trains: bool,
    },
    Step {
        who: Who,
        model: usize,
    },
    ZeroGrad {
        model: usize,
    },
    /// `Ddp::release_gradients`.
    Release {
        model: usize,
    },
    /// A variable comes into the `VarStore`.
    Late {
        who: Who,
    },
    Convert {
        who: Who,
        how: Conversion,
    },
    /// A parameter of model 0 changes by itself.
    Poke {
        rank: usize,
        parameter: usize,
    },
}

#[derive(Clone, Copy, Debug)]
pub(crate) enum Conversion {
    Half,
    Double,
    /// To f64 and back: other memory.
    ThereAndBack,
    /// `set_data` of one parameter.
    SetData(usize),
}

/// What a rank does in a backward.
#[derive(Clone, Debug)]
pub(crate) enum Part {
    Loss(Loss),
    /// `Ddp::exchange` or `Ddp::exchange_weighted`.
    Exchange,
    Nothing,
}

/// A loss: the sum, over the parameters that it uses, of their products with whole numbers.
#[derive(Clone, Debug)]
pub(crate) struct Loss {
    /// Decides the numbers, with the rank.
    pub(crate) salt: i64,
    /// (model, parameter) in the order in which terms are added.
    pub(crate) terms: Vec<(usize, usize)>,
    pub(crate) weight: u32,
    /// The term whose gradient is not finite.
    pub(crate) nan: Option<(usize, usize)>,
    /// Not as the program otherwise does: plain where losses are weighed, weighed where they are plain.
    pub(crate) mixed: bool,
    /// Whether late variables are used.
    pub(crate) late: bool,
}

impl Loss {
    pub(crate) fn reaches(&self, model: usize) -> bool {
        self.terms.iter().any(|term| term.0 == model)
    }
}

/// What is wrong with a program, on purpose.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Mistake {
    SkippedBackward,
    ExtraBackward,
    FrozenOnOneRank,
    UnfrozenOnOneRank,
    FrozenWithGradients,
    LateVariable,
    Converted,
    StepOnLocalGradients,
    Unused,
    StaticGraphBroken,
    MixedWeights,
    ExchangedTwice,
    ShardedWithTch,
    NotFinite,
    Poked,
    WrongStepNumber,
    StepWithoutGradients,
    ModelsDiffer,
}

impl Mistake {
    pub(crate) const ALL: [Self; 18] = [
        Self::SkippedBackward,
        Self::ExtraBackward,
        Self::FrozenOnOneRank,
        Self::UnfrozenOnOneRank,
        Self::FrozenWithGradients,
        Self::LateVariable,
        Self::Converted,
        Self::StepOnLocalGradients,
        Self::Unused,
        Self::StaticGraphBroken,
        Self::MixedWeights,
        Self::ExchangedTwice,
        Self::ShardedWithTch,
        Self::NotFinite,
        Self::Poked,
        Self::WrongStepNumber,
        Self::StepWithoutGradients,
        Self::ModelsDiffer,
    ];

    /// One of these is in some rank's error.
    pub(crate) fn words(self) -> &'static [&'static str] {
        match self {
            // A step shifted by one shows in whatever differs first.
            Self::SkippedBackward | Self::ExtraBackward => &[
                "every rank must start the same collectives",
                "every rank must run the same number of collectives",
                "no backward has exchanged gradients",
                "already is there",
                "is not the same on every rank",
                "a step on this rank's own gradients",
                // An exchange without a backward as the first of a static graph.
                ": 0 gradients",
                "cannot be exchanged together",
                "differ in the steps of their optimizers",
            ],
            Self::FrozenOnOneRank | Self::UnfrozenOnOneRank => {
                &["which variables train", "does not require grad"]
            }
            Self::FrozenWithGradients => &["frozen"],
            Self::LateVariable => &["m0.late came into the VarStore"],
            Self::Converted => &["the model is not what was wrapped"],
            Self::StepOnLocalGradients => &[
                "a step on this rank's own gradients",
                "is not the same on every rank",
                "no backward has exchanged gradients",
            ],
            Self::Unused => &["without a gradient for"],
            Self::StaticGraphBroken => &["without a gradient for", "static"],
            Self::MixedWeights => {
                &["use one of them for a whole step", "must start the same", "already is there"]
            }
            Self::ExchangedTwice => &["a gradient that was exchanged already is there"],
            Self::ShardedWithTch => &["phalanx's Optimizer"],
            Self::NotFinite => &["are not finite"],
            Self::Poked => &["is not the same on every rank"],
            Self::WrongStepNumber => &["step 9"],
            Self::StepWithoutGradients => &["no backward has exchanged gradients"],
            Self::ModelsDiffer => &["the ranks hold different models"],
        }
    }

    /// Whether ranks may come to the same weights all the same.
    pub(crate) fn may_pass(self) -> bool {
        // What one rank has changed may be overwritten by the rank that updates it.
        matches!(self, Self::StepOnLocalGradients | Self::Poked)
    }
}
