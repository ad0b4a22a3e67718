//! Custom autograd functions: a forward and a backward of your own, as closures.
//!
//! libtorch records the function as one node of its graph. It is what layers stand on whose backward libtorch cannot
//! derive: those that talk to other ranks ([`SyncBatchNorm`](crate::SyncBatchNorm)), or that know a shorter way.
//!
//! * The **forward** runs at once and without recording. It returns the outputs, and what else the backward needs: tensors
//!   through [`Saving::save`], which libtorch keeps as it keeps those of its own nodes (a change in place is found, what is saved is
//!   freed with the graph, an output can be saved without keeping itself alive), and a value of any type.
//! * The **backward** gets the gradients of the outputs, `None` where there is none, and returns those of the inputs, `None` where there is
//!   none. It runs on the thread of the backward, which on a GPU is not the caller's. Its errors and panics end that backward with
//!   their text, and the ranks of a [`Ddp`](crate::Ddp) that wait for it hear it; `Ddp::backward` returns them with their type.
//!
//! A backward of a backward (`create_graph`) is refused, unless the function is made with
//! [`Function::twice_differentiable`].
//!
//! # Source
//! `torch/csrc/autograd/custom_function.h`, whose outputs that are inputs, views and integers are handled by the same code.

use tch::Tensor;

use crate::reduce::inside;
use crate::shim::autograd::{self as shim, Call};
use crate::{Error, Result};

/// Records `backward` as the backward of `forward`: [`Function::apply`] of a function that can be differentiated once.
///
/// # Errors
/// Those of the forward; [`Error::Function`] if it changed an input in place; libtorch's own.
///
/// # Example
/// The sign in the forward, and in the backward the gradient as if it had not been there (a straight-through estimator):
/// ```
/// use phalanx_ddp_core::autograd;
/// use tch::{Device, Kind, Tensor};
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let x = Tensor::from_slice(&[0.5_f32, -3.0]).set_requires_grad(true);
/// let outputs = autograd::function(
///     "sign",
///     &[&x],
///     |saving, inputs| {
///         saving.save(inputs[0]);
///         Ok((vec![inputs[0].f_sign()?], ()))
///     },
///     |backward, gradients| {
///         let Some(gradient) = &gradients[0] else { return Ok(vec![None]) };
///         // Only where it was not saturated.
///         let inside = backward.saved[0].f_abs()?.f_le(1.0)?;
///         Ok(vec![Some(gradient.f_mul(&inside)?)])
///     },
/// )?;
/// outputs[0].sum(Kind::Float).backward();
/// assert_eq!(Vec::<f32>::try_from(x.grad())?, [1.0, 0.0]);
/// # Ok(())
/// # }
/// ```
pub fn function<S: Send + 'static>(
    name: &str,
    inputs: &[&Tensor],
    forward: impl FnOnce(&mut Saving, &[&Tensor]) -> Result<(Vec<Tensor>, S)>,
    backward: impl FnMut(&Backward<'_, S>, &[Option<Tensor>]) -> Result<Vec<Option<Tensor>>>
        + Send
        + 'static,
) -> Result<Vec<Tensor>> {
    Function::new(name).apply(inputs, forward, backward)
}

/// What the forward leaves for the backward.
#[derive(Debug, Default)]
pub struct Saving {
    tensors: Vec<Tensor>,
}

impl Saving {
    /// Keeps an input, an output or a tensor made on the way; the backward finds them in this order.
    pub fn save(&mut self, tensor: &Tensor) {
        self.tensors.push(tensor.shallow_clone());
    }
}

/// What a backward has besides gradients.
#[derive(Debug)]
#[non_exhaustive]
pub struct Backward<'a, S> {
    /// What the forward saved.
    pub saved: Vec<Tensor>,
    /// By input: whether anybody wants its gradient. What is not wanted need not be computed.
    pub needs_input_grad: Vec<bool>,
    /// What the forward returned besides its outputs.
    pub state: &'a S,
}

