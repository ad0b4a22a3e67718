//! The axes by name, and sets of them.

use std::fmt;

use crate::error::{Error, Result};

/// One axis of a mesh.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Axis {
    /// Pipeline: ranks that have different layers.
    Pp,
    /// Replicas: ranks that have the same, whole or sharded alike, and compute different samples.
    DpReplicate,
    /// Shards: ranks that compute different samples, and have the optimizer's state, gradients or parameters in parts (ZeRO).
    DpShard,
    /// Context: ranks that have different parts of the same sequences.
    Cp,
    /// What is left of `dp_shard` × `cp` beside `ep`: ranks that have the same experts and may have them in parts.
    ExpertShard,
    /// Experts: ranks that have different experts of a layer.
    Ep,
    /// Tensor: ranks that have parts of the same matrices.
    Tp,
}

impl Axis {
    /// All of them, from the outermost to the innermost.
    pub const ALL: [Self; 7] = [
        Self::Pp,
        Self::DpReplicate,
        Self::DpShard,
        Self::Cp,
        Self::ExpertShard,
        Self::Ep,
        Self::Tp,
    ];

    /// Those of every layer but an expert's, whose sizes multiply to the world.
    pub const DENSE: [Self; 5] = [Self::Pp, Self::DpReplicate, Self::DpShard, Self::Cp, Self::Tp];

    /// Those of an expert's layers. They multiply to the world as well.
    pub const EXPERT: [Self; 5] =
        [Self::Pp, Self::DpReplicate, Self::ExpertShard, Self::Ep, Self::Tp];

    /// As flags and messages spell it.
    #[must_use]
    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Pp => "pp",
            Self::DpReplicate => "dp_replicate",
            Self::DpShard => "dp_shard",
            Self::Cp => "cp",
            Self::ExpertShard => "expert_shard",
            Self::Ep => "ep",
            Self::Tp => "tp",
        }
    }
}

impl fmt::Display for Axis {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// A set of axes: a group over them has all ranks that differ in nothing else.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Axes(u8);

impl Axes {
    /// Sends of activations and their gradients between stages.
    pub const PP: Self = Self::set(&[Axis::Pp]);
    /// The second step of a hybrid exchange of gradients: shards of one replica with those of the next.
    pub const DP_REPLICATE: Self = Self::set(&[Axis::DpReplicate]);
    /// Shards, where there is no context parallelism.
    pub const DP_SHARD: Self = Self::set(&[Axis::DpShard]);
    /// Keys and values of attention over a long sequence.
    pub const CP: Self = Self::set(&[Axis::Cp]);
    /// Tokens on their way to experts and back.
    pub const EP: Self = Self::set(&[Axis::Ep]);
    /// Products of matrices that are cut.
    pub const TP: Self = Self::set(&[Axis::Tp]);
    /// Ranks that read different samples: the loader's rank and world size are the place in it.
    pub const DP: Self = Self::set(&[Axis::DpReplicate, Axis::DpShard]);
    /// Over whom parameters, gradients and the optimizer's state are cut: `cp` ranks have the same parameters and gradients of
    /// different tokens, so they are shards too. (`Ddp` cuts them by itself: it takes [`DP_CP`](Self::DP_CP).)
    pub const DP_SHARD_CP: Self = Self::set(&[Axis::DpShard, Axis::Cp]);
    /// Over whom gradients are averaged, and losses where one rank of each `tp` and `pp` has one. It is the group for `Ddp`, with `shard_ranks` = `dp_shard` × `cp`
    /// for hybrid sharding: those are neighbours in it.
    pub const DP_CP: Self = Self::set(&[Axis::DpReplicate, Axis::DpShard, Axis::Cp]);
    /// One stage: all but `pp`. The last one's has all losses.
    pub const STAGE: Self = Self::set(&[Axis::DpReplicate, Axis::DpShard, Axis::Cp, Axis::Tp]);
    /// One copy of the model: norms of gradients and of parameters.
    pub const MODEL: Self = Self::set(&[Axis::Pp, Axis::Tp]);
    /// Over whom an expert's parameters and optimizer's state are cut.
    pub const EXPERT_SHARD: Self = Self::set(&[Axis::ExpertShard]);
    /// Over whom an expert's gradients are added up. Their divisor is the size of [`DP_CP`](Self::DP_CP), not of this group: an expert has seen the tokens of
    /// all `ep` ranks already.
    pub const EXPERT_DP: Self = Self::set(&[Axis::DpReplicate, Axis::ExpertShard]);
    /// One copy of all experts: norms of their gradients.
    pub const EXPERT_MODEL: Self = Self::set(&[Axis::Pp, Axis::Ep, Axis::Tp]);

    /// What training needs, in the order in which all ranks make the groups.
    pub const PLAN: [Self; 14] = [
        Self::PP,
        Self::DP_REPLICATE,
        Self::DP_SHARD,
        Self::CP,
        Self::EP,
        Self::TP,
        Self::DP,
        Self::DP_SHARD_CP,
        Self::DP_CP,
        Self::STAGE,
        Self::MODEL,
        Self::EXPERT_SHARD,
        Self::EXPERT_DP,
        Self::EXPERT_MODEL,
    ];

    /// The set of these axes; of none of them: every rank alone.
    ///
    /// # Errors
    ///
    /// [`Error::MixedAxes`]: `ep` or `expert_shard` beside `dp_shard` or `cp`.
    pub fn of(axes: &[Axis]) -> Result<Self> {
        let axes = Self::set(axes);
        let dense = axes.contains(Axis::DpShard) || axes.contains(Axis::Cp);
        if dense && axes.is_expert() {
            return Err(Error::MixedAxes { axes });
        }
        Ok(axes)
    }

    const fn set(axes: &[Axis]) -> Self {
        let mut bits = 0;
        let mut at = 0;
        while at < axes.len() {
            bits |= Self::bit(axes[at]);
            at += 1;
        }
        Self(bits)
    }

    const fn bit(axis: Axis) -> u8 {
        match axis {
            Axis::Pp => 1,
            Axis::DpReplicate => 2,
            Axis::DpShard => 4,
            Axis::Cp => 8,
            Axis::ExpertShard => 16,
            Axis::Ep => 32,
            Axis::Tp => 64,
        }
    }

    /// Whether the axis is in the set.
    #[must_use]
    pub const fn contains(self, axis: Axis) -> bool {
        self.0 & Self::bit(axis) != 0
    }

    /// The axes, from the outermost to the innermost.
    pub(crate) fn iter(self) -> impl Iterator<Item = Axis> {
        Axis::ALL.into_iter().filter(move |axis| self.contains(*axis))
    }

    /// The five axes that multiply to the world and have those of this set among them.
    pub(super) const fn view(self) -> [Axis; 5] {
        if self.is_expert() {
            Axis::EXPERT
        } else {
            Axis::DENSE
        }
    }

    const fn is_expert(self) -> bool {
        self.contains(Axis::ExpertShard) || self.contains(Axis::Ep)
    }
}

impl fmt::Display for Axes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names: Vec<&str> = self.iter().map(Axis::name).collect();
        f.pad(&if names.is_empty() { "no axis".to_owned() } else { names.join(" × ") })
    }
}
