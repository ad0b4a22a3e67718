//! What a hook keeps from exchange to exchange, as it is saved.

use std::collections::BTreeMap;

use tch::Tensor;

use crate::Result;

/// Numbers and tensors by name.
///
/// Tensors belong to parameters, not to buckets: their names end with the parameter's. So a state fits any order of buckets and any ZeRO stage.
#[derive(Debug, Default)]
pub struct State {
    /// The same on every rank.
    pub numbers: BTreeMap<String, f64>,
    /// As far as this rank has them.
    pub tensors: BTreeMap<String, Kept>,
}

/// A tensor of a state.
#[derive(Debug)]
pub enum Kept {
    /// The same on every rank.
    Alike(Tensor),
    /// Each rank has its own: the whole has an axis of ranks in front. On another number of ranks each gets the mean of all.
    ByRank(Tensor),
}

impl Kept {
    /// What this rank has.
    pub fn tensor(&self) -> &Tensor {
        match self {
            Self::Alike(tensor) | Self::ByRank(tensor) => tensor,
        }
    }
}

impl State {
    /// With memory of its own.
    pub(crate) fn copied(self) -> Result<Self> {
        let copy = |kept: Kept| -> Result<Kept> {
            Ok(match kept {
                Kept::Alike(tensor) => Kept::Alike(tensor.f_detach_copy()?),
                Kept::ByRank(tensor) => Kept::ByRank(tensor.f_detach_copy()?),
            })
        };
        let tensors = self.tensors.into_iter().map(|(name, kept)| Ok((name, copy(kept)?)));
        Ok(Self { tensors: tensors.collect::<Result<_>>()?, ..self })
    }

    /// The part of it whose names begin with `prefix` and a slash, without that: what a hook inside of another one gets.
    #[must_use]
    pub(crate) fn inner(&self, prefix: &str) -> Self {
        let own = |name: &str| Some(name.strip_prefix(prefix)?.strip_prefix('/')?.to_owned());
        let numbers = self.numbers.iter().filter_map(|(name, &n)| Some((own(name)?, n))).collect();
        let copy = |kept: &Kept| match kept {
            Kept::Alike(tensor) => Kept::Alike(tensor.shallow_clone()),
            Kept::ByRank(tensor) => Kept::ByRank(tensor.shallow_clone()),
        };
        let tensors = self.tensors.iter().filter_map(|(name, t)| Some((own(name)?, copy(t))));
        Self { numbers, tensors: tensors.collect() }
    }

    /// Takes in the state of a hook inside of this one.
    pub(crate) fn put(&mut self, prefix: &str, inner: Self) {
        let numbers = inner.numbers.into_iter().map(|(name, n)| (format!("{prefix}/{name}"), n));
        self.numbers.extend(numbers);
        let tensors = inner.tensors.into_iter().map(|(name, t)| (format!("{prefix}/{name}"), t));
        self.tensors.extend(tensors);
    }
}
