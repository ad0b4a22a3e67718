//! What errors call the ranks of a pipeline.

use phalanx_comm::Error as Comm;

use crate::error::Result;
use crate::mesh::{Axes, Mesh};

/// A name for each rank of the pipeline.
#[derive(Clone, Debug)]
pub(super) struct Names {
    names: Vec<String>,
    /// Whether they say more than the group's own errors do.
    say_more: bool,
}

impl Names {
    pub(super) fn numbered(rank_count: usize) -> Self {
        let name = |rank| format!("rank {rank} of the pipeline");
        Self { names: (0..rank_count).map(name).collect(), say_more: false }
    }

    /// By place in the mesh; `rank` is this one in the world.
    pub(super) fn of_mesh(mesh: &Mesh, rank: usize) -> Result<Self> {
        let name = |key| mesh.named(mesh.member(rank, Axes::PP, key)?);
        let names = (0..mesh.shape().pp).map(name).collect::<Result<_>>()?;
        Ok(Self { names, say_more: true })
    }

    pub(super) fn of(&self, rank: usize) -> &str {
        self.names.get(rank).map_or("a rank", String::as_str)
    }

    /// Who is to blame for a failure of the pipeline's group, to be put behind it.
    pub(super) fn whom(&self, failure: Option<&phalanx_ddp_core::Error>) -> String {
        let Some(phalanx_ddp_core::Error::Comm(failure)) = failure else { return String::new() };
        match blamed(failure).filter(|_| self.say_more) {
            Some(rank) => format!("; rank {rank} of this pipeline is {}", self.of(rank)),
            None => String::new(),
        }
    }
}

/// The rank of the group that its error is about.
fn blamed(failure: &Comm) -> Option<usize> {
    match failure {
        Comm::PeerGone { peer, .. }
        | Comm::NotResponding { peer, .. }
        | Comm::PeerLeft { peer, .. }
        | Comm::OutOfStep { peer, .. }
        | Comm::ConnectionLost { peer, .. } => Some(*peer),
        Comm::Timeout { absent, .. } => absent.first().map(|absent| absent.rank),
        Comm::PeerFailed { rank, .. } => Some(*rank),
        // It says itself who it is.
        _ => None,
    }
}

/// An error's text without the C++ stack that libtorch puts behind its own.
pub(super) fn plain(text: &str) -> &str {
    text.split("\nException raised from").next().unwrap_or(text)
}
