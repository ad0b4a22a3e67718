//! Gradients of weights that are computed later than those of inputs: what zero-bubble schedules need.
//!
//! While a [`Deferred`] is active on the thread that runs a forward, the layers' products remember it; their backwards then compute the gradient
//! of the input alone, and leave that of the weight in it. [`Deferred::take`] hands out what was left, to be computed when there is time.
//!
//! # Source
//! Qi et al. 2023, "Zero Bubble Pipeline Parallelism", section 2.

use std::cell::RefCell;
use std::sync::{Arc, Mutex, PoisonError};

use phalanx_ddp_core::Result;
use tch::Tensor;

thread_local! {
    static ACTIVE: RefCell<Option<Deferred>> = const { RefCell::new(None) };
}

type Compute = Box<dyn FnOnce() -> Result<Vec<(Tensor, Tensor)>> + Send>;

/// Where gradients of weights are left. Clones are the same place.
#[derive(Clone, Default)]
pub struct Deferred {
    left: Arc<Mutex<Vec<Compute>>>,
}

/// Gradients of weights that were put off.
#[must_use = "weights whose gradients are not computed do not learn"]
pub struct WeightGradients {
    left: Vec<Compute>,
}

impl Deferred {
    /// Nothing yet.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Runs a forward whose products put off the gradients of their weights, to here.
    pub fn during<T>(&self, forward: impl FnOnce() -> T) -> T {
        struct Restore(Option<Deferred>);
        impl Drop for Restore {
            fn drop(&mut self) {
                ACTIVE.with(|active| *active.borrow_mut() = self.0.take());
            }
        }
        let before = ACTIVE.with(|active| active.borrow_mut().replace(self.clone()));
        let _restore = Restore(before);
        forward()
    }

    /// That of the forward that runs on this thread.
    #[must_use]
    pub fn active() -> Option<Self> {
        ACTIVE.with(|active| active.borrow().clone())
    }

    /// Leaves a computation of pairs of a weight and its gradient.
    pub fn leave(&self, compute: impl FnOnce() -> Result<Vec<(Tensor, Tensor)>> + Send + 'static) {
        self.left.lock().unwrap_or_else(PoisonError::into_inner).push(Box::new(compute));
    }

    /// What was left since the last call.
    pub fn take(&self) -> WeightGradients {
        let mut left = self.left.lock().unwrap_or_else(PoisonError::into_inner);
        WeightGradients { left: std::mem::take(&mut *left) }
    }
}

impl WeightGradients {
    /// Whether nothing was put off.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.left.is_empty()
    }

    /// Computes them, in the order in which they were put off: weights with their gradients, of the weights' kinds, of which a weight may have several.
    ///
    /// # Errors
    /// libtorch's own.
    pub fn compute(self) -> Result<Vec<(Tensor, Tensor)>> {
        let _unrecorded = tch::no_grad_guard();
        let mut gradients = Vec::new();
        for compute in self.left {
            for (weight, gradient) in compute()? {
                let gradient = gradient.f_to_kind(weight.kind())?;
                gradients.push((weight, gradient));
            }
        }
        Ok(gradients)
    }
}

impl std::fmt::Debug for Deferred {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let left = self.left.lock().unwrap_or_else(PoisonError::into_inner).len();
        f.debug_struct("Deferred").field("left", &left).finish()
    }
}

impl std::fmt::Debug for WeightGradients {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("WeightGradients").field("left", &self.left.len()).finish()
    }
}
