//! Schedules as data: what each rank of a pipeline does, in order. Pure.
//!
//! A model is cut into *stages*. Each of `p` ranks has `v` *chunks*: rank `r` has stages `r`, `r + p`, … `r + (v − 1) p`. A step passes `m` micro-batches forward
//! through all stages and backward again. A schedule is a list of [`Action`]s for each rank: what to compute, and what to send to and receive from whom.
//! [`stage`](Schedule::stage) says which part of the model a chunk is; between two chunks of one rank (with one rank) nothing is sent.
//!
//! Every schedule here computes weight gradients of a chunk in the order of the micro-batches, so that their sum has the bits of one process that
//! accumulates, for weights that one stage has alone (of those that two stages share each adds up its own first); [`verify`](Schedule::verify) holds those of others to it.
//!
//! One file a generator: `gpipe.rs`, `one_f_one_b.rs`, `interleaved.rs`, `zb_h1.rs`; they say in which order a rank computes, and `messages.rs` adds
//! what is sent and received. `check.rs`, `channels.rs` and `rendezvous.rs` look whether a schedule is right, `simulate.rs` how long it takes, `formula.rs` says how long it should.

mod channels;
mod check;
mod flaw;
mod formula;
mod gpipe;
mod interleaved;
mod kind;
mod messages;
mod one_f_one_b;
mod picture;
mod rendezvous;
mod simulate;
mod zb_h1;

use std::fmt;

pub use flaw::Flaw;
pub use kind::{ScheduleKind, Sending};
pub use simulate::{Costs, Slot, Timeline};

use crate::error::Result;

/// A micro-batch in a chunk of a rank.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Part {
    /// Which micro-batch of the step, from 0.
    pub micro_batch: usize,
    /// Which of the rank's chunks, from 0: the one nearest to the model's input.
    pub chunk: usize,
}

/// What is computed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Pass {
    /// The chunk's output; its activations are kept.
    Forward,
    /// Gradients of the input and of the weights together; the activations go.
    Backward,
    /// The gradient of the input alone, which the stage before waits for.
    BackwardInput,
    /// The gradients of the weights, for which nobody waits; the activations go.
    BackwardWeight,
}

/// What is sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Payload {
    /// The output of a stage, to the next.
    Activation,
    /// The gradient of a stage's input, to the one before.
    Gradient,
}

/// One thing that a rank does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// Computes.
    Compute {
        /// What.
        pass: Pass,
        /// Of what.
        part: Part,
    },
    /// Sends what this rank has computed of `part`.
    Send {
        /// The output, or the gradient of the input.
        payload: Payload,
        /// Of what.
        part: Part,
        /// The rank of the pipeline that receives it.
        peer: usize,
    },
    /// Waits for what this rank needs to compute `part`.
    Receive {
        /// The input, or the gradient of the output.
        payload: Payload,
        /// For what.
        part: Part,
        /// The rank of the pipeline that sends it.
        peer: usize,
    },
}

/// What each rank of a pipeline does.
///
/// # Example
///
/// ```
/// use phalanx_model_parallel::pipeline::schedule::{Costs, Schedule, ScheduleKind};
///
/// let schedule = Schedule::new(ScheduleKind::OneFOneB, 2, 3)?;
/// schedule.verify()?;
/// let picture = schedule.timeline(&Costs::UNIT)?.to_string();
/// assert_eq!(picture, "\
/// rank 0 0F 1F .. .. 0B -- 2F 1B -- .. 2B --
/// rank 1 .. 0F 0B -- 1F 1B -- 2F 2B -- .. ..");
/// # Ok::<(), phalanx_model_parallel::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Schedule {
    micro_batch_count: usize,
    chunk_count: usize,
    sending: Sending,
    ranks: Vec<Vec<Action>>,
}

/// In which order a rank computes.
type Order = Vec<(Pass, Part)>;

impl Schedule {
    /// The schedule of this kind for `rank_count` ranks and `micro_batch_count` micro-batches a step.
    ///
    /// # Errors
    ///
    /// [`Error::NoSuchSchedule`](crate::Error::NoSuchSchedule) says which numbers are possible.
    pub fn new(kind: ScheduleKind, rank_count: usize, micro_batch_count: usize) -> Result<Self> {
        kind.check(rank_count, micro_batch_count)?;
        let (p, m) = (rank_count, micro_batch_count);
        let order = |rank| match kind {
            ScheduleKind::GPipe => gpipe::order(m),
            ScheduleKind::OneFOneB => one_f_one_b::order(p, m, rank),
            ScheduleKind::Interleaved { chunks } => interleaved::order(p, m, chunks, rank),
            ScheduleKind::ZbH1 => zb_h1::order(p, m, rank),
        };
        let layout = Layout { rank_count, chunk_count: kind.chunk_count() };
        let ranks = (0..p).map(|rank| messages::added(layout, rank, &order(rank))).collect();
        let schedule = Self::of(micro_batch_count, kind.chunk_count(), ranks);
        Ok(Self { sending: kind.sending(), ..schedule })
    }

