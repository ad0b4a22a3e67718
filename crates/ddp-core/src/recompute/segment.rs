//! One checkpointed part: what is kept of it, and how its saved tensors come back.
//!
//! A stack on each thread says what becomes of a tensor that autograd saves. While a part's forward runs, its *recording* is on top: the
//! tensor is let go, and [`Numbered`] is saved in its place. While it is recomputed, a *collection* is on top: tensors are collected in
//! the order in which they are saved, which is that of the forward. Parts inside of it put their own recordings above it, so that it
//! sees their inputs and nothing of their inside, in both runs alike.
//!
//! A recomputed tensor is handed out once and forgotten. What nobody fetched goes with its node, or at the end of that backward.

use std::cell::RefCell;
use std::panic::{catch_unwind, AssertUnwindSafe};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use tch::{Device, Kind, Tensor};

use super::environment::Environment;
use crate::reduce::inside::{self, Reducers};
use crate::shim::autograd::{self, Packed, Saved};
use crate::{shim, Error, Result};

pub(super) type Closure = Box<dyn Fn(&[Tensor]) -> Result<Vec<Tensor>> + Send>;

/// What becomes of the tensors that autograd saves on this thread.
enum Top {
    /// They are numbered, and let go.
    Recording { segment: Segment, expected: Vec<Description> },
    /// They are kept, in order.
    Collection(Vec<Collected>),
}

thread_local! {
    static STACK: RefCell<Vec<Top>> = const { RefCell::new(Vec::new()) };
}

/// Whether a checkpointed closure that runs on this thread is running again: what it does besides computing was done the
/// first time.
#[must_use]
pub fn is_recomputing() -> bool {
    STACK.with_borrow(|stack| stack.iter().any(|top| matches!(top, Top::Collection(_))))
}

/// Takes its entry from the stack when it goes, also in a panic.
struct Pushed;

impl Pushed {
    fn new(top: Top) -> Result<Self> {
        autograd::saving(Some(pack))?;
        STACK.with_borrow_mut(|stack| stack.push(top));
        Ok(Self)
    }

    /// The entry.
    fn pop(self) -> Option<Top> {
        std::mem::ManuallyDrop::new(self).take()
    }

    fn take(&self) -> Option<Top> {
        let (top, is_last) = STACK.with_borrow_mut(|stack| (stack.pop(), stack.is_empty()));
        if is_last {
            if let Err(error) = autograd::saving(None) {
                tracing::error!(%error, "autograd goes on to hand over what it saves");
            }
        }
        top
    }
}

impl Drop for Pushed {
    fn drop(&mut self) {
        drop(self.take());
    }
}

/// What is kept in the place of a tensor that autograd saves.
fn pack(tensor: Tensor) -> Result<Box<dyn Packed>, String> {
    STACK.with_borrow_mut(|stack| -> Result<Box<dyn Packed>, String> {
        match stack.last_mut() {
            None => Err("a tensor was saved outside of every checkpointed closure".to_owned()),
            Some(Top::Recording { segment, expected }) => {
                expected.push(Description::of(&tensor)?);
                let segment = segment.clone();
                Ok(Box::new(Numbered { segment, number: expected.len() - 1 }))
            }
            Some(Top::Collection(collected)) => {
                let one = Collected::new(tensor)?;
                let again = one.again();
                collected.push(one);
                Ok(Box::new(Held(Mutex::new(again))))
            }
        }
    })
}

/// What a tensor looks like.
#[derive(Clone, PartialEq, Debug)]
struct Description {
    shape: Vec<i64>,
    kind: Kind,
    device: Device,
}

impl Description {
    fn of(tensor: &Tensor) -> Result<Self, String> {
        let kind = tensor.f_kind().map_err(|error| error.to_string())?;
        Ok(Self { shape: tensor.size(), kind, device: tensor.device() })
    }
}

/// A tensor that a recomputation saved.
struct Collected {
    tensor: Tensor,
    /// How often it was changed in place when it was saved.
    version: u32,
}

