//! Activation checkpointing: what a part of the network keeps for its backward is let go, and computed again when the
//! backward comes there.
//!
//! A part that is [`checkpointed`] keeps its inputs, and nothing of what it computes on the way: memory for activations falls from that of all
//! layers to one input a layer and the inside of one layer, for a second forward of each.
//!
//! The graph is the same as without: the same nodes, with the same edges. Only what nodes *save* is taken out of it: in its place
//! stands a number, and the first node that needs its tensor back has the closure run again, with the random state, the autocast
//! setting and the inputs that it had, and its tensors given out by number. So gradients are bit-equal, each parameter gets its gradient
//! once in a backward, also where several checkpointed parts use it, and [`Ddp`](crate::Ddp) sees a backward like any other: in every
//! stage of ZeRO, with accumulation, `no_sync`, `find_unused_parameters`, autocast and loss scaling. Inputs need not require gradients.
//!
//! Parts may contain parts: the inner one's inputs are then what the outer one recomputes.
//!
//! # What a closure must be
//! It depends on its inputs, on what it owns, on the default random generators and on autocast alone, for it runs twice (with `n` parts
//! around it, 1 + `n` times more). It owns what it uses, and may run on another thread (the backward of a GPU's model does): clone parameters
//! with `shallow_clone`, or give the module to a [`Checkpointed`]. It does not change its inputs in place, and runs no backward over its
//! own operations. As with PyTorch's, neither is found: a tensor that it captures and that is changed in place between forward and backward (its inputs
//! are looked at), nor random numbers drawn on a GPU that none of its inputs is on.
//!
//! What it does besides computing happens again. Batch normalisation updates its running statistics, which PyTorch lets happen twice:
//! [`Checkpoint::keeping`] puts such buffers back after each recomputation, and [`is_recomputing`] tells a closure which run it is in.
//! [`SyncBatchNorm`](crate::SyncBatchNorm) asks that by itself.
//!
//! # Errors
//! An error or panic in a recomputation, or one that comes out differently (other shapes, more or fewer operations), is the error of that
//! backward, and ranks that wait for it hear its text.
//!
//! # Source
//! Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost"; the way is that of PyTorch's `torch/utils/checkpoint.py` with
//! `use_reentrant=False`.

mod environment;
mod module;
mod segment;

use tch::{Device, Tensor};

use crate::shim::autograd::Saved;
use crate::{autograd, Error, Result};
use environment::Environment;
pub use module::Checkpointed;
pub use segment::is_recomputing;
use segment::{Closure, Content, Input, Segment};

/// Runs `closure` on `inputs`; what it saves for backward is not kept but computed again.
///
/// Where nothing is recorded (`no_grad`) it only runs the closure. The closure gets as many tensors as there are inputs;
/// tensors that it computes with and that are not among them are its own.
///
/// # Determinism
/// Outputs and gradients have the bits that they have without checkpointing, on the same machine.
///
/// # Errors
/// The closure's own; [`Error::Recompute`] if it changes an input in place; libtorch's own.
///
/// # Example
/// ```
/// use phalanx_ddp_core::recompute;
/// use tch::{nn, nn::Module, Device, Kind, Tensor};
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let vs = nn::VarStore::new(Device::Cpu);
/// let weight = vs.root().randn_standard("weight", &[16, 16]);
/// let x = Tensor::randn([8, 16], (Kind::Float, Device::Cpu));
/// let w = weight.shallow_clone(); // for the closure, which owns what it uses
/// let outputs = recompute::checkpointed(&[&x], move |inputs| {
///     let hidden = inputs[0].f_matmul(&w)?.f_gelu("none")?;
///     Ok(vec![hidden.f_dropout(0.1, true)?])
/// })?;
/// outputs[0].square().sum(Kind::Float).backward(); // gelu and dropout run again in here
/// assert!(weight.grad().defined());
/// # Ok(())
/// # }
/// ```
pub fn checkpointed(
    inputs: &[&Tensor],
    closure: impl Fn(&[Tensor]) -> Result<Vec<Tensor>> + Send + 'static,
) -> Result<Vec<Tensor>> {
    Checkpoint::default().run(inputs, closure)
}

/// As [`checkpointed`], of one tensor.
///
/// # Errors
/// As [`checkpointed`].
pub fn checkpointed_one(
    input: &Tensor,
    closure: impl Fn(&Tensor) -> Result<Tensor> + Send + 'static,
) -> Result<Tensor> {
    Checkpoint::default().run_one(input, closure)
}

/// How a part is checkpointed, where that is not said by its closure.
#[derive(Debug, Default)]
pub struct Checkpoint {
    buffers: Vec<Tensor>,
}

impl Checkpoint {
    /// Puts `buffers` (running statistics) back after each recomputation, so that they change once.
    #[must_use]
    pub fn keeping(mut self, buffers: &[&Tensor]) -> Self {
        self.buffers.extend(buffers.iter().map(|buffer| buffer.shallow_clone()));
        self
    }

    /// The same once more.
    fn again(&self) -> Self {
        Self { buffers: self.buffers.iter().map(Tensor::shallow_clone).collect() }
    }

    /// As [`checkpointed_one`].
    ///
    /// # Errors
    /// As [`checkpointed`].
    pub fn run_one(
        &self,
        input: &Tensor,
        closure: impl Fn(&Tensor) -> Result<Tensor> + Send + 'static,
    ) -> Result<Tensor> {
        let mut outputs = self.run(&[input], move |inputs| Ok(vec![closure(&inputs[0])?]))?;
        outputs.pop().ok_or_else(|| Error::Recompute { reason: "no output".to_owned() })
    }

    /// As [`checkpointed`].
    ///
    /// # Errors
    /// As [`checkpointed`].
    pub(crate) fn run(
        &self,
        inputs: &[&Tensor],
        closure: impl Fn(&[Tensor]) -> Result<Vec<Tensor>> + Send + 'static,
    ) -> Result<Vec<Tensor>> {
        let clones: Vec<Tensor> = inputs.iter().map(|tensor| tensor.shallow_clone()).collect();
        let Self { buffers } = self.again();
        let environment = Environment::of_this_thread(&devices(inputs))?;
        // Kept as the node of an operation would keep them: by a part around this one, if there is one.
        let kept = inputs.iter().map(|tensor| {
            Ok(Input { saved: Saved::new(tensor)?, requires_grad: tensor.requires_grad() })
        });
        let kept = kept.collect::<Result<Vec<_>>>()?;
        let before = autograd::versions(inputs)?;
        let segment = Segment::new();
        let (outputs, expected) =
            segment.record(|| segment::keeping(&buffers, is_recomputing(), || closure(&clones)))?;
        if let Some(index) = autograd::changed(&before, &autograd::versions(inputs)?) {
            let reason = format!("it changed input {index} in place; work on a copy of it");
            return Err(Error::Recompute { reason });
        }
        let environment = environment.used()?;
        let closure: Closure = Box::new(closure);
        if !expected.is_empty() {
            segment.finish(Content::new(kept, environment, closure, (buffers, expected)));
        }
        Ok(outputs)
    }
}

/// The CPU, and the GPUs of tensors: each once.
fn devices(tensors: &[&Tensor]) -> Vec<Device> {
    let mut devices = vec![Device::Cpu];
    for device in tensors.iter().map(|tensor| tensor.device()) {
        if device.is_cuda() && !devices.contains(&device) {
            devices.push(device);
        }
    }
    devices
}
