//! The reducer: gradients become ready in hooks, full buckets are started in order, and the end of the same
//! backward waits for them.
//!
//! On CPU the hooks and the end-of-backward callback run on the thread that called `backward`, on CUDA on
//! the device's autograd thread; either way one at a time, under the mutex that holds the [`Reducer`].
//!
//! The way of one gradient: [`backward`] sees a backward begin, [`watch`] looks whether the model is what was wrapped,
//! [`backward`] brings each gradient to its view; [`ready`] says which buckets that fills; [`exchange`] starts them, waits for
//! them at the end, and hears what the ranks tell each other ([`notes`], [`findings`]); [`delivery`] hands them out.
//!
//! Gradients are views of the flat storage. Where the gradient was undefined before this backward, libtorch's
//! AccumulateGrad takes the incoming tensor as it is, and the hook copies it to its view (one read, one
//! write); where it was the view already (accumulation), AccumulateGrad adds in place and nothing is copied.
//!
//! Source: the order of events is that of PyTorch's `csrc/distributed/c10d/reducer.cpp`.

mod backward;
mod delivery;
mod exchange;
mod findings;
pub(crate) mod fingerprint;
mod finite;
pub(crate) mod inside;
mod landing;
pub(crate) mod notes;
mod ready;
pub(crate) mod statistics;
mod watch;
mod witness;

use std::sync::{Arc, Mutex, Weak};
use std::time::{Duration, Instant};

use phalanx_comm::{recorder, Group, Mark, Region};

use crate::diloco::Local;
use crate::hooks::Hooked;
use crate::part::Refusal;
use crate::shard::access;
use crate::shim::{self, Variable};
use crate::store::{Storage, Store};
use crate::{DdpOptions, Error, Result};
use backward::Run;
pub(crate) use findings::is_due;
use notes::{Head, Notes, Tail};
use statistics::{Statistics, Window};

/// State of data-parallel training; shared by the hooks, the `Ddp` and the optimizer.
#[derive(Debug)]
#[expect(
    clippy::struct_excessive_bools,
    reason = "what the caller has switched on, and what is settled"
)]
pub(crate) struct Reducer {
    pub(crate) store: Store,
    pub(crate) options: DdpOptions,
    /// How buckets are exchanged, where that is not one plain reduction.
    pub(crate) hooked: Option<Hooked>,
    /// Ranks that train by themselves between averagings, where they do.
    pub(crate) local: Option<Local>,
    /// Off inside `no_sync`: gradients accumulate in their views, nothing is sent.
    pub(crate) synchronising: bool,
    /// What `Ddp::backward` asks of the backward that it is about to start.
    pub(crate) asked: Option<Asked>,
    /// Whether every exchange says which ranks take part.
    pub(crate) joining: bool,
    /// The program's own number of the step, for the names of collectives.
    pub(crate) step: Option<u64>,
    /// What came of the last exchange, for the optimizer.
    pub(crate) outcome: Outcome,
    /// The first error inside a hook, with its type: libtorch passes on only the text.
    failed: Option<Error>,
    /// The backward that is going on.
    run: Option<Run>,
    accumulated: Accumulated,
    /// By variable: whether it trains, as all ranks have it.
    agreed: Vec<bool>,
    /// With `static_graph`, by parameter, once the first backward has counted: how many gradients it gets.
    counts: Option<Vec<u32>>,
    /// Whether parameters may have been stepped on by themselves: the next exchange compares them.
    is_suspect: bool,
    /// Whether the order in which gradients become ready is settled.
    is_order_settled: bool,
    pub(crate) head: Notes<{ Head::LEN }>,
    /// Over whose ranks heads are told, if not over those of the store's group.
    pub(crate) weighing: Option<Group>,
    tail: Notes<{ Tail::LEN }>,
    /// By parameter, with `find_unused_parameters` or `static_graph`: whether any rank has a gradient for it.
    used: Option<Region<i32>>,
    clock: Clock,
}

/// What a backward is asked to do beyond plain `loss.backward()`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Asked {
    pub(crate) weight: f64,
    pub(crate) sync: bool,
}

/// What came of the last exchange.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// There was none since the last step.
    #[default]
    Nothing,
    /// Gradients to step on; by parameter, whether it has one.
    Reduced(Vec<bool>),
    /// They were not finite and are gone.
    Skipped,
    /// As that, and the step is to be an error, on all ranks of the model that this one has a part of.
    Refused(Refusal),
}