impl Collected {
    fn new(tensor: Tensor) -> Result<Self, String> {
        let version = autograd::version(&tensor).map_err(|error| error.to_string())?;
        Ok(Self { tensor, version })
    }

    fn again(&self) -> Self {
        Self { tensor: self.tensor.shallow_clone(), version: self.version }
    }

    /// The tensor, unless it was changed since.
    fn get(self) -> Result<Tensor> {
        if autograd::version(&self.tensor)? == self.version {
            return Ok(self.tensor);
        }
        Err(Error::Recompute {
            reason: format!(
                "it changes a tensor of shape {:?} in place after an operation has saved it for its backward; \
                 work on a copy of it",
                self.tensor.size()
            ),
        })
    }
}

/// In the graph of a recomputation, which goes when its closure ends.
struct Held(Mutex<Collected>);

impl Packed for Held {
    fn unpack(&self) -> Result<Tensor, String> {
        locked(&self.0).again().get().map_err(|error| error.to_string())
    }
}

/// A poisoned lock is one of a closure that panicked; what is behind it is whole.
fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// In the place of the saved tensor of that number.
struct Numbered {
    segment: Segment,
    number: usize,
}

impl Packed for Numbered {
    fn unpack(&self) -> Result<Tensor, String> {
        let mut content = locked(&self.segment.0);
        let Some(content) = content.as_mut() else {
            let reason =
                "a backward over its own operations began before it ended; run that outside of it";
            return Err(Error::Recompute { reason: reason.to_owned() }.to_string());
        };
        let fetched = content.fetch(&self.segment, self.number);
        fetched.map_err(|error| inside::fail_running(&content.reducers, error))
    }
}

impl Drop for Numbered {
    /// The node is done: its tensor is not needed again.
    fn drop(&mut self) {
        // Locked elsewhere: then it goes at the end of the backward.
        if let Ok(mut content) = self.segment.0.try_lock() {
            if let Some(place) =
                content.as_mut().and_then(|content| content.recomputed.get_mut(self.number))
            {
                *place = None;
            }
        }
    }
}

/// An input of a closure.
#[derive(Debug)]
pub(super) struct Input {
    pub(super) saved: Saved,
    pub(super) requires_grad: bool,
}

impl Input {
    /// For a recomputation: cut off from the graph, and recording as the original does.
    fn tensor(&self) -> Result<Tensor> {
        let tensor = self.saved.get()?.f_detach()?;
        Ok(if self.requires_grad { tensor.f_set_requires_grad(true)? } else { tensor })
    }
}

/// What is kept of a part.
pub(super) struct Content {
    inputs: Vec<Input>,
    environment: Environment,
    closure: Closure,
    buffers: Vec<Tensor>,
    /// What the forward saved.
    expected: Vec<Description>,
    /// By number, while a backward runs.
    recomputed: Vec<Option<Collected>>,
    reducers: Reducers,
}

impl Content {
    pub(super) fn new(
        inputs: Vec<Input>,
        environment: Environment,
        closure: Closure,
        (buffers, expected): (Vec<Tensor>, Expected),
    ) -> Self {
        Self {
            inputs,
            environment,
            closure,
            buffers,
            expected: expected.0,
            recomputed: Vec::new(),
            reducers: inside::of_this_thread(),
        }
    }

    /// The saved tensor of a number, recomputed if it is not there.
    fn fetch(&mut self, segment: &Segment, number: usize) -> Result<Tensor> {
        if self.recomputed.get(number).is_none_or(Option::is_none) {
            self.recomputed = self.recompute()?.into_iter().map(Some).collect();
            segment.forget_at_end()?;
        }
        match self.recomputed.get_mut(number).and_then(Option::take) {
            Some(collected) => collected.get(),
            None => Err(self.differs(self.recomputed.len())),
        }
    }