    /// A schedule of your own, to be [verified](Schedule::verify). It promises to end with buffered sends alone.
    #[must_use]
    pub fn of(micro_batch_count: usize, chunk_count: usize, ranks: Vec<Vec<Action>>) -> Self {
        Self { micro_batch_count, chunk_count, sending: Sending::Buffered, ranks }
    }

    /// How many ranks the pipeline has.
    #[must_use]
    pub fn rank_count(&self) -> usize {
        self.ranks.len()
    }

    /// How many micro-batches a step has.
    #[must_use]
    pub const fn micro_batch_count(&self) -> usize {
        self.micro_batch_count
    }

    /// How many chunks each rank has.
    #[must_use]
    pub const fn chunk_count(&self) -> usize {
        self.chunk_count
    }

    /// The least that its sends must do.
    #[must_use]
    pub const fn sending(&self) -> Sending {
        self.sending
    }

    /// What the rank does, in order.
    ///
    /// # Panics
    ///
    /// When there is no such rank.
    #[must_use]
    pub fn actions(&self, rank: usize) -> &[Action] {
        &self.ranks[rank]
    }

    /// The stage that is this chunk of this rank.
    #[must_use]
    pub fn stage(&self, rank: usize, chunk: usize) -> usize {
        self.layout().stage(rank, chunk)
    }

    /// The rank and its chunk that are this stage, if there are so many.
    #[must_use]
    pub fn place(&self, stage: usize) -> Option<(usize, usize)> {
        let ranks = self.rank_count();
        (stage < self.stage_count()).then(|| (stage % ranks, stage / ranks))
    }

    /// The stages of the model: ranks times chunks.
    #[must_use]
    pub(crate) fn stage_count(&self) -> usize {
        self.layout().stage_count()
    }

    /// The rank and the part where it takes what `rank` has computed of `part`; `None` at the ends of the model.
    pub(crate) fn target(
        &self,
        rank: usize,
        payload: Payload,
        part: Part,
    ) -> Option<(usize, Part)> {
        self.layout().target(rank, payload, part)
    }

    fn layout(&self) -> Layout {
        Layout { rank_count: self.rank_count(), chunk_count: self.chunk_count }
    }
}

/// Which rank has which stage.
#[derive(Clone, Copy, Debug)]
struct Layout {
    rank_count: usize,
    chunk_count: usize,
}

impl Layout {
    fn stage_count(self) -> usize {
        self.rank_count * self.chunk_count
    }

    fn stage(self, rank: usize, chunk: usize) -> usize {
        chunk * self.rank_count + rank
    }

    /// The rank and the part where it takes what this rank has computed of `part`; `None` at the ends of the model.
    fn target(self, rank: usize, payload: Payload, part: Part) -> Option<(usize, Part)> {
        self.neighbour(rank, part, payload == Payload::Activation)
    }

    /// The rank and the part that what this rank needs for `part` comes from.
    fn origin(self, rank: usize, payload: Payload, part: Part) -> Option<(usize, Part)> {
        self.neighbour(rank, part, payload == Payload::Gradient)
    }

    fn neighbour(self, rank: usize, part: Part, next: bool) -> Option<(usize, Part)> {
        let stage = self.stage(rank, part.chunk);
        let stage = if next { stage + 1 } else { stage.checked_sub(1)? };
        let chunk = stage / self.rank_count;
        (stage < self.stage_count()).then(|| (stage % self.rank_count, Part { chunk, ..part }))
    }
}

impl Pass {
    /// What the pass takes from the stage on one side and makes for the one on the other.
    pub(crate) const fn hands_on(self) -> Option<Payload> {
        match self {
            Self::Forward => Some(Payload::Activation),
            Self::Backward | Self::BackwardInput => Some(Payload::Gradient),
            Self::BackwardWeight => None,
        }
    }

    /// Whether the chunk's activations are needed no more, and its weight gradients have grown.
    pub(crate) const fn ends(self) -> bool {
        matches!(self, Self::Backward | Self::BackwardWeight)
    }

    const fn letter(self) -> char {
        match self {
            Self::Forward => 'F',
            Self::Backward | Self::BackwardInput => 'B',
            Self::BackwardWeight => 'W',
        }
    }
}

impl Action {
    /// What it is about.
    #[must_use]
    pub(crate) const fn part(self) -> Part {
        match self {
            Self::Compute { part, .. } | Self::Send { part, .. } | Self::Receive { part, .. } => {
                part
            }
        }
    }
}

impl fmt::Display for Action {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let what = match self {
            Self::Compute { pass, .. } => format!("{pass:?}"),
            Self::Send { payload, peer, .. } => format!("Send {payload:?} to rank {peer}"),
            Self::Receive { payload, peer, .. } => format!("Receive {payload:?} from rank {peer}"),
        };
        let part = self.part();
        write!(f, "{what} (micro-batch {}, chunk {})", part.micro_batch, part.chunk)
    }
}
