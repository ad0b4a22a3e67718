//! Section `mesh`: over how many ranks what is cut.

use phalanx_model_parallel::pipeline::schedule::ScheduleKind;
use phalanx_model_parallel::{Axis, Mesh as Made, Result, Shape};
use serde::{Deserialize, Serialize};

/// The axes, and what goes with them. One that is left out has one rank; `dp` takes what is left of the world.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct Mesh {
    /// Ranks that compute different samples; null: as many as there are beside the other axes.
    pub(crate) dp: Option<usize>,
    /// Ranks that have parts of the same matrices.
    pub(crate) tp: usize,
    /// Ranks that have different layers.
    pub(crate) pp: usize,
    /// Ranks that have different parts of the same sequences.
    pub(crate) cp: usize,
    /// Ranks, of `dp` × `cp`, that have different experts.
    pub(crate) ep: usize,
    /// Whether tokens between blocks are cut over `tp`.
    pub(crate) sequence_parallel: bool,
    /// `gpipe`, `1f1b`, `interleaved:CHUNKS` or `zb-h1`.
    pub(crate) schedule: String,
}

impl Default for Mesh {
    fn default() -> Self {
        let schedule = ScheduleKind::OneFOneB.to_string();
        Mesh { dp: None, tp: 1, pp: 1, cp: 1, ep: 1, sequence_parallel: false, schedule }
    }
}

impl Mesh {
    /// The mesh of a world of so many ranks, or what is wrong with it and what would fit.
    pub(crate) fn of_world(&self, world_size: usize) -> Result<Made> {
        let shape =
            Shape { pp: self.pp, cp: self.cp, tp: self.tp, ep: self.ep, ..Shape::default() };
        let shape = match self.dp {
            Some(dp) => Shape { dp_shard: dp, ..shape },
            None => shape.filling(Axis::DpShard, world_size)?,
        };
        Made::new(shape, world_size)
    }

    /// What the ranks of a pipeline do, and when.
    pub(crate) fn schedule(&self) -> Result<ScheduleKind> {
        self.schedule.parse()
    }

    /// What the tokens of a sequence are a multiple of: each rank of `cp` has two equal runs of them, which sequence parallelism may cut at any token.
    pub(crate) fn tokens_of(&self) -> usize {
        let sequence = if self.sequence_parallel { self.tp } else { 1 };
        match self.cp {
            1 => sequence,
            cp if sequence.is_multiple_of(2) => cp * sequence,
            cp => 2 * cp * sequence,
        }
    }

    pub(super) fn problem(&self) -> Option<String> {
        let axes =
            [("dp", self.dp.unwrap_or(1)), ("tp", self.tp), ("pp", self.pp), ("cp", self.cp)];
        let axes = axes.into_iter().chain([("ep", self.ep)]);
        if let Some((name, _)) = axes.into_iter().find(|(_, ranks)| *ranks == 0) {
            return Some(format!("mesh.{name} is 0; an axis that is not used has 1 rank"));
        }
        self.schedule().err().map(|error| format!("mesh.schedule: {error}"))
    }
}
