//! What is trained and what goes along: parameters with their names, frozen weights, and buffers; and whether they
//! still are what was wrapped.

use std::fmt::Write as _;
use std::sync::{Arc, Mutex, PoisonError};

use tch::nn::{self, Variables};
use tch::{Kind, Tensor};

use crate::shim::{self, Variable};
use crate::{Error, Result};

/// What parameters can be; a bucket's are of one of these.
pub(crate) const KINDS: [Kind; 4] = [Kind::Float, Kind::Double, Kind::Half, Kind::BFloat16];

/// Names that an error lists; the rest is counted.
const NAMES_SHOWN: usize = 10;

/// A tensor with its name. The tensor is a shallow clone: the same variable as the model's.
#[derive(Debug)]
pub(crate) struct Named {
    pub(crate) name: String,
    pub(crate) tensor: Tensor,
}

/// The tensors of a model.
#[derive(Debug)]
pub(crate) struct Model {
    /// Everything that can be trained, in registration order: the order that ranks agree on. The first
    /// ones are laid flat; see [`Model::laid`].
    pub(crate) variables: Vec<Named>,
    /// By variable: which parameter it is, if it has a place in the plan.
    slots: Vec<Option<usize>>,
    /// By parameter: which variable it is.
    laid: Vec<usize>,
    /// What is never trained (running statistics), sorted by name.
    pub(crate) buffers: Vec<Named>,
    /// Where variables come from, to see those that are added later.
    source: Option<Source>,
}

/// A `VarStore`'s variables.
#[derive(Debug)]
pub(crate) struct Source {
    variables: Arc<Mutex<Variables>>,
    /// How many names and how many trainable variables it had.
    counts: (usize, usize),
}

impl Model {
    /// Takes the variables of a `VarStore`.
    pub(crate) fn of_var_store(vs: &nn::VarStore) -> Result<Self> {
        Self::of_source(&Self::source_of(vs))
    }

    /// Where variables of a `VarStore` come from, also those that are added later.
    pub(crate) fn source_of(vs: &nn::VarStore) -> Source {
        let variables = Arc::clone(&vs.variables_);
        let counts = counts(&variables);
        Source { variables, counts }
    }

    /// Takes the variables that are there.
    pub(crate) fn of_source(source: &Source) -> Result<Self> {
        // Names come from a map with random order; sorting them makes every rank see one order.
        let (mut named, trainable) = {
            let variables = source.variables.lock().unwrap_or_else(PoisonError::into_inner);
            let named = variables.named_variables.iter();
            let named: Vec<(String, Tensor)> =
                named.map(|(name, tensor)| (name.clone(), tensor.shallow_clone())).collect();
            let trainable = variables.trainable_variables.iter();
            (named, trainable.map(|v| v.tensor.shallow_clone()).collect::<Vec<_>>())
        };
        named.sort_by(|a, b| a.0.cmp(&b.0));
        let mut keyed = Vec::with_capacity(named.len());
        for (name, tensor) in named {
            keyed.push((shim::identity(&tensor)?, Named { name, tensor }));
        }
        let (mut variables, mut taken) = (Vec::new(), Vec::new());
        for variable in trainable {
            let identity = shim::identity(&variable)?;
            // A variable known under two names is taken under the first.
            let Some(at) = keyed.iter().position(|(other, _)| *other == identity) else { continue };
            taken.push(identity);
            variables.push(keyed.remove(at).1);
        }
        let buffers =
            keyed.into_iter().filter(|(id, _)| !taken.contains(id)).map(|(_, b)| b).collect();
        let variables_of = Arc::clone(&source.variables);
        let counts = counts(&variables_of);
        Ok(Self::new(variables, buffers, Some(Source { variables: variables_of, counts })))
    }

    /// Takes tensors by hand: `parameters` in an order that is the same on every rank.
    pub(crate) fn of_tensors(
        parameters: Vec<(String, Tensor)>,
        buffers: Vec<(String, Tensor)>,
    ) -> Self {
        let named = |list: Vec<(String, Tensor)>| {
            list.into_iter().map(|(name, tensor)| Named { name, tensor }).collect()
        };
        Self::new(named(parameters), named(buffers), None)
    }

    fn new(variables: Vec<Named>, buffers: Vec<Named>, source: Option<Source>) -> Self {
        let slots = vec![None; variables.len()];
        let mut model = Self { variables, slots, laid: Vec::new(), buffers, source };
        model.lay_trained();
        model
    }

    /// Takes another model's tensors in, behind its own; says how many parameters there were before.
    pub(crate) fn extend(&mut self, other: Self) -> usize {
        self.slots.resize(self.slots.len() + other.variables.len(), None);
        self.variables.extend(other.variables);
        self.buffers.extend(other.buffers);
        self.buffers.sort_by(|a, b| a.name.cmp(&b.name));
        self.source = other.source;
        self.lay_trained()
    }

    /// What this model has and `known` has not.
    pub(crate) fn without(self, known: &Self) -> Self {
        let is_new = |named: &Named| {
            !known.variables.iter().chain(&known.buffers).any(|other| other.name == named.name)
        };
        let new = |list: Vec<Named>| list.into_iter().filter(|named| is_new(named)).collect();
        Self::new(new(self.variables), new(self.buffers), self.source)
    }

