//! A module each of whose forwards is checkpointed.

use std::sync::{Arc, Mutex, PoisonError};

use tch::nn::ModuleT;
use tch::Tensor;

use super::Checkpoint;
use crate::{Error, Result};

/// Owns a module and checkpoints each of its forwards: what a network of tch's modules needs, a line for each part.
///
/// A closure of [`checkpointed`](super::checkpointed) owns what it uses; this owns the module for all of them.
///
/// # Example
/// ```
/// use phalanx_ddp_core::recompute::Checkpointed;
/// use tch::{nn, nn::ModuleT, Device, Kind, Tensor};
///
/// let vs = nn::VarStore::new(Device::Cpu);
/// let block = |name: &str| {
///     let path = vs.root() / name;
///     nn::seq_t().add(nn::linear(&path / "fc", 16, 16, Default::default())).add_fn(Tensor::tanh)
/// };
/// let net = nn::seq_t().add(Checkpointed::new(block("a"))).add(Checkpointed::new(block("b")));
/// let x = Tensor::ones([4, 16], (Kind::Float, Device::Cpu));
/// net.forward_t(&x, true).sum(Kind::Float).backward();
/// ```
#[derive(Debug)]
pub struct Checkpointed<M> {
    module: Arc<Mutex<M>>,
    /// Behind a lock for its tensors alone: who shares the module shares this.
    checkpoint: Mutex<Checkpoint>,
}

impl<M: Send + 'static> Checkpointed<M> {
    /// Takes the module over.
    #[must_use]
    pub fn new(module: M) -> Self {
        Self { module: Arc::new(Mutex::new(module)), checkpoint: Mutex::default() }
    }

    /// As [`Checkpoint::keeping`]: running statistics of the module that are to change once.
    #[must_use]
    pub fn keeping(self, buffers: &[&Tensor]) -> Self {
        let checkpoint = self.checkpoint().keeping(buffers);
        Self { checkpoint: Mutex::new(checkpoint), ..self }
    }

    fn checkpoint(&self) -> Checkpoint {
        self.checkpoint.lock().unwrap_or_else(PoisonError::into_inner).again()
    }

    /// The module as it is, without a checkpoint.
    pub fn bare<T>(&self, body: impl FnOnce(&M) -> T) -> T {
        body(&self.module.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Checkpoints `forward`, which is a forward of the module in whatever way: with several inputs, settings of its own, errors.
    ///
    /// # Errors
    /// As [`checkpointed`](super::checkpointed).
    pub fn run(
        &self,
        inputs: &[&Tensor],
        forward: impl Fn(&M, &[Tensor]) -> Result<Vec<Tensor>> + Send + 'static,
    ) -> Result<Vec<Tensor>> {
        let module = Arc::clone(&self.module);
        self.checkpoint().run(inputs, move |inputs| {
            // A thread that panicked in a forward has not changed the module.
            let module = module.lock().unwrap_or_else(PoisonError::into_inner);
            forward(&module, inputs)
        })
    }
}

impl<M: ModuleT + 'static> Checkpointed<M> {
    /// As the module's own `forward_t`, with the error as a value.
    ///
    /// # Errors
    /// As [`checkpointed`](super::checkpointed).
    pub fn f_forward_t(&self, xs: &Tensor, train: bool) -> Result<Tensor> {
        let mut outputs =
            self.run(&[xs], move |module, inputs| Ok(vec![module.forward_t(&inputs[0], train)]))?;
        outputs.pop().ok_or_else(|| Error::Recompute { reason: "no output".to_owned() })
    }
}

impl<M: ModuleT + 'static> ModuleT for Checkpointed<M> {
    /// # Panics
    /// With the text of the error, as tch's own modules do.
    fn forward_t(&self, xs: &Tensor, train: bool) -> Tensor {
        self.f_forward_t(xs, train).unwrap_or_else(|error| panic!("{error}"))
    }
}
