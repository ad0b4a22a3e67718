//! Everything that can be wrong with a mesh or a schedule.
//!
//! With all variants but [`Error::Comm`] and [`Error::PeerFailed`] groups are as good as before.

use crate::mesh::{Axes, Axis, Shape};
use crate::pipeline::schedule::{Flaw, ScheduleKind};

/// `Result` of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What went wrong.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// An axis, or the world, of no ranks.
    #[error("{axis} 0: an axis that is not used has 1 rank")]
    EmptyAxis {
        /// The axis, or `world`.
        axis: &'static str,
    },
    /// A collective of tensors, a backward, or libtorch failed.
    #[error(transparent)]
    Ddp(#[from] phalanx_ddp_core::Error),
    /// libtorch refused an operation.
    #[error(transparent)]
    Libtorch(#[from] tch::TchError),
    /// A layer cannot be cut over so many ranks.
    #[error("{layer}: {what} {len} cannot be divided by {axis} {ranks}; {}", choose(possible))]
    Indivisible {
        /// Where it is in the model.
        layer: String,
        /// What would be cut: heads, columns, the vocabulary.
        what: &'static str,
        /// How many there are.
        len: i64,
        /// The axis of the mesh.
        axis: Axis,
        /// Its size.
        ranks: usize,
        /// Sizes of the axis that divide it.
        possible: Vec<usize>,
    },
    /// An input that the layer cannot take.
    #[error("{layer}: {actual}; expected {expected}")]
    BadInput {
        /// Where it is in the model.
        layer: String,
        /// What was given.
        actual: String,
        /// What it takes.
        expected: String,
    },
    /// A setting that makes no sense.
    #[error("{setting} {value}: expected {expected}")]
    BadSetting {
        /// Its name.
        setting: &'static str,
        /// What was given.
        value: String,
        /// What it takes.
        expected: &'static str,
    },
    /// The axes do not multiply to the number of ranks.
    #[error("a mesh of {shape} does not fill a world of {world_size}; {}", listed(possible))]
    WorldMismatch {
        /// What was asked for.
        shape: Shape,
        /// How many ranks there are.
        world_size: usize,
        /// Shapes that fit this world, those that change least first.
        possible: Vec<Shape>,
    },
    /// Experts are spread over ranks that compute different tokens of one stage: `dp_shard` × `cp` of them.
    #[error(
        "ep {ep} does not divide dp_shard × cp = {dp_shard_cp}; possible: ep {}",
        numbers(possible)
    )]
    ExpertMismatch {
        /// What was asked for.
        ep: usize,
        /// How many ranks there are to spread experts over.
        dp_shard_cp: usize,
        /// What divides it.
        possible: Vec<usize>,
    },
    /// `ep` and `expert_shard` cut the same ranks as `dp_shard` and `cp` in another way.
    #[error("{axes} is no group: ep and expert_shard together are dp_shard × cp, so name the ones or the others")]
    MixedAxes {
        /// What was asked for.
        axes: Axes,
    },
    /// The axis does not get its size from the others.
    #[error("{axis} cannot take what is left: choose pp, dp_replicate, dp_shard, cp or tp")]
    NotAFactor {
        /// The axis.
        axis: Axis,
    },
    /// No such rank.
    #[error("rank {rank} is not in a mesh of {world_size} ranks")]
    NoSuchRank {
        /// What was asked for.
        rank: usize,
        /// Ranks of the mesh.
        world_size: usize,
    },
    /// Coordinates outside of the mesh.
    #[error("{axis} {index} is not in a mesh with {axis} of {size}")]
    NoSuchCoordinate {
        /// The axis.
        axis: Axis,
        /// What was asked for.
        index: usize,
        /// Ranks of the axis.
        size: usize,
    },
    /// The nodes have not as many ranks as the mesh.
    #[error("the nodes have {placed} ranks together and the mesh has {world_size}")]
    NodesMismatch {
        /// Ranks of the nodes.
        placed: usize,
        /// Ranks of the mesh.
        world_size: usize,
    },
    /// Ranks have other ideas of the mesh.
    #[error(
        "rank {rank} has a mesh of {theirs} and rank 0 one of {first}: give all ranks the same"
    )]
    MeshesDiffer {
        /// The first rank that differs.
        rank: usize,
        /// Its mesh, and the groups it wants.
        theirs: String,
        /// Rank 0's.
        first: String,
    },
    /// Another rank could not make one of its groups.
    #[error("rank {rank} could not make all of its groups: its own error says why")]
    PeerFailed {
        /// The first of them.
        rank: usize,
    },
    /// The group was not split.
    #[error("there is no group of {axes}: it was not among those that were asked for, or it has been taken")]
    NoSuchGroup {
        /// What was asked for.
        axes: Axes,
    },
    /// The schedule cannot have this shape.
    #[error(
        "no {kind} schedule of {rank_count} ranks and {micro_batch_count} micro-batches: {reason}"
    )]
    NoSuchSchedule {
        /// The schedule.
        kind: ScheduleKind,
        /// Ranks of the pipeline.
        rank_count: usize,
        /// Micro-batches of a step.
        micro_batch_count: usize,
        /// Why, and what to do.
        reason: String,
    },
    /// The name of no schedule.
    #[error("no schedule is called {name:?}; there are gpipe, 1f1b, interleaved:N (N chunks a rank, 2 or more) and zb-h1")]
    UnknownSchedule {
        /// What was asked for.
        name: String,
    },
    /// Every stage of a pipeline has a layer at least.
    #[error("{layers} layers are too few for {stages} stages, of which each has one at least: take fewer ranks of pp, or fewer chunks a rank")]
    StageWithoutLayers {
        /// Ranks times chunks.
        stages: usize,
        /// Layers of the model.
        layers: usize,
    },
    /// The ranks of a pipeline do not fit together. Found before training or at the end of a step, the same on every rank.
    #[error("{who}: {what}; expected {expected}")]
    PipelineMismatch {
        /// The rank that does not fit, and its stage.
        who: String,
        /// What it has.
        what: String,
        /// What the others need.
        expected: String,
    },
    /// A step of a pipeline failed. The groups are dead: all ranks hear of it.
    #[error("{at}: {source}{whom}")]
    Pipeline {
        /// This rank, and what it was doing.
        at: String,
        /// The rank that the error is about, by its place in the mesh.
        whom: String,
        /// What went wrong.
        source: Box<Error>,
    },
    /// A schedule of your own takes something before it is there.
    #[error("the schedule takes {what} that is not there: Schedule::verify says more")]
    NotThere {
        /// What.
        what: String,
    },
    /// A schedule that would compute something wrong, or nothing.
    #[error(transparent)]
    Flaw(#[from] Flaw),
    /// The process group failed.
    #[error(transparent)]
    Comm(#[from] phalanx_comm::Error),
}

impl From<Error> for phalanx_ddp_core::Error {
    /// For forwards inside of closures of ddp-core: checkpointed parts, custom functions.
    fn from(error: Error) -> Self {
        match error {
            Error::Ddp(error) => error,
            Error::Libtorch(error) => error.into(),
            Error::Comm(error) => error.into(),
            other => Self::Function { function: "a layer".to_owned(), reason: other.to_string() },
        }
    }
}

fn listed(shapes: &[Shape]) -> String {
    let shapes: Vec<String> = shapes.iter().map(ToString::to_string).collect();
    format!("possible: {}", shapes.join("; "))
}

fn numbers(values: &[usize]) -> String {
    let values: Vec<String> = values.iter().map(ToString::to_string).collect();
    values.join(", ")
}

/// Sizes to choose from.
fn choose(possible: &[usize]) -> String {
    format!("possible: {}", numbers(possible))
}