/// What has accumulated since the last exchange.
#[derive(Debug, Default)]
struct Accumulated {
    /// By parameter: whether its view holds a gradient that was not exchanged.
    pending: Vec<bool>,
    weight: f64,
    is_weighted: bool,
    /// Of micro-batches that were exchanged by themselves: how many, the first parameter in which this rank found what is not finite with how many elements, on a GPU
    /// flags by bucket, and bytes as [`Run`] has them.
    exchange_count: usize,
    non_finite: Option<(usize, usize)>,
    flags: Vec<(usize, tch::Tensor)>,
    bytes: u64,
    sent: u64,
    /// The variables after the last accumulation, and a sample of each parameter.
    states: Vec<Variable>,
    samples: Vec<u32>,
    /// By parameter: how often its view had been changed in place at the end of the last backward.
    views: Vec<u32>,
}

impl Accumulated {
    /// It was exchanged, or given up.
    fn clear(&mut self) {
        let Self { pending, states, samples, views, .. } = std::mem::take(self);
        *self = Self { pending, states, samples, views, ..Self::default() };
        self.pending.fill(false);
    }
}

/// What is timed from exchange to exchange.
#[derive(Debug)]
struct Clock {
    /// The end of the last exchange.
    ended: Instant,
    /// What the optimizer waited for other ranks since.
    waited: Duration,
    /// Of the last exchange on the GPU: the first start, the end of backward's own work, the end.
    marks: Option<[Mark; 3]>,
    statistics: Statistics,
    window: Window,
}

/// The reducer behind its lock.
pub(crate) type Shared = Arc<Mutex<Reducer>>;

/// Locks the reducer.
pub(crate) fn lock(shared: &Shared) -> Result<std::sync::MutexGuard<'_, Reducer>> {
    shared.lock().map_err(|_poisoned| Error::Poisoned)
}

/// Adds a hook to every variable and sees this thread's backwards. The hooks hold the reducer weakly: the `Ddp`
/// owns it.
pub(crate) fn attach(shared: &Shared) -> Result<Vec<shim::Hook>> {
    let reducer = lock(shared)?;
    let mut hooks = Vec::with_capacity(reducer.store.model.variables.len());
    for (variable, named) in reducer.store.model.variables.iter().enumerate() {
        let weak = Arc::downgrade(shared);
        hooks.push(shim::Hook::add(&named.tensor, Box::new(move || on_gradient(&weak, variable)))?);
    }
    drop(reducer);
    settle_access(shared)?;
    witness::register(shared)?;
    Ok(hooks)
}

/// Operations that need parameters find who gathers them, where somebody does.
pub(crate) fn settle_access(shared: &Shared) -> Result<()> {
    let ids = lock(shared)?.store.gatherer_ids();
    ids.into_iter().try_for_each(|id| access::register(id, &Arc::downgrade(shared)))
}

/// Ends what [`attach`] began, but for the hooks.
pub(crate) fn detach(shared: &Shared) {
    witness::unregister(shared);
}

/// The reducers that a backward of this thread may reach, and `own`.
pub(crate) fn reachable(own: &Shared) -> Vec<Shared> {
    let mut all = witness::reducers();
    if !all.iter().any(|other| Arc::ptr_eq(other, own)) {
        all.push(Arc::clone(own));
    }
    all
}

/// The beginning of some backward on this thread.
fn on_beginning(shared: &Shared) {
    let weak = Arc::downgrade(shared);
    let Ok(mut reducer) = shared.lock() else { return };
    reducer.begin(&weak, true);
}

/// The hook of a variable. After the `Ddp` is gone it does nothing.
fn on_gradient(weak: &Weak<Mutex<Reducer>>, variable: usize) -> Result<(), String> {
    let Some(shared) = weak.upgrade() else { return Ok(()) };
    let mut reducer = lock(&shared).map_err(|error| error.to_string())?;
    reducer.begin(weak, false);
    if let Some(error) = &reducer.failed {
        return Err(error.to_string());
    }
    let outcome = reducer.gradient_came(variable);
    reducer.remember(outcome)
}

/// The end of a backward.
fn on_end(weak: &Weak<Mutex<Reducer>>) -> Result<(), String> {
    let Some(shared) = weak.upgrade() else { return Ok(()) };
    let mut reducer = lock(&shared).map_err(|error| error.to_string())?;
    if let Some(error) = &reducer.failed {
        return Err(error.to_string());
    }
    let outcome = reducer.finish();
    let is_good = !matches!(outcome, Err(Error::NonFinite { .. }));
    let told = reducer.remember(outcome);
    drop(reducer);
    if !is_good {
        // libtorch drops the callbacks behind one that fails, and the group is to stay good.
        finish_others(&shared);
    }
    told
}

/// Ends this backward for the other models that it reached.
fn finish_others(shared: &Shared) {
    for other in witness::reducers().iter().filter(|other| !Arc::ptr_eq(other, shared)) {
        let Ok(mut reducer) = other.lock() else { continue };
        if reducer.run.as_ref().is_some_and(|run| run.is_open && !run.is_over) {
            let outcome = reducer.finish();
            // The first error is the one that is told.
            drop(reducer.remember(outcome));
        }
    }
}

