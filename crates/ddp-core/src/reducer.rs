//! The reducer: gradients become ready in hooks, full buckets are started in order, and the end of the same
//! backward waits for them.
//!
//! On CPU the hooks and the end-of-backward callback run on the thread that called `backward`, on CUDA on
//! the device's autograd thread; either way one at a time, under the mutex that holds the [`Reducer`].
//!
//! Gradients are views of the flat storage. Where the gradient was undefined before this backward, libtorch's
//! AccumulateGrad takes the incoming tensor as it is, and the hook copies it to its view (one read, one
//! write); where it was the view already (accumulation), AccumulateGrad adds in place and nothing is copied.
//!
//! Source: the order of events is that of PyTorch's `csrc/distributed/c10d/reducer.cpp`.

use std::sync::{Arc, Mutex, Weak};
use std::time::{Duration, Instant};

use phalanx_comm::{Group, Mark, Region, Sum, Work};
use tch::{Device, Tensor};

use crate::flat::{Flat, Scale};
use crate::parameter::{Model, Named};
use crate::plan::Plan;
use crate::ready::Ready;
use crate::shim::{self, GradientPlace};
use crate::{Error, Result, Zero};

/// Parameters that an error names; the rest is counted.
const NAMES_SHOWN: usize = 10;

/// Where the time of the last exchanged backward went.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StepTimes {
    /// Time that backward waited for the exchange after its last gradient was ready: what the exchange
    /// costs, as far as waiting goes.
    pub exposed_comm: Duration,
    /// From the first bucket's start to the end of the last.
    pub exchange: Duration,
    /// Buckets exchanged.
    pub bucket_count: usize,
}

/// What the gradients of this backward are multiplied with after they were summed.
#[derive(Debug)]
enum Divisor {
    /// One over the world size.
    WorldSize,
    /// One over the sum of all ranks' weights, which is on its way.
    Pending(Work<'static>),
    /// Known.
    Known(Scale),
}

/// State of data-parallel training; shared by the hooks, the `Ddp` and the optimizer.
#[derive(Debug)]
#[expect(
    clippy::struct_excessive_bools,
    reason = "independent switches: what is sent, and whether anything was"
)]
pub(crate) struct Reducer {
    pub(crate) group: Group,
    pub(crate) model: Model,
    pub(crate) plan: Plan,
    /// By storage.
    pub(crate) gradients: Vec<Flat>,
    /// By storage.
    pub(crate) parameters: Vec<Flat>,
    pub(crate) zero: Zero,
    times: StepTimes,
    /// By parameter.
    views: Vec<Tensor>,
    ready: Ready,
    /// Off inside `no_sync`: gradients accumulate in their views, nothing is sent.
    pub(crate) synchronising: bool,
    /// Off: buckets are marked but not sent (to measure a step without exchange).
    pub(crate) exchange: bool,
    broadcast_buffers: bool,
    works: Vec<Work<'static>>,
    first_start: Option<Instant>,
    /// The first start on the GPU.
    first_mark: Option<Mark>,
    /// On the GPU: the first start, the end of backward's own work, the end of the exchange.
    marks: Option<[Mark; 3]>,
    divisor: Divisor,
    weight: Region<f64>,
    /// Held twice while libtorch has the end-of-backward callback of the running backward.
    armed: Option<Arc<()>>,
    /// Whether a backward has finished since the last optimizer step.
    pub(crate) reduced: bool,
    /// The first error inside a hook, with its type: libtorch passes on only the text.
    failed: Option<Error>,
}

/// What a [`Reducer`] is made from.
pub(crate) struct Parts {
    pub(crate) group: Group,
    pub(crate) model: Model,
    pub(crate) plan: Plan,
    pub(crate) gradients: Vec<Flat>,
    pub(crate) parameters: Vec<Flat>,
    pub(crate) views: Vec<Tensor>,
    pub(crate) options: crate::DdpOptions,
}

/// The reducer behind its lock.
pub(crate) type Shared = Arc<Mutex<Reducer>>;

/// Locks the reducer.
pub(crate) fn lock(shared: &Shared) -> Result<std::sync::MutexGuard<'_, Reducer>> {
    shared.lock().map_err(|_poisoned| Error::Poisoned)
}

/// Adds a hook to every parameter. The hooks hold the reducer weakly: the `Ddp` owns it.
pub(crate) fn hook_all(shared: &Shared) -> Result<Vec<shim::Hook>> {
    let reducer = lock(shared)?;
    let hook = |(index, parameter): (usize, &Named)| {
        let weak = Arc::downgrade(shared);
        shim::Hook::add(&parameter.tensor, Box::new(move || on_gradient(&weak, index)))
    };
    reducer.model.parameters.iter().enumerate().map(hook).collect()
}

