//! Which axes cross nodes.

use std::collections::BTreeSet;

use super::{Axes, Axis, Mesh};
use crate::error::{Error, Result};

/// Which node each rank is on, and what the links are called.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Nodes {
    of_rank: Vec<usize>,
    inside: String,
    between: String,
}

impl Nodes {
    /// Node after node takes so many consecutive ranks, as launchers place them.
    #[must_use]
    pub fn consecutive(ranks_per_node: &[usize]) -> Self {
        let ranks = ranks_per_node.iter().enumerate();
        Self::of_ranks(ranks.flat_map(|(node, count)| vec![node; *count]).collect())
    }

    /// `of_rank[r]` is the node of rank `r`, as `Group::node_rank` has it.
    #[must_use]
    pub fn of_ranks(of_rank: Vec<usize>) -> Self {
        let (inside, between) = ("the node's own links".to_owned(), "the network".to_owned());
        Self { of_rank, inside, between }
    }

    /// What joins ranks of a node (NVLink, shared memory) and nodes (InfiniBand, 10 Gb/s Ethernet), for messages.
    #[must_use]
    pub fn with_links(self, inside: impl Into<String>, between: impl Into<String>) -> Self {
        Self { inside: inside.into(), between: between.into(), ..self }
    }

    fn of(&self, ranks: &[usize]) -> BTreeSet<usize> {
        ranks.iter().map(|rank| self.of_rank[*rank]).collect()
    }
}

/// Where the groups of one axis are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AxisPlacement {
    /// The axis.
    pub axis: Axis,
    /// Its ranks.
    pub size: usize,
    /// Its groups.
    pub group_count: usize,
    /// Those that have ranks on several nodes.
    pub crossing_count: usize,
    /// On how many nodes the widest one is.
    pub nodes_max: usize,
    /// The slowest link that it uses; `None`: each of its ranks is alone.
    pub link: Option<String>,
}

/// A mesh on its nodes. Prints as a table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Placement {
    axes: Vec<AxisPlacement>,
    warning: Option<String>,
}

impl Placement {
    /// Every axis, from the outermost to the innermost.
    #[must_use]
    pub(crate) fn axes(&self) -> &[AxisPlacement] {
        &self.axes
    }

    /// Whether the axis has a group on several nodes.
    #[must_use]
    pub fn crosses(&self, axis: Axis) -> bool {
        self.axes.iter().any(|placed| placed.axis == axis && placed.crossing_count > 0)
    }

    /// Tensor parallelism across nodes: what it would use, and what to do instead. Every layer waits for it four times, so it
    /// is the one axis that is warned of.
    #[must_use]
    pub fn warning(&self) -> Option<&str> {
        self.warning.as_deref()
    }
}

impl Mesh {
    /// Which axes cross nodes, and whether `tp` is one of them.
    ///
    /// # Errors
    ///
    /// [`Error::NodesMismatch`].
    pub fn placement(&self, nodes: &Nodes) -> Result<Placement> {
        let (placed, world_size) = (nodes.of_rank.len(), self.world_size());
        if placed != world_size {
            return Err(Error::NodesMismatch { placed, world_size });
        }
        let axes = Axis::ALL.iter().map(|axis| self.axis_placement(*axis, nodes)).collect();
        Ok(Placement { axes, warning: self.tp_warning(nodes) })
    }

    fn axis_placement(&self, axis: Axis, nodes: &Nodes) -> AxisPlacement {
        let size = self.shape().size(axis);
        let groups = Axes::of(&[axis]).map(|axes| self.groups(axes)).unwrap_or_default();
        let counts: Vec<usize> = groups.iter().map(|group| nodes.of(group).len()).collect();
        let crossing_count = counts.iter().filter(|count| **count > 1).count();
        let link = if crossing_count > 0 { &nodes.between } else { &nodes.inside };
        let link = (size > 1).then(|| link.clone());
        let nodes_max = counts.iter().copied().max().unwrap_or(0);
        AxisPlacement { axis, size, group_count: groups.len(), crossing_count, nodes_max, link }
    }

    fn tp_warning(&self, nodes: &Nodes) -> Option<String> {
        let groups = self.groups(Axes::TP);
        let group = groups.iter().find(|group| nodes.of(group).len() > 1)?;
        let on: Vec<String> = nodes.of(group).iter().map(ToString::to_string).collect();
        Some(format!(
            "tp {}: ranks {} to {} are one group on nodes {}, so that every layer's sums would go over {} instead of {}; {}",
            group.len(),
            group[0],
            group[group.len() - 1],
            on.join(", "),
            nodes.between,
            nodes.inside,
            self.advice(nodes),
        ))
    }

    /// The largest part of `tp` whose groups all stay on a node.
    fn advice(&self, nodes: &Nodes) -> String {
        let tp = self.shape().tp;
        let ranks: Vec<usize> = (0..self.world_size()).collect();
        let stays = |size: &usize| ranks.chunks(*size).all(|group| nodes.of(group).len() == 1);
        match (2..tp).rev().filter(|size| tp.is_multiple_of(*size)).find(stays) {
            Some(size) => format!("tp {size} stays inside a node, with pp or dp {} times as large", tp / size),
            None => "no tp stays inside a node here: start consecutive ranks on the same node, or take tp 1".to_owned(),
        }
    }
}
