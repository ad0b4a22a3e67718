//! What is trained and what goes along: parameters in registration order with their names, and buffers.

use tch::{nn, Kind, Tensor};

use crate::{shim, Error, Result};

/// A tensor with its name. The tensor is a shallow clone: the same variable as the model's.
#[derive(Debug)]
pub(crate) struct Named {
    pub(crate) name: String,
    pub(crate) tensor: Tensor,
}

/// The tensors of a model.
#[derive(Debug)]
pub(crate) struct Model {
    /// Trainable ones, in registration order: the order that ranks agree on.
    pub(crate) parameters: Vec<Named>,
    /// The others (running statistics, frozen weights), sorted by name.
    pub(crate) buffers: Vec<Named>,
}

impl Model {
    /// Takes the variables of a `VarStore`: those that require gradients are parameters.
    pub(crate) fn of_var_store(vs: &nn::VarStore) -> Result<Self> {
        // Names come from a map with random order; sorting them makes every rank see one order.
        let mut named: Vec<(String, Tensor)> = vs.variables().into_iter().collect();
        named.sort_by(|a, b| a.0.cmp(&b.0));
        let mut keyed = Vec::with_capacity(named.len());
        for (name, tensor) in named {
            keyed.push((shim::identity(&tensor)?, Named { name, tensor }));
        }
        let mut parameters = Vec::new();
        for variable in vs.trainable_variables() {
            let identity = shim::identity(&variable)?;
            // A variable known under two names is taken under the first.
            let Some(at) = keyed.iter().position(|(other, _)| *other == identity) else { continue };
            if variable.requires_grad() {
                parameters.push(keyed.remove(at).1);
            }
        }
        let trained: Vec<u64> =
            parameters.iter().map(|p| shim::identity(&p.tensor)).collect::<Result<_>>()?;
        let buffers =
            keyed.into_iter().filter(|(id, _)| !trained.contains(id)).map(|(_, b)| b).collect();
        Ok(Self { parameters, buffers })
    }

    /// Takes tensors by hand: `parameters` in an order that is the same on every rank.
    pub(crate) fn of_tensors(
        parameters: Vec<(String, Tensor)>,
        buffers: Vec<(String, Tensor)>,
    ) -> Self {
        let named = |list: Vec<(String, Tensor)>| {
            list.into_iter().map(|(name, tensor)| Named { name, tensor }).collect()
        };
        Self { parameters: named(parameters), buffers: named(buffers) }
    }

    /// An error unless there is something to train, of kinds that can be trained.
    pub(crate) fn check(&self) -> Result<()> {
        if self.parameters.is_empty() {
            return Err(Error::NothingToTrain);
        }
        for Named { name, tensor } in &self.parameters {
            let kind = tensor.kind();
            if !matches!(kind, Kind::Float | Kind::Double | Kind::Half | Kind::BFloat16) {
                return Err(Error::UnsupportedKind { name: name.clone(), kind });
            }
        }
        Ok(())
    }

    /// One line for each tensor: what ranks must agree on.
    pub(crate) fn signature(&self) -> Vec<String> {
        let line = |role: &str, named: &Named| {
            let Named { name, tensor } = named;
            format!("{role} {name} {:?} {:?}", tensor.size(), tensor.kind())
        };
        let parameters = self.parameters.iter().map(|p| line("parameter", p));
        parameters.chain(self.buffers.iter().map(|b| line("buffer", b))).collect()
    }
}

/// Bytes of one element.
pub(crate) fn element_bytes(kind: Kind) -> usize {
    match kind {
        Kind::Double => 8,
        Kind::Half | Kind::BFloat16 => 2,
        _ => 4,
    }
}