/// A custom function, before it is applied.
#[derive(Clone, Debug)]
pub struct Function<'a> {
    name: &'a str,
    twice: bool,
}

impl<'a> Function<'a> {
    /// `name` is what libtorch's and this crate's errors call it.
    #[must_use]
    pub fn new(name: &'a str) -> Self {
        Self { name, twice: false }
    }

    /// The backward is made of operations that are themselves differentiable, with respect to the gradients and to what was
    /// saved: a backward with `create_graph` records it. Without this it is an error, for a backward that talks to
    /// other ranks would come out silently wrong.
    #[must_use]
    pub fn twice_differentiable(self) -> Self {
        Self { twice: true, ..self }
    }

    /// Runs `forward` without recording, and records `backward` if any input requires gradients. Returns the outputs; the
    /// backward and its state are dropped when the graph is freed.
    ///
    /// An output that is an input becomes a view of it. Integer outputs have no gradients; call `detach` on others that
    /// have none.
    ///
    /// # Errors
    /// As [`function`].
    pub fn apply<S: Send + 'static>(
        &self,
        inputs: &[&Tensor],
        forward: impl FnOnce(&mut Saving, &[&Tensor]) -> Result<(Vec<Tensor>, S)>,
        mut backward: impl FnMut(&Backward<'_, S>, &[Option<Tensor>]) -> Result<Vec<Option<Tensor>>>
            + Send
            + 'static,
    ) -> Result<Vec<Tensor>> {
        let before = versions(inputs)?;
        let mut saving = Saving::default();
        let (outputs, state) = {
            let _unrecorded = tch::no_grad_guard();
            forward(&mut saving, inputs)?
        };
        if let Some(index) = changed(&before, &versions(inputs)?) {
            let reason =
                format!("its forward changed input {index} in place; work on a copy of it");
            return Err(Error::Function { function: self.name.to_owned(), reason });
        }
        let (name, twice) = (self.name.to_owned(), self.twice);
        let reducers = inside::of_this_thread();
        let recorded = move |call: Call| {
            let Call { saved, gradients, needs, is_recording } = call;
            let outcome = match is_recording && !twice {
                true => Err(Error::Function {
                    function: name.clone(),
                    reason: "its backward cannot be differentiated (create_graph); use \
                             Function::twice_differentiable if it can"
                        .to_owned(),
                }),
                false => {
                    let count = needs.len();
                    let given = Backward { saved, needs_input_grad: needs, state: &state };
                    caught(&name, || backward(&given, &gradients))
                        .and_then(|gradients| counted(&name, gradients, count))
                }
            };
            outcome.map_err(|error| inside::fail_running(&reducers, error))
        };
        shim::function(self.name, inputs, &outputs, &saving.tensors, Box::new(recorded))
    }
}

/// A panic of `body` as an error.
fn caught<T>(function: &str, body: impl FnOnce() -> Result<T>) -> Result<T> {
    let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(body));
    outcome.unwrap_or_else(|panic| {
        let reason = format!("panic in its backward: {}", crate::shim::panic_text(&*panic));
        Err(Error::Function { function: function.to_owned(), reason })
    })
}

/// An error unless there is a gradient, or none, for each of `count` inputs.
fn counted(
    function: &str,
    gradients: Vec<Option<Tensor>>,
    count: usize,
) -> Result<Vec<Option<Tensor>>> {
    if gradients.len() == count {
        return Ok(gradients);
    }
    let reason = format!(
        "its backward returned {} gradients for {count} inputs; return one for each, None where there is none",
        gradients.len()
    );
    Err(Error::Function { function: function.to_owned(), reason })
}

/// How often each tensor was changed in place.
pub(crate) fn versions<T: std::borrow::Borrow<Tensor>>(tensors: &[T]) -> Result<Vec<u32>> {
    tensors.iter().map(|tensor| shim::version(tensor.borrow())).collect()
}

/// The first that differs.
pub(crate) fn changed(before: &[u32], after: &[u32]) -> Option<usize> {
    before.iter().zip(after).position(|(before, after)| before != after)
}
