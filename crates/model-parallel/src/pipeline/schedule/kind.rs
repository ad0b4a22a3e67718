//! The schedules by name, and the shapes that each can have.

use std::fmt;
use std::str::FromStr;

use crate::error::{Error, Result};

/// More micro-batches in chunks than any step has, and few enough for a list of them.
const PASSES_MAX: usize = 1 << 24;

/// Which schedule.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum ScheduleKind {
    /// All forward, then all backward: the simplest, and the one that keeps every micro-batch's activations.
    GPipe,
    /// One forward, one backward: as long as GPipe, with the activations of `p` micro-batches at most.
    OneFOneB,
    /// 1F1B with several chunks of the model on each rank: a bubble `chunks` times smaller, as many times more messages.
    Interleaved {
        /// Chunks a rank: 2 or more.
        chunks: usize,
    },
    /// Zero bubble, handcrafted schedule 1: gradients of weights are computed where a rank would wait.
    ZbH1,
}

/// What sends must do for a schedule to end. Each allows more programs than the next.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Sending {
    /// A send takes a copy and does not wait: `Group::send` of host memory, and over MPI. Over NCCL a send of a GPU's memory waits on the GPU.
    Buffered,
    /// Sends wait until they are received, but those that follow each other, and receives among them, are under way together: MPI's
    /// `Sendrecv`, NCCL's group calls, Megatron-LM's `send_forward_recv_backward`.
    Together,
    /// Every send waits until it is received: MPI's `Ssend`.
    Synchronous,
}

impl ScheduleKind {
    /// Chunks of the model that a rank has.
    #[must_use]
    pub const fn chunk_count(self) -> usize {
        match self {
            Self::Interleaved { chunks } => chunks,
            Self::GPipe | Self::OneFOneB | Self::ZbH1 => 1,
        }
    }

    /// The strictest sends with which it ends whatever its numbers are.
    #[must_use]
    pub(crate) const fn sending(self) -> Sending {
        match self {
            Self::GPipe => Sending::Synchronous,
            Self::OneFOneB | Self::ZbH1 => Sending::Together,
            Self::Interleaved { .. } => Sending::Buffered,
        }
    }

    pub(super) fn check(self, rank_count: usize, micro_batch_count: usize) -> Result<()> {
        match self.trouble(rank_count, micro_batch_count) {
            Some(reason) => {
                Err(Error::NoSuchSchedule { kind: self, rank_count, micro_batch_count, reason })
            }
            None => Ok(()),
        }
    }

    fn trouble(self, p: usize, m: usize) -> Option<String> {
        if p == 0 || m == 0 {
            return Some("both are at least 1".to_owned());
        }
        let passes = p.checked_mul(m).and_then(|passes| passes.checked_mul(self.chunk_count()));
        if passes.is_none_or(|passes| passes > PASSES_MAX) {
            return Some(format!("ranks × micro-batches × chunks are at most {PASSES_MAX}"));
        }
        match self {
            Self::Interleaved { chunks } if chunks < 2 => {
                Some(format!("{chunks} chunks a rank are too few, take 2 or more, or 1f1b"))
            }
            Self::Interleaved { .. } if !m.is_multiple_of(p) => Some(multiples(p, m)),
            _ => None,
        }
    }
}

fn multiples(p: usize, m: usize) -> String {
    let (below, above) = (m / p * p, (m / p + 1).saturating_mul(p));
    let nearest = if below == 0 { above.to_string() } else { format!("{below} or {above}") };
    format!("micro-batches come in rounds of as many as there are ranks; possible: {nearest}")
}

impl fmt::Display for ScheduleKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::GPipe => f.pad("gpipe"),
            Self::OneFOneB => f.pad("1f1b"),
            Self::Interleaved { chunks } => f.pad(&format!("interleaved:{chunks}")),
            Self::ZbH1 => f.pad("zb-h1"),
        }
    }
}

/// As it is displayed: `gpipe`, `1f1b`, `interleaved:2`, `zb-h1`.
impl FromStr for ScheduleKind {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self> {
        let chunks = name.strip_prefix("interleaved:").and_then(|chunks| chunks.parse().ok());
        match (name, chunks) {
            ("gpipe", _) => Ok(Self::GPipe),
            ("1f1b", _) => Ok(Self::OneFOneB),
            ("zb-h1", _) => Ok(Self::ZbH1),
            (_, Some(chunks)) => Ok(Self::Interleaved { chunks }),
            _ => Err(Error::UnknownSchedule { name: name.to_owned() }),
        }
    }
}
