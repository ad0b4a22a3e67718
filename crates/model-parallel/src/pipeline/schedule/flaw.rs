//! What can be wrong with a schedule.

use super::{Action, Payload, Sending};

/// The first thing that is wrong with a schedule.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Flaw {
    /// There are no ranks, no micro-batches or no chunks.
    #[error("a step has at least one rank, one micro-batch and one chunk a rank")]
    Empty,
    /// A micro-batch, a chunk or a peer that does not exist, or a message that nobody needs.
    #[error("rank {rank}, action {index}: {action} is not part of a step of this shape")]
    Stray {
        /// The rank.
        rank: usize,
        /// Which of its actions.
        index: usize,
        /// The action.
        action: Action,
    },
    /// Something is done twice.
    #[error("rank {rank}, action {index}: {action} has been done before")]
    Repeated {
        /// The rank.
        rank: usize,
        /// Which of its actions.
        index: usize,
        /// The action.
        action: Action,
    },
    /// Something is done before what it needs.
    #[error("rank {rank}, action {index}: {action} needs what the rank does not have yet")]
    TooEarly {
        /// The rank.
        rank: usize,
        /// Which of its actions.
        index: usize,
        /// The action.
        action: Action,
    },
    /// Gradients of weights would be added in another order than in one process.
    #[error("rank {rank}, action {index}: {action} comes out of the order of micro-batches, so that sums would have other bits")]
    OutOfOrder {
        /// The rank.
        rank: usize,
        /// Which of its actions.
        index: usize,
        /// The action.
        action: Action,
    },
    /// Not every micro-batch passes every chunk forward and backward.
    #[error(
        "rank {rank} does not take micro-batch {micro_batch} {direction} through chunk {chunk}"
    )]
    Missing {
        /// The rank.
        rank: usize,
        /// The micro-batch.
        micro_batch: usize,
        /// The chunk.
        chunk: usize,
        /// `forward` or `backward`.
        direction: &'static str,
    },
    /// Two ranks do not agree on a message between them.
    #[error("message {index} from rank {from} to rank {to}: sent is {sent:?}, awaited {awaited:?} (payload, micro-batch, stage)")]
    Unmatched {
        /// Who sends.
        from: usize,
        /// Who receives.
        to: usize,
        /// The first that differs, in the order in which they are sent.
        index: usize,
        /// What, of which micro-batch, for which stage.
        sent: Option<(Payload, usize, usize)>,
        /// What the receiver waits for.
        awaited: Option<(Payload, usize, usize)>,
    },
    /// Ranks wait for each other.
    #[error("with {sending:?} sends these ranks wait for each other: {}", listed(waiting))]
    Deadlock {
        /// What sends did.
        sending: Sending,
        /// Every rank that does not end, and where it is.
        waiting: Vec<(usize, Action)>,
    },
}

fn listed(waiting: &[(usize, Action)]) -> String {
    let each: Vec<String> =
        waiting.iter().map(|(rank, action)| format!("rank {rank} at {action}")).collect();
    each.join("; ")
}