/// The hook of a parameter. After the `Ddp` is gone it does nothing.
fn on_gradient(weak: &Weak<Mutex<Reducer>>, index: usize) -> Result<(), String> {
    let Some(shared) = weak.upgrade() else { return Ok(()) };
    let mut reducer = lock(&shared).map_err(|error| error.to_string())?;
    let outcome = reducer.gradient_ready(weak, index);
    reducer.remember(outcome)
}

/// The end of a backward.
fn on_end(weak: &Weak<Mutex<Reducer>>) -> Result<(), String> {
    let Some(shared) = weak.upgrade() else { return Ok(()) };
    let mut reducer = lock(&shared).map_err(|error| error.to_string())?;
    let outcome = reducer.finish();
    reducer.remember(outcome)
}

impl Reducer {
    pub(crate) fn new(parts: Parts) -> Result<Self> {
        let Parts { mut group, model, plan, gradients, parameters, views, options } = parts;
        let bucket_of = plan.places.iter().map(|place| place.bucket).collect();
        let ready = Ready::new(bucket_of, plan.buckets.len());
        let weight = group.allocate_on_host(1)?;
        Ok(Self {
            group,
            model,
            plan,
            gradients,
            parameters,
            zero: options.zero,
            times: StepTimes::default(),
            views,
            ready,
            synchronising: true,
            exchange: options.exchange,
            broadcast_buffers: options.broadcast_buffers,
            works: Vec::new(),
            first_start: None,
            first_mark: None,
            marks: None,
            divisor: Divisor::WorldSize,
            weight,
            armed: None,
            reduced: false,
            failed: None,
        })
    }

    /// Starts the sum of all ranks' weights: the next backward's gradients are divided by it.
    pub(crate) fn start_weight(&mut self, weight: f64) -> Result<()> {
        self.weight.write(0, &[weight]);
        self.divisor = if self.exchange {
            let sum = self.group.tagged("weight").all_reduce(self.weight.full(), Sum)?;
            Divisor::Pending(sum)
        } else {
            Divisor::Known(Scale(one_over(weight)))
        };
        Ok(())
    }

    /// The error that stopped the last backward, with its type.
    pub(crate) fn take_failure(&mut self) -> Option<Error> {
        self.failed.take()
    }

    fn remember(&mut self, outcome: Result<()>) -> Result<(), String> {
        outcome.map_err(|error| {
            let text = error.to_string();
            self.failed.get_or_insert(error);
            text
        })
    }

    fn gradient_ready(&mut self, weak: &Weak<Mutex<Self>>, index: usize) -> Result<()> {
        let variable = &self.model.parameters[index].tensor;
        match shim::gradient_place(variable, &self.views[index])? {
            GradientPlace::Undefined => return Ok(()),
            GradientPlace::InView => {}
            GradientPlace::Elsewhere => shim::gradient_move(variable, &self.views[index])?,
        }
        if !self.synchronising {
            return Ok(());
        }
        self.arm(weak)?;
        let startable = self.ready.mark(index).map_err(|twice| Error::GradientTwice {
            name: self.model.parameters[twice.parameter].name.clone(),
        })?;
        for bucket in startable {
            self.start(bucket)?;
        }
        Ok(())
    }

    /// Queues the end-of-backward callback at the first gradient of a backward.
    fn arm(&mut self, weak: &Weak<Mutex<Self>>) -> Result<()> {
        if let Some(token) = &self.armed {
            // One reference is ours; libtorch drops the callback's when a backward fails half-way.
            if Arc::strong_count(token) > 1 {
                return Ok(());
            }
            self.group.abort("a backward failed on this rank before its gradients were exchanged");
            self.reset();
            return Err(Error::BackwardAbandoned);
        }
        let token = Arc::new(());
        self.armed = Some(Arc::clone(&token));
        let weak = Weak::clone(weak);
        shim::end_of_backward(Box::new(move || {
            let _held_by_libtorch = &token;
            on_end(&weak)
        }))
    }

