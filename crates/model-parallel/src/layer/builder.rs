//! Where a layer's variables go, how they begin, and which parts of larger tensors they are.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

use phalanx_ddp_core::Cut;
use tch::{nn, Tensor};

use super::init::Init;
use super::random::Key;
use crate::error::Result;

/// Which variables of a model are parts of larger tensors, by name. Others are whole.
pub type Cuts = BTreeMap<String, Cut>;

/// Makes variables: a path of a `VarStore`, and what makes them begin as on one rank.
///
/// A variable's first values depend on the seed, its name and the place of each element in the whole tensor.
///
/// # Example
/// ```
/// use phalanx_model_parallel::layer::{Builder, Init};
/// use tch::{nn, Device};
///
/// let vs = nn::VarStore::new(Device::Cpu);
/// let builder = Builder::new(vs.root(), 1);
/// let h = &builder / "h";
/// let whole = (&h / "norm").whole("weight", &[8], Init::Constant(1.0))?;
/// let part = (&h / "fc").part("weight", &[6, 8], 0, vec![3..6], Init::Normal { std: 0.02 })?;
/// assert_eq!(part.size(), [3, 8]);
/// assert_eq!(builder.cuts()["h.fc.weight"].shape(), [6, 8]);
/// # Ok::<(), phalanx_model_parallel::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct Builder<'a> {
    path: nn::Path<'a>,
    key: Key,
    cuts: Arc<Mutex<Cuts>>,
}

impl<'a> Builder<'a> {
    /// Variables under `path`, whose first values come from `seed`.
    #[must_use]
    pub fn new(path: nn::Path<'a>, seed: u64) -> Self {
        Self { path, key: Key::of_seed(seed), cuts: Arc::default() }
    }

    /// The same under a path inside of this one.
    #[must_use]
    pub(crate) fn sub(&self, name: &impl ToString) -> Self {
        let path = &self.path / name.to_string();
        Self { path, key: self.key, cuts: Arc::clone(&self.cuts) }
    }

    /// Where variables go.
    #[must_use]
    pub fn path(&self) -> &nn::Path<'a> {
        &self.path
    }

    /// The full name of a variable here.
    #[must_use]
    pub fn name(&self, variable: &str) -> String {
        self.path.components().chain([variable]).collect::<Vec<_>>().join(".")
    }

    /// A key for random numbers of the layer: of dropout, say.
    #[must_use]
    pub fn key(&self) -> Key {
        self.key.named(&self.path.components().collect::<Vec<_>>().join("."))
    }

    /// A variable that every rank has whole.
    ///
    /// # Errors
    /// libtorch's own.
    ///
    /// # Panics
    /// Of a shape without dimensions, or with one that is empty.
    pub fn whole(&self, name: &str, shape: &[i64], init: Init) -> Result<Tensor> {
        let all = Cut::new(shape, 0, std::iter::once(0..shape[0]).collect());
        self.made(name, init, &all)
    }

    /// A variable that is `ranges` of dimension `dim` of a tensor of `shape`.
    ///
    /// # Errors
    /// libtorch's own.
    ///
    /// # Panics
    /// As [`Cut::new`].
    pub fn part(
        &self,
        name: &str,
        shape: &[i64],
        dim: usize,
        ranges: Vec<Range<i64>>,
        init: Init,
    ) -> Result<Tensor> {
        let cut = Cut::new(shape, dim, ranges);
        let variable = self.made(name, init, &cut)?;
        if cut.part_shape() != shape {
            let mut cuts = self.cuts.lock().unwrap_or_else(PoisonError::into_inner);
            cuts.insert(self.name(name), cut);
        }
        Ok(variable)
    }

    fn made(&self, name: &str, init: Init, cut: &Cut) -> Result<Tensor> {
        let values = init.part(self.key.named(&self.name(name)), cut)?;
        Ok(self.path.f_var_copy(name, &values)?)
    }

    /// Which variables are parts, of all that were made from this builder and those it came from.
    #[must_use]
    pub fn cuts(&self) -> Cuts {
        self.cuts.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

impl<'a, N: ToString> std::ops::Div<N> for &Builder<'a> {
    type Output = Builder<'a>;

    fn div(self, name: N) -> Builder<'a> {
        self.sub(&name)
    }
}

impl<'a, N: ToString> std::ops::Div<N> for Builder<'a> {
    type Output = Builder<'a>;

    fn div(self, name: N) -> Builder<'a> {
        self.sub(&name)
    }
}