impl Reducer {
    /// Collective: allocates what notes need.
    pub(crate) fn new(mut store: Store, options: DdpOptions) -> Result<Self> {
        let head = Notes::new(&mut store.group)?;
        let tail = Notes::new(&mut store.group)?;
        let agreed =
            store.model.variables.iter().map(|named| named.tensor.requires_grad()).collect();
        let is_order_settled = options.ready_order.is_some() || !store.sharding.can_be_laid_anew();
        let mut reducer = Self {
            store,
            options,
            hooked: None,
            local: None,
            synchronising: true,
            asked: None,
            joining: false,
            step: None,
            outcome: Outcome::Nothing,
            failed: None,
            run: None,
            accumulated: Accumulated::default(),
            agreed,
            counts: None,
            is_suspect: false,
            is_order_settled,
            head,
            weighing: None,
            tail,
            used: None,
            clock: Clock {
                ended: Instant::now(),
                waited: Duration::ZERO,
                marks: None,
                statistics: Statistics::default(),
                window: Window::default(),
            },
        };
        reducer.heed_differences();
        reducer.fit()?;
        Ok(reducer)
    }

    /// Whether ranks may run different operations from here on.
    pub(crate) fn heed_differences(&mut self) {
        let differ = self.joining || self.options.find_unused_parameters;
        self.store.set_programs_differ(differ);
    }

    /// Makes what is kept by parameter as long as there are parameters. Collective.
    fn fit(&mut self) -> Result<()> {
        let count = self.store.model.parameters().len();
        self.accumulated.pending.resize(count, false);
        let tells = self.options.find_unused_parameters || self.options.static_graph;
        if tells && self.used.as_ref().is_none_or(|r| r.len() != count) {
            self.used = Some(self.store.group.allocate_on_host(count)?);
        }
        Ok(())
    }

    /// The error that stopped the last backward, with its type.
    pub(crate) fn take_failure(&mut self) -> Option<Error> {
        self.failed.take()
    }

    fn remember(&mut self, outcome: Result<()>) -> Result<(), String> {
        outcome.map_err(|error| {
            let text = error.to_string();
            self.fail(error);
            text
        })
    }

    /// Ends the running backward with an error. The other ranks are told, unless they have come to the same
    /// error or know it already.
    fn fail(&mut self, error: Error) {
        let is_told = !self.trains_locally() && matches!(error, Error::NonFinite { .. });
        let is_everywhere = is_told
            || matches!(
                error,
                Error::ParametersDiffer { .. }
                    | Error::ModelMismatch { .. }
                    | Error::RanksDiffer { .. }
                    | Error::Comm(_)
            );
        if !is_everywhere {
            self.store.group.abort(&error.to_string());
            self.weighing.iter_mut().for_each(|group| group.abort(&error.to_string()));
        }
        if let Some(part) = &mut self.store.part {
            // The ranks of other parts have not met it.
            part.abort(&error.to_string());
        }
        if let Some(run) = &mut self.run {
            run.is_over = true;
        }
        self.failed.get_or_insert(error);
    }

    /// Forgets gradients, and the weights that belong to them.
    pub(crate) fn release_gradients(&mut self) -> Result<()> {
        if self.accumulated.pending.contains(&true) {
            let known = &self.accumulated.samples;
            self.is_suspect |= !known.is_empty() && *known != self.store.samples();
        }
        self.store.clear_gradients()?;
        self.forget();
        Ok(())
    }

    /// Whether gradients have come that were not exchanged.
    pub(crate) fn has_pending(&self) -> bool {
        self.accumulated.pending.contains(&true)
    }

    /// Forgets what has accumulated, and what was exchanged.
    fn forget(&mut self) {
        self.accumulated.clear();
        self.store.storages.iter_mut().for_each(Storage::forget_sums);
        self.outcome = Outcome::Nothing;
    }

    /// Whether micro-batches that accumulate are exchanged by themselves.
    fn shards_accumulation(&self) -> bool {
        self.options.shard_accumulation && self.options.exchange && !self.trains_locally()
    }

    /// The optimizer waited this long for other ranks.
    pub(crate) fn waited(&mut self, time: Duration) {
        self.clock.waited += time;
    }

    /// What exchanges cost, on the GPU by the GPU's own clock.
    pub(crate) fn statistics(&mut self) -> Result<Statistics> {
        /// Backward has ended by then, or hangs.
        const LIMIT: Duration = Duration::from_secs(60);
        if let Some([first, waits, end]) = self.clock.marks.take() {
            let exposed = waits.time_until(&end, LIMIT)?;
            let exchange = first.time_until(&end, LIMIT)?;
            self.clock.statistics.exposed_comm = exposed;
            self.clock.statistics.exchange = exchange;
            self.clock.statistics.overlap = hidden(exposed, exchange);
        }
        Ok(self.clock.statistics.clone())
    }