    fn start(&mut self, index: usize) -> Result<()> {
        if !self.exchange {
            return Ok(());
        }
        let scale = self.scale()?;
        let bucket = &self.plan.buckets[index];
        let gradients = &self.gradients[bucket.storage];
        let stream = shim::current_stream(gradients.device())?;
        self.group.set_stream(stream);
        if self.first_start.is_none() {
            self.first_start = Some(Instant::now());
            self.first_mark = self.group.mark()?;
        }
        self.group.tagged(&format!("bucket {index}"));
        let work = match self.zero {
            Zero::Off => gradients.all_reduce(&mut self.group, bucket.range.clone(), scale)?,
            Zero::One => gradients.reduce_scatter(&mut self.group, bucket.range.clone(), scale)?,
        };
        self.works.push(work);
        Ok(())
    }

    /// The factor of this backward; waits for the sum of weights, started before the backward.
    fn scale(&mut self) -> Result<Scale> {
        let scale = match std::mem::replace(&mut self.divisor, Divisor::WorldSize) {
            Divisor::WorldSize => Scale(one_over(count(self.group.world_size()))),
            Divisor::Known(scale) => scale,
            Divisor::Pending(work) => {
                work.wait()?;
                Scale(one_over(self.weight.read(0..1)[0]))
            }
        };
        self.divisor = Divisor::Known(scale);
        Ok(scale)
    }

    /// Checks that every bucket was started, waits for all, and gets ready for the next backward.
    fn finish(&mut self) -> Result<()> {
        if !self.ready.is_complete() {
            let error = self.missing_gradients();
            self.group.abort(&error.to_string());
            self.reset();
            return Err(error);
        }
        let last_gradient = Instant::now();
        let bucket_count = self.works.len();
        // The stream that the caller goes on with; the hooks may have had another one.
        let device = self.gradients.first().map_or(Device::Cpu, Flat::device);
        let stream = shim::current_stream(device)?;
        self.group.set_stream(stream);
        let waits = self.group.mark()?;
        for work in self.works.drain(..) {
            work.wait_on(stream)?;
        }
        self.marks = match (self.first_mark.take(), waits, self.group.mark()?) {
            (Some(first), Some(waits), Some(end)) => Some([first, waits, end]),
            _ => None,
        };
        self.times = StepTimes {
            exposed_comm: last_gradient.elapsed(),
            exchange: self.first_start.map_or(Duration::ZERO, |start| start.elapsed()),
            bucket_count,
        };
        self.reset();
        self.reduced = true;
        if self.broadcast_buffers && self.exchange {
            self.broadcast_model_buffers()?;
        }
        Ok(())
    }

    /// Where the time of the last exchanged backward went, on the GPU by the GPU's own clock.
    pub(crate) fn step_times(&mut self) -> Result<StepTimes> {
        /// Backward has ended by then, or hangs.
        const LIMIT: Duration = Duration::from_secs(60);
        if let Some([first, waits, end]) = self.marks.take() {
            self.times.exposed_comm = waits.time_until(&end, LIMIT)?;
            self.times.exchange = first.time_until(&end, LIMIT)?;
        }
        Ok(self.times)
    }

    fn reset(&mut self) {
        self.armed = None;
        self.works.clear();
        self.ready.reset();
        self.first_start = None;
        self.first_mark = None;
        self.divisor = Divisor::WorldSize;
    }

    fn missing_gradients(&self) -> Error {
        let missing = self.ready.missing();
        let shown = missing.iter().take(NAMES_SHOWN);
        let mut names: Vec<&str> =
            shown.map(|&index| self.model.parameters[index].name.as_str()).collect();
        if missing.len() > NAMES_SHOWN {
            names.push("…");
        }
        Error::MissingGradients {
            rank: self.group.rank(),
            count: missing.len(),
            total: self.model.parameters.len(),
            names: names.join(", "),
        }
    }

    /// Sends rank 0's buffers (running statistics) to all: what the next forward starts from.
    pub(crate) fn broadcast_model_buffers(&mut self) -> Result<()> {
        crate::broadcast::tensors(&mut self.group, "buffers", &self.model.buffers)
    }

    /// Makes all gradients undefined, so that the next backward needs no zeroed memory.
    pub(crate) fn release_gradients(&self) -> Result<()> {
        self.model.parameters.iter().try_for_each(|p| shim::gradient_clear(&p.tensor))
    }
}

#[expect(clippy::cast_precision_loss, reason = "world sizes are far below 2^53")]
fn count(ranks: usize) -> f64 {
    ranks as f64
}

/// 1/`total`, and 0 where nothing was weighed: the gradients are zero then, not NaN.
fn one_over(total: f64) -> f64 {
    if total > 0.0 {
        1.0 / total
    } else {
        0.0
    }
}