    /// Gives every variable that trains and is no parameter yet a number of its own; says how many there
    /// were before.
    pub(crate) fn lay_trained(&mut self) -> usize {
        let before = self.laid.len();
        for (index, variable) in self.variables.iter().enumerate() {
            if self.slots[index].is_none() && variable.tensor.requires_grad() {
                self.slots[index] = Some(self.laid.len());
                self.laid.push(index);
            }
        }
        before
    }

    /// The parameters that are laid flat, in the order of their numbers.
    pub(crate) fn parameters(&self) -> impl ExactSizeIterator<Item = &Named> {
        self.laid.iter().map(|&index| &self.variables[index])
    }

    /// Parameter `index`.
    pub(crate) fn parameter(&self, index: usize) -> &Named {
        &self.variables[self.laid[index]]
    }

    /// Which variable parameter `index` is.
    pub(crate) fn variable_of(&self, index: usize) -> usize {
        self.laid[index]
    }

    /// Which parameter a variable is.
    pub(crate) fn slot(&self, variable: usize) -> Option<usize> {
        self.slots[variable]
    }

    /// An error unless there is something to train, of kinds that can be trained, each once.
    pub(crate) fn check(&self) -> Result<()> {
        let mut seen: Vec<(u64, &str)> = Vec::new();
        for Named { name, tensor } in &self.variables {
            let kind = tensor.kind();
            if !KINDS.contains(&kind) {
                return Err(Error::UnsupportedKind { name: name.clone(), kind });
            }
            seen.push((shim::identity(tensor)?, name));
        }
        seen.sort_by_key(|(identity, _)| *identity);
        match seen.windows(2).find(|pair| pair[0].0 == pair[1].0) {
            Some(pair) => Err(Error::SameTensorTwice {
                first: pair[0].1.to_owned(),
                second: pair[1].1.to_owned(),
            }),
            None => Ok(()),
        }
    }

    /// One line for each tensor: what ranks must agree on.
    pub(crate) fn signature(&self) -> Vec<String> {
        let line = |role: &str, named: &Named| {
            let Named { name, tensor } = named;
            let (size, kind) = (tensor.size(), tensor.kind());
            let contiguous = tensor.is_contiguous();
            let strides =
                if contiguous { String::new() } else { format!(" strides {:?}", tensor.stride()) };
            format!("{role} {name} {size:?} {kind:?}{strides}")
        };
        let of_variable = |(index, named): (usize, &Named)| {
            line(if self.slots[index].is_some() { "parameter" } else { "frozen" }, named)
        };
        let variables = self.variables.iter().enumerate().map(of_variable);
        variables.chain(self.buffers.iter().map(|b| line("buffer", b))).collect()
    }

    /// What each variable is at this moment.
    pub(crate) fn states(&self) -> Result<Vec<Variable>> {
        let tensors: Vec<&Tensor> = self.variables.iter().map(|named| &named.tensor).collect();
        shim::variables(&tensors)
    }

    /// An error where variables were added to the `VarStore` after it was wrapped.
    pub(crate) fn check_complete(&self) -> Result<()> {
        let Some(source) = &self.source else { return Ok(()) };
        if counts(&source.variables) == source.counts {
            return Ok(());
        }
        let late = {
            let variables = source.variables.lock().unwrap_or_else(PoisonError::into_inner);
            let known = |name: &str| {
                let mut all = self.variables.iter().chain(&self.buffers);
                all.any(|named| named.name == name)
            };
            let mut late: Vec<String> = variables
                .named_variables
                .keys()
                .filter(|name| !known(name))
                .map(ToOwned::to_owned)
                .collect();
            late.sort();
            late
        };
        Err(Error::LateVariables { names: listed(late.iter().map(String::as_str).collect()) })
    }

    /// What no longer is what was wrapped, one line for each variable; `expected` is what they were.
    pub(crate) fn moved(&self, now: &[Variable], expected: &[Variable]) -> Option<String> {
        let mut report = String::new();
        for (named, (is, was)) in self.variables.iter().zip(now.iter().zip(expected)) {
            if is.data == was.data && is.scalar_type == was.scalar_type {
                continue;
            }
            let kind = named.tensor.kind();
            // Writing to a String cannot fail.
            _ = match is.scalar_type == was.scalar_type {
                true => writeln!(report, "  {}: it has other memory", named.name),
                false => writeln!(report, "  {}: its kind is {kind:?}, it was another", named.name),
            };
        }
        (!report.is_empty()).then_some(report)
    }
}

/// How many names and how many trainable variables there are.
fn counts(variables: &Arc<Mutex<Variables>>) -> (usize, usize) {
    let variables = variables.lock().unwrap_or_else(PoisonError::into_inner);
    (variables.named_variables.len(), variables.trainable_variables.len())
}

/// The first few names, with commas.
pub(crate) fn listed(mut names: Vec<&str>) -> String {
    if names.len() > NAMES_SHOWN {
        names.truncate(NAMES_SHOWN);
        names.push("…");
    }
    names.join(", ")
}
