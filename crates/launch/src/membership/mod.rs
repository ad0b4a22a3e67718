//! Which nodes belong to a job, and in which generation its ranks run: two state machines without clock and socket. Pure.
//!
//! Node 0's launcher has the [`Coordinator`]; each launcher, that of node 0 too, has an [`Agent`]. They tell each other
//! *states*, not events: an agent what it is and what became of its ranks ([`Status`]), the coordinator what is wanted
//! ([`Order`]). Each is numbered and the newest counts, so what is lost, late, doubled or out of order does no harm:
//! the next one says it again.
//!
//! ```text
//! Gathering ──enough nodes──▶ Running ──failure, loss, newcomer, wish──▶ Stopping ──all ended──▶ Gathering or Finished
//! ```
//!
//! A generation's ranks run only when those of the one before have ended everywhere. A node that is not heard of is lost
//! after [`Times::lost_after`]; its agent, which hears no answers, has ended its ranks before, after
//! [`Times::fence_after`]. So no two generations ever run at once, on whatever nodes (clocks need not agree; they only
//! must not run at very different speeds).
//!
//! | file | what |
//! |---|---|
//! | `mod` | what they tell each other |
//! | `coordinator`, `agent` | the two machines |
//! | `ended` | the ends of a generation, counted |
//! | `words` | statuses and orders as text |
//! | `simulation` | many agents, a bad network and a coordinator in simulated time, for tests and benches |
//!
//! Source: leases as in Gray and Cheriton, "Leases: an efficient fault-tolerant mechanism for distributed file cache
//! consistency" (1989); desired states instead of commands as in Kubernetes' controllers.

mod agent;
mod coordinator;
mod ended;
#[cfg(any(test, feature = "testing"))]
pub mod simulation;
mod words;

use std::time::Duration;

pub(crate) use agent::{Action, Agent};
pub(crate) use coordinator::{Config, Coordinator};
pub(crate) use words::{decode_order, decode_status, encode_order, encode_status};

use crate::restart::{Ending, GiveUp};

/// How long things may take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Times {
    /// An agent says this often how it is.
    pub(crate) beat: Duration,
    /// An agent that was not answered for this long ends its ranks.
    pub(crate) fence_after: Duration,
    /// A node that was not heard of for this long is lost. Longer than `fence_after` by what killing takes.
    pub(crate) lost_after: Duration,
    /// When enough nodes are there, but not as many as there may be, the others have this long to come.
    pub(crate) settle: Duration,
    /// Too few nodes for this long are the end.
    pub(crate) gather_max: Duration,
}

impl Default for Times {
    fn default() -> Self {
        Self {
            beat: Duration::from_millis(500),
            fence_after: Duration::from_secs(3),
            // As ranks among themselves.
            lost_after: Duration::from_secs(5),
            settle: Duration::from_secs(3),
            gather_max: Duration::from_secs(300),
        }
    }
}

/// One life of a node's launcher: the number grows with each.
pub(crate) type Life = u64;

/// What an agent says of itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Status {
    pub(crate) node: usize,
    pub(crate) life: Life,
    /// Grows with each status of a life.
    pub(crate) number: u64,
    /// How many ranks it starts.
    pub(crate) ranks: usize,
    /// The generation that it started last, and what became of it.
    pub(crate) ran: Option<(u32, Condition)>,
    pub(crate) wish: Wish,
}

/// What the user of a node's launcher has asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Wish {
    Nothing,
    /// This node is to leave the job.
    Leave,
    /// The job is to end, by this signal.
    End(i32),
}

/// What became of a node's ranks of a generation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Condition {
    Running,
    /// All ended well by themselves.
    Well,
    /// They were asked to end.
    Stopped,
    /// One failed, at this step.
    Failed(Ending, Option<u64>),
}

impl Condition {
    pub(crate) const fn has_ended(self) -> bool {
        !matches!(self, Self::Running)
    }
}

/// A node in a generation; its place in the list is its number there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Member {
    pub(crate) node: usize,
    pub(crate) life: Life,
    pub(crate) ranks: usize,
}

/// What the coordinator wants.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Order {
    /// Grows with each order.
    pub(crate) number: u64,
    /// Grows with each start.
    pub(crate) generation: u32,
    pub(crate) members: Vec<Member>,
    pub(crate) command: Command,
}

/// What the members of the order's generation are to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Command {
    /// Nothing: nodes are still gathering.
    Wait,
    Run,
    /// End the ranks at the next boundary between steps.
    StopSoon,
    /// End the ranks.
    StopNow,
    /// End; this is what became of the job.
    Finish(Verdict),
}

/// What became of a job.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    Well,
    /// The ranks of a node failed, and are not started again.
    Failed {
        node: usize,
        why: GiveUp,
    },
    /// The user ended it at a node.
    Ended {
        node: usize,
        signal: i32,
    },
    /// Too few nodes came or were left.
    TooFew {
        nodes: usize,
    },
    /// Node 0 can give no more orders.
    NoOrders,
}