    fn recompute(&self) -> Result<Vec<Collected>> {
        // Before anything else: this may recompute a part around this one.
        let inputs = self.inputs.iter().map(Input::tensor).collect::<Result<Vec<_>>>()?;
        let entered = self.environment.enter()?;
        let pushed = Pushed::new(Top::Collection(Vec::new()))?;
        let outcome = keeping(&self.buffers, true, || {
            self.environment.recording(|| caught(|| (self.closure)(&inputs)))
        });
        let collected = match pushed.pop() {
            Some(Top::Collection(collected)) => collected,
            _ => Vec::new(),
        };
        drop(entered);
        // The graph goes here; what it saved stays in the collection.
        drop(outcome?);
        self.compare(&collected)?;
        Ok(collected)
    }

    /// An error unless a recomputation saved what the forward did.
    fn compare(&self, collected: &[Collected]) -> Result<()> {
        if collected.len() != self.expected.len() {
            return Err(self.differs(collected.len()));
        }
        for (number, (one, expected)) in collected.iter().zip(&self.expected).enumerate() {
            let actual = Description::of(&one.tensor).map_err(Error::closure)?;
            if actual != *expected {
                let show = |d: &Description| {
                    format!("{:?} of shape {:?} on {:?}", d.kind, d.shape, d.device)
                };
                let reason = format!(
                    "saved tensor {number} was {} in the forward and is {} when computed again; the closure must depend on its \
                     inputs and the random generators alone",
                    show(expected),
                    show(&actual),
                );
                return Err(Error::Recompute { reason });
            }
        }
        Ok(())
    }

    fn differs(&self, actual: usize) -> Error {
        let reason = format!(
            "the forward saved {} tensors for backward and its recomputation {actual}; the closure must do the same operations \
             each time, on parameters that are frozen or not as they were",
            self.expected.len(),
        );
        Error::Recompute { reason }
    }
}

/// What a forward saved.
pub(super) struct Expected(Vec<Description>);

impl Expected {
    /// Nothing needs to be kept: nothing was recorded, or no backward needs what was computed.
    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

/// A part; what is kept of it is there once its forward has ended.
#[derive(Clone)]
pub(super) struct Segment(Arc<Mutex<Option<Content>>>);

impl Segment {
    pub(super) fn new() -> Self {
        Self(Arc::default())
    }

    /// Runs the forward; also says what it saved.
    pub(super) fn record<T>(&self, body: impl FnOnce() -> Result<T>) -> Result<(T, Expected)> {
        let pushed = Pushed::new(Top::Recording { segment: self.clone(), expected: Vec::new() })?;
        let outcome = body()?;
        match pushed.pop() {
            Some(Top::Recording { expected, .. }) => Ok((outcome, Expected(expected))),
            _ => Ok((outcome, Expected(Vec::new()))),
        }
    }

    /// From here on the part can be recomputed.
    pub(super) fn finish(&self, content: Content) {
        *locked(&self.0) = Some(content);
    }

    /// What nobody fetches in the running backward goes at its end, also if it fails.
    fn forget_at_end(&self) -> Result<()> {
        struct Forget(Weak<Mutex<Option<Content>>>);
        impl Drop for Forget {
            fn drop(&mut self) {
                let Some(segment) = self.0.upgrade() else { return };
                // Locked: another backward is using it, and forgets by itself.
                if let Ok(mut content) = segment.try_lock() {
                    if let Some(content) = content.as_mut() {
                        content.recomputed = Vec::new();
                    }
                };
            }
        }
        let forget = Forget(Arc::downgrade(&self.0));
        shim::end_of_backward(Box::new(move || {
            let _held_by_libtorch = &forget;
            Ok(())
        }))
    }
}

/// Runs `body` and, if `puts_back`, gives `buffers` the values that they had.
pub(super) fn keeping<T>(
    buffers: &[Tensor],
    puts_back: bool,
    body: impl FnOnce() -> Result<T>,
) -> Result<T> {
    if !puts_back || buffers.is_empty() {
        return body();
    }
    let copies = buffers.iter().map(Tensor::f_detach_copy).collect::<Result<Vec<_>, _>>()?;
    let outcome = body();
    for (buffer, copy) in buffers.iter().zip(&copies) {
        shim::write(buffer, copy)?;
    }
    outcome
}

/// A panic of `body` as an error.
fn caught<T>(body: impl FnOnce() -> Result<T>) -> Result<T> {
    catch_unwind(AssertUnwindSafe(body)).unwrap_or_else(|panic| {
        let reason = format!("panic while it ran again: {}", shim::panic_text(&*panic));
        Err(Error::Recompute { reason })
    })
}

#[cfg(test)]
mod tests {
    #![expect(unsafe_code, reason = "gate: tensors whose memory tells when it is freed")]