    /// Compares the parameters over the ranks. Collective.
    pub(crate) fn compare_parameters(&mut self) -> Result<()> {
        self.store.meet()?;
        let hashes = fingerprint::of_parameters(&self.store)?;
        let compared = fingerprint::compare(&mut self.store, &hashes);
        if let Err(error @ Error::ParametersDiffer { .. }) = &compared {
            recorder::tell_shared_error(&error.to_string());
        }
        compared
    }

    /// The order in which gradients become ready, if it is settled.
    pub(crate) fn settled_order(&self) -> Option<Vec<String>> {
        self.is_order_settled.then(|| self.ready_order())
    }

    /// Lays everything as a run had it that goes on here. Collective.
    pub(crate) fn lay_in_order(&mut self, names: &[String]) -> Result<()> {
        self.store.lay_in_order(names, &self.options)?;
        self.is_order_settled = true;
        Ok(())
    }

    /// The first parameter whose gradient was not exchanged yet.
    pub(crate) fn pending(&self) -> Option<&str> {
        let slot = self.accumulated.pending.iter().position(|&pending| pending)?;
        Some(&self.store.model.parameter(slot).name)
    }

    /// The parameters' names in the order in which gradients become ready.
    pub(crate) fn ready_order(&self) -> Vec<String> {
        let parameters = self.store.plan.buckets.iter().flat_map(|bucket| &bucket.parameters);
        parameters.map(|&index| self.store.model.parameter(index).name.clone()).collect()
    }
}

/// The share of an exchange that nobody waited for.
fn hidden(exposed: Duration, exchange: Duration) -> f64 {
    if exchange.is_zero() {
        return 1.0;
    }
    (1.0 - exposed.as_secs_f64() / exchange.as_secs_f64()).clamp(0.0, 1.0)
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use phalanx_comm::testing::run_ranks;
    use phalanx_comm::Group;
    use tch::{Device, Kind, Tensor};

    use crate::{shim, Ddp, DdpOptions};

    /// A backward inside of a backward, as checkpointing makes it: when `a` has its gradient, `b` gets as many as
    /// `times` says, each from a backward of its own.
    fn nested(mut group: Group, times: usize, static_graph: bool) -> Result<[f64; 2], String> {
        let make = || Tensor::ones([40], (Kind::Float, Device::Cpu)).set_requires_grad(true);
        let (a, b) = (make(), make());
        let named = [("b", &b), ("a", &a)];
        let parameters = named.map(|(name, tensor)| (name.to_owned(), tensor.shallow_clone()));
        let options = DdpOptions { bucket_bytes: vec![1], static_graph, ..DdpOptions::default() };
        let _ddp = Ddp::from_tensors(parameters.into(), vec![], &mut group, options).unwrap();
        let factor = if group.rank() == 0 { 1.0 } else { 2.0 };
        let inside = Mutex::new(b.shallow_clone());
        let _hook = shim::Hook::add(
            &a,
            Box::new(move || {
                for _ in 0..times {
                    let inner = inside.lock().map_err(|error| error.to_string())?;
                    // Hooks run without recording.
                    let loss = tch::with_grad(|| (&*inner * factor).sum(Kind::Float));
                    loss.f_backward().map_err(|error| error.to_string())?;
                }
                Ok(())
            }),
        )
        .unwrap();
        let mut means = [0.0; 2];
        for _ in 0..2 {
            for variable in [&a, &b] {
                shim::gradient_set(variable, None).unwrap();
            }
            let loss = (&a * (10.0 * factor)).sum(Kind::Float);
            loss.f_backward().map_err(|error| error.to_string())?;
            means = [&a, &b].map(|variable| variable.grad().double_value(&[7]));
        }
        Ok(means)
    }

    #[test]
    fn a_backward_inside_of_a_backward_is_a_part_of_it() {
        let all = run_ranks(2, |group| nested(group, 1, false));
        assert_eq!(all, [Ok([15.0, 1.5]), Ok([15.0, 1.5])]);
    }

    #[test]
    fn several_gradients_of_one_parameter_take_a_static_graph() {
        let all = run_ranks(2, |group| nested(group, 2, true));
        assert_eq!(all, [Ok([15.0, 3.0]), Ok([15.0, 3.0])]);
        let errors = run_ranks(2, |group| nested(group, 2, false).unwrap_err());
        assert!(errors.iter().any(|error| error.contains("set static_graph")), "{errors:?}");
    }
}
