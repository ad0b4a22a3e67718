//! Experts beside the layers that all ranks have: they are on other ranks, and so have a `Ddp` and an optimizer of their own.

use std::collections::BTreeMap;

use anyhow::{anyhow, Result};
use phalanx_comm::Group;
use phalanx_ddp_core::collective::TensorGroup;
use phalanx_ddp_core::optim::Optimizer;
use phalanx_ddp_core::{Cut, Ddp, DdpOptions, ModelPart};
use phalanx_model_parallel::expert::{is_of_expert, ExpertParallel, Parameters, Wrapped};
use phalanx_model_parallel::tensor::TensorParallel;
use phalanx_model_parallel::{Axes, Mesh, MeshGroups};
use tch::nn;

/// Groups that layers of experts and their gradients need.
const GROUPS: [Axes; 4] = [Axes::EP, Axes::DP_CP, Axes::EXPERT_DP, Axes::EXPERT_MODEL];

/// The ranks that have other experts, and those that have the same.
#[derive(Debug)]
pub(crate) struct ExpertPlace {
    parallel: ExpertParallel,
    groups: MeshGroups,
}

/// Which variables are parts of larger tensors.
type Cuts = BTreeMap<String, Cut>;

/// This rank's experts, data-parallel.
#[derive(Debug)]
pub(crate) struct Experts {
    pub(super) ddp: Ddp,
    pub(super) optimizer: Optimizer,
}

impl ExpertPlace {
    /// Makes the groups. Collective over the world.
    pub(crate) fn new(mesh: &Mesh, tp: &TensorParallel, world: &mut Group) -> Result<Self> {
        let mut groups = mesh.split_into(world, &GROUPS)?;
        let group = TensorGroup::new(groups.take(Axes::EP)?);
        Ok(ExpertPlace { parallel: ExpertParallel { group, tp: tp.clone() }, groups })
    }

    /// What layers need to know.
    pub(crate) fn parallel(&self) -> ExpertParallel {
        self.parallel.clone()
    }

    /// Wraps what all ranks of a stage have, and this rank's experts: a `Ddp` each. Collective.
    pub(crate) fn wrap(&mut self, vs: &nn::VarStore, options: &DdpOptions) -> Result<(Ddp, Ddp)> {
        let Wrapped { shared, experts } = Parameters::of(vs).wrap(&mut self.groups, options)?;
        let experts = experts.ok_or_else(|| anyhow!("a stage of this rank has no experts"))?;
        Ok((shared, experts))
    }

    /// Says which part of all experts this rank has. Collective over the world.
    pub(crate) fn set_part(&mut self, ddp: &Ddp, world: &mut Group, cuts: Cuts) -> Result<()> {
        let model = self.groups.get(Axes::EXPERT_MODEL)?;
        Ok(ddp.set_part(ModelPart { model, world, cuts })?)
    }
}

/// Of experts, and of everything else.
pub(crate) fn divided(cuts: Cuts) -> (Cuts, Cuts) {
    cuts.into_iter().partition(|(name, _)| is_of_expert(name))
}