    use std::sync::atomic::{AtomicUsize, Ordering};

    use tch::{Device, Kind, Tensor};

    use super::super::checkpointed_one;
    use super::*;

    /// Tells how many of its like live.
    struct Alive(Arc<AtomicUsize>);

    impl Drop for Alive {
        fn drop(&mut self) {
            self.0.fetch_sub(1, Ordering::SeqCst);
        }
    }

    /// Ones, whose memory is counted while it lives.
    fn counted(alive: &Arc<AtomicUsize>) -> Tensor {
        alive.fetch_add(1, Ordering::SeqCst);
        let mut values = vec![1.0_f32; 8];
        let start = values.as_mut_ptr().cast();
        let keep = Box::new((values, Alive(Arc::clone(alive))));
        // SAFETY: the vector's elements, which live as long as `keep`.
        unsafe { shim::tensor_over_memory(start, 8, Kind::Float, Device::Cpu, keep) }.unwrap()
    }

    /// Two products, each of which saves a factor.
    fn part(input: &Tensor, alive: &Arc<AtomicUsize>) -> Tensor {
        let alive = Arc::clone(alive);
        let closure = move |x: &Tensor| Ok(x.f_mul(&counted(&alive))?.f_mul(&counted(&alive))?);
        checkpointed_one(input, closure).unwrap()
    }

    #[test]
    fn what_is_saved_lives_from_its_recomputation_to_its_node() {
        let alive = Arc::new(AtomicUsize::new(0));
        let x = Tensor::ones([8], (Kind::Float, Device::Cpu)).set_requires_grad(true);
        let first = part(&x, &alive);
        let seen = Arc::new(Mutex::new(Vec::new()));
        let (told, counter) = (Arc::clone(&seen), Arc::clone(&alive));
        let between = crate::autograd::function(
            "between",
            &[&first],
            |_, inputs| Ok((vec![inputs[0].shallow_clone()], ())),
            move |_, gradients| {
                locked(&told).push(counter.load(Ordering::SeqCst));
                Ok(vec![gradients[0].as_ref().map(Tensor::shallow_clone)])
            },
        );
        let second = part(&between.unwrap()[0], &alive);
        assert_eq!(alive.load(Ordering::SeqCst), 0, "the forward keeps nothing");
        let loss = second.sum(Kind::Float);
        for keeps_graph in [true, false] {
            drop(Tensor::run_backward(&[&loss], &[&x], keeps_graph, false));
            assert_eq!(alive.load(Ordering::SeqCst), 0, "after a backward nothing is left");
        }
        assert_eq!(*locked(&seen), [0, 0], "behind a part nothing of it is left");
    }

    /// A backward that needs a part of what was recomputed leaves nothing of the rest.
    #[test]
    fn what_nobody_fetches_goes_at_the_end_of_the_backward() {
        let alive = Arc::new(AtomicUsize::new(0));
        let x = Tensor::ones([8], (Kind::Float, Device::Cpu)).set_requires_grad(true);
        let counter = Arc::clone(&alive);
        let outputs = super::super::checkpointed(&[&x], move |inputs| {
            let product = |_| inputs[0].f_mul(&counted(&counter));
            Ok([0, 1].map(product).into_iter().collect::<Result<Vec<_>, _>>()?)
        });
        let outputs = outputs.unwrap();
        outputs[0].sum(Kind::Float).backward();
        assert_eq!(alive.load(Ordering::SeqCst), 0);
        drop(outputs);
    }
}
