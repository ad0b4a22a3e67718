//! Which variables are experts', and the two `Ddp`s of a model with experts.

use phalanx_comm::Group;
use phalanx_ddp_core::{Ddp, DdpOptions};
use tch::{nn, Tensor};

use crate::error::Result;
use crate::mesh::Axes;
use crate::split::MeshGroups;

/// A model's variables: those that all ranks of a stage have, and those of the experts of this rank. By name, in its order.
///
/// An expert's gradient has the tokens of all `ep` ranks in it when its backward ends; what is left is to add those of ranks with the same experts
/// (`Axes::EXPERT_DP`), and to divide by the weights of all ranks (`Axes::DP_CP`), for each of them has contributed. [`wrap`](Self::wrap) makes a `Ddp` for either.
///
/// # Example
/// ```
/// # use phalanx_comm::{Group, GroupOptions};
/// # use phalanx_ddp_core::{DdpOptions, Sync};
/// # use phalanx_model_parallel::expert::Parameters;
/// # use phalanx_model_parallel::{Mesh, Shape};
/// # use tch::{nn, nn::Module, Device, Kind, Tensor};
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// # let mut world = Group::single(GroupOptions::default())?;
/// # let mut groups = Mesh::new(Shape::default(), 1)?.split(&mut world)?;
/// let vs = nn::VarStore::new(Device::Cpu);
/// # let embedding = nn::linear(vs.root() / "embedding", 3, 3, Default::default());
/// # let expert = nn::linear(vs.root() / "layers" / 0 / "experts" / 0, 3, 3, Default::default());
/// // … the model …
/// let wrapped = Parameters::of(&vs).wrap(&mut groups, &DdpOptions::default())?;
/// # let loss = expert.forward(&embedding.forward(&Tensor::ones([4, 3], (Kind::Float, Device::Cpu)))).sum(Kind::Float);
/// # let tokens = 4.0;
/// // A loss that reaches both is weighed alike in both.
/// wrapped.shared.backward(&loss, tokens, Sync::Reduce)?;
/// # Ok(())
/// # }
/// ```
#[derive(Debug, Default)]
pub struct Parameters {
    /// Of all ranks.
    pub shared: Vec<(String, Tensor)>,
    /// Of experts.
    pub experts: Vec<(String, Tensor)>,
    /// What is not trained.
    pub buffers: Vec<(String, Tensor)>,
}

/// A model with experts, data-parallel.
#[derive(Debug)]
pub struct Wrapped {
    /// Variables that all ranks of a stage have, over `Axes::DP_CP`.
    pub shared: Ddp,
    /// Those of this rank's experts, over `Axes::EXPERT_DP`; none on a stage without experts.
    pub experts: Option<Ddp>,
}

impl Parameters {
    /// Those of `vs`; what was never meant to train (`zeros_no_train`) is a buffer, and frozen weights are what they were.
    #[must_use]
    pub fn of(vs: &nn::VarStore) -> Self {
        let mut all: Vec<(String, Tensor)> = vs.variables().into_iter().collect();
        let trainable = vs.trainable_variables();
        let is_trainable =
            |tensor: &Tensor| trainable.iter().any(|other| other.data_ptr() == tensor.data_ptr());
        all.sort_by(|left, right| left.0.cmp(&right.0));
        let mut parameters = Self::default();
        for (name, tensor) in all {
            let list = match (is_trainable(&tensor), is_of_expert(&name)) {
                (false, _) => &mut parameters.buffers,
                (true, true) => &mut parameters.experts,
                (true, false) => &mut parameters.shared,
            };
            list.push((name, tensor));
        }
        parameters
    }

    /// Wraps both, over groups of the mesh ([`Axes::DP_CP`], [`Axes::EXPERT_DP`]). Collective.
    ///
    /// # Errors
    /// [`NoSuchGroup`](crate::Error::NoSuchGroup); as [`Ddp::new`].
    pub fn wrap(self, groups: &mut MeshGroups, options: &DdpOptions) -> Result<Wrapped> {
        let Self { shared, experts, buffers } = self;
        let all: &mut Group = groups.get(Axes::DP_CP)?;
        let shared = Ddp::from_tensors(shared, buffers, all, options.clone())?;
        if experts.is_empty() {
            return Ok(Wrapped { shared, experts: None });
        }
        let alike = groups.get(Axes::EXPERT_DP)?;
        // Ranks are counted otherwise there: `shard_ranks` of the one is none of the other's.
        let options = DdpOptions { shard_ranks: None, ..options.clone() };
        let experts = Ddp::from_tensors(experts, Vec::new(), alike, options)?;
        experts.weigh_over(groups.get(Axes::DP_CP)?)?;
        Ok(Wrapped { shared, experts: Some(experts) })
    }
}

/// Whether a variable of this name is an expert's: one under `experts`.
#[must_use]
pub fn is_of_expert(name: &str) -> bool {
    name.split('.').any(|part| part == "experts")
}
