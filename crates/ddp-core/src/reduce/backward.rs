//! The local part of one backward: its beginning, and the copy of each gradient to its view in a
//! bucket.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, Weak};
use std::time::{Duration, Instant};

use phalanx_comm::{Mark, Work};

use super::finite;
use super::landing::Early;
use super::ready::Ready;
use super::{Asked, Outcome, Reducer};
use crate::shim::{self, GradientPlace, Variable};
use crate::store::{flat::Scale, pool::Taken};
use crate::{Error, NonFinite, Result, SparseGradients};

/// What is known of the backward that is going on.
#[derive(Debug)]
#[expect(clippy::struct_excessive_bools, reason = "what has happened in it, and what has not")]
pub(super) struct Run {
    /// Held twice while libtorch has the end-of-backward callback.
    token: Arc<()>,
    /// Whether it is a backward, and not an exchange by itself.
    pub(super) is_backward: bool,
    /// Whether this rank has nothing to add: it only follows the others.
    pub(super) is_shadow: bool,
    pub(super) began: Instant,
    /// Whether it exchanges gradients at its end.
    pub(super) sync: bool,
    /// Whether what it exchanges stays a sum to which others are added.
    pub(super) accumulates: bool,
    pub(super) asked: Option<Asked>,
    /// The variables when it began.
    states: Vec<Variable>,
    /// By parameter, where the graph was walked: whether it reaches it.
    reached: Option<Vec<bool>>,
    /// Whether the first gradient has come.
    pub(super) is_open: bool,
    /// Whether it has failed, and its error was told.
    pub(super) is_over: bool,
    pub(super) ready: Ready,
    /// By parameter: gradients that came.
    pub(super) counts: Vec<u32>,
    /// Parameters as their first gradients came.
    pub(super) order: Vec<usize>,
    /// The bucket that starts next, if some of its gradients were brought to their buffer as they came.
    pub(super) early: Option<Early>,
    /// Buckets on their way, in order.
    pub(super) started: VecDeque<Started>,
    /// How many were started.
    pub(super) bucket_count: usize,
    /// Bytes of gradients that were exchanged, and that this rank has sent for it.
    pub(super) bytes: u64,
    pub(super) sent: u64,
    pub(super) first_start: Option<Instant>,
    pub(super) first_mark: Option<Mark>,
    pub(super) scale: Option<Scale>,
    /// The head is on its way.
    pub(super) head: Option<Work<'static>>,
    /// The rank whose buffers count.
    pub(super) leader: usize,
    /// The first parameter with what is not finite, and how many elements.
    pub(super) non_finite: Option<(usize, usize)>,
    /// On a GPU, by bucket: flags that are still there.
    pub(super) flags: Vec<(usize, tch::Tensor)>,
    /// What it waited for other ranks before its end.
    pub(super) waited: Duration,
}

/// A bucket on its way.
#[derive(Debug)]
pub(super) struct Started {
    pub(super) bucket: usize,
    /// None where a hook has it.
    pub(super) work: Option<Work<'static>>,
    /// The buffer in which it is exchanged, if it has no memory of its own.
    pub(super) taken: Option<Taken>,
    /// What makes sums of several micro-batches means, in the last of them.
    pub(super) factor: Option<f64>,
}

impl Run {
    fn new(token: Arc<()>, sync: bool, asked: Option<Asked>, states: Vec<Variable>) -> Self {
        Self {
            token,
            is_backward: true,
            is_shadow: false,
            began: Instant::now(),
            sync,
            accumulates: false,
            asked,
            states,
            reached: None,
            is_open: false,
            is_over: false,
            ready: Ready::new(Vec::new(), 0, Vec::new()),
            counts: Vec::new(),
            order: Vec::new(),
            early: None,
            started: VecDeque::new(),
            bucket_count: 0,
            bytes: 0,
            sent: 0,
            first_start: None,
            first_mark: None,
            scale: None,
            head: None,
            leader: 0,
            non_finite: None,
            flags: Vec::new(),
            waited: Duration::ZERO,
        }
    }

    pub(super) fn is_running(&self) -> bool {
        // One reference is ours; libtorch drops the callback's when a backward fails half-way.
        Arc::strong_count(&self.token) > 1
    }

    /// Whether it ended half-way, with an exchange begun and no error told.
    fn was_abandoned(&self) -> bool {
        self.is_open && self.sync && !self.is_over
    }
}

impl Reducer {
    /// A backward has come to its first node, or to a gradient. What is wrong is kept for its first hook and its
    /// end to say: here nothing can stop it.
    /// Only from its root can the whole graph be walked; else unused parameters show at the end.
    pub(super) fn begin(&mut self, weak: &Weak<Mutex<Self>>, from_root: bool) {
        let abandoned = match self.run.take() {
            // Seen before; or one inside of it, which is a part of it.
            Some(run) if run.is_running() => {
                self.run = Some(run);
                return;
            }
            Some(run) => run.was_abandoned(),
            None => false,
        };
        self.failed = None;
        let begun = self.try_begin(weak, from_root);
        let outcome = if abandoned { Err(Error::BackwardAbandoned) } else { begun };
        if let Err(error) = outcome {
            self.fail(error);
        }
    }

    fn try_begin(&mut self, weak: &Weak<Mutex<Self>>, from_root: bool) -> Result<()> {
        let token = Arc::new(());
        let asked = self.asked;
        let is_last = self.synchronising && asked.is_none_or(|asked| asked.sync);
        let accumulates = !is_last && self.shards_accumulation();
        let sync = is_last || accumulates;
        let walks = self.options.find_unused_parameters && sync && from_root;
        let begun = Run::new(Arc::clone(&token), sync, asked, Vec::new());
        let scale = accumulates.then_some(Scale(1.0));
        self.run = Some(Run { accumulates, scale, ..begun });
        let weak = Weak::clone(weak);
        shim::end_of_backward(Box::new(move || {
            let _held_by_libtorch = &token;
            super::on_end(&weak)
        }))?;
        let states = self.looked_at()?;
        let reached = match walks {
            true => {
                let parameters = self.store.model.parameters();
                let parameters: Vec<_> = parameters.map(|named| &named.tensor).collect();
                shim::graph_reaches(&parameters).ok()
            }
            false => None,
        };
        if let Some(run) = &mut self.run {
            (run.states, run.reached) = (states, reached);
        }
        Ok(())
    }

    /// A run that is no backward of libtorch's.
    pub(super) fn begin_without_backward(&mut self, asked: Option<Asked>) -> Result<()> {
        match self.run.take() {
            Some(run) if run.is_running() => {
                self.run = Some(run);
                return Err(Error::InsideBackward);
            }
            Some(run) if run.was_abandoned() => return Err(Error::BackwardAbandoned),
            _ => {}
        }
        self.failed = None;
        let states = self.looked_at()?;
        let run = Run::new(Arc::new(()), true, asked, states);
        let is_shadow = self.joining && !self.accumulated.pending.contains(&true);
        self.run = Some(Run { is_backward: false, is_shadow, ..run });
        Ok(())
    }

    /// The first gradient of a backward has come: ranks agree on what trains, if that changed, and the exchange is
    /// prepared. `coming` is its variable.
    pub(super) fn open(&mut self, coming: Option<usize>) -> Result<()> {
        let Some(begun) = &mut self.run else { return Err(Error::InsideBackward) };
        begun.is_open = true;
        let sync = begun.sync;
        let trains: Vec<bool> = begun.states.iter().map(|state| state.requires_grad != 0).collect();
        if trains != self.agreed {
            self.agree_on_what_trains(trains)?;
        }
        let count = self.store.model.parameters().len();
        if let Some(run) = &mut self.run {
            run.counts = vec![0; count];
        }
        self.check_outcome()?;
        self.check_weights()?;
        if sync {
            self.store.pool.reset();
            self.store.meet()?;
            self.start_head()?;
            let coming = coming.and_then(|variable| self.store.model.slot(variable));
            self.await_gradients(coming)?;
        }
        Ok(())
    }

    /// A step's gradients are all weighed or none is.
    fn check_weights(&self) -> Result<()> {
        let asked = self.run.as_ref().is_some_and(|run| run.asked.is_some());
        let is_pending = self.accumulated.pending.contains(&true);
        if is_pending && asked != self.accumulated.is_weighted {
            return Err(Error::MixedWeights);
        }
        Ok(())
    }

    /// Sharded gradients cannot be added to.
    fn check_outcome(&self) -> Result<()> {
        let has_gradients = matches!(self.outcome, Outcome::Reduced(_));
        if has_gradients && self.store.sharding.needs_our_optimizer() {
            return Err(Error::ExchangedTwice { name: "the parameters".to_owned() });
        }
        Ok(())
    }

    /// From here on buckets start as gradients come.
    fn await_gradients(&mut self, coming: Option<usize>) -> Result<()> {
        let plan = &self.store.plan;
        let bucket_of: Vec<usize> = plan.places.iter().map(|place| place.bucket).collect();
        let count = bucket_of.len();
        let expected = (0..count).map(|slot| self.expected(slot)).collect();
        let mut ready = Ready::new(bucket_of, plan.buckets.len(), expected);
        if self.is_counting() {
            // The first backward of a static graph sends nothing before its end.
            if let Some(run) = &mut self.run {
                run.ready = ready;
            }
            return Ok(());
        }
        for slot in 0..count {
            // Unused in a static graph: nothing comes for it, also not at the end.
            if self.trains(slot) && self.expected(slot) == 0 && Some(slot) != coming {
                self.stand_in(slot)?;
            }
        }
        let mut startable = ready.startable();
        let reached = self.run.as_mut().and_then(|run| run.reached.take());
        for slot in 0..reached.as_ref().map_or(0, Vec::len) {
            if reached.as_ref().is_some_and(|reached| !reached[slot]) && self.trains(slot) {
                self.stand_in(slot)?;
                startable.end = ready.settle(slot).end.max(startable.end);
            }
        }
        if let Some(run) = &mut self.run {
            run.ready = ready;
        }
        self.start_all(startable)
    }

    /// Whether this backward counts the gradients of a static graph.
    pub(super) fn is_counting(&self) -> bool {
        self.options.static_graph && self.counts.is_none()
    }

    /// How many gradients a parameter gets in a backward.
    fn expected(&self, slot: usize) -> u32 {
        if !self.trains(slot) {
            return 0;
        }
        self.counts.as_ref().map_or(1, |counts| counts[slot])
    }

    /// A parameter without a gradient in this backward takes part with what has accumulated, or zero.
    pub(super) fn stand_in(&mut self, slot: usize) -> Result<()> {
        let variable = &self.store.model.parameter(slot).tensor;
        // Without a view it is looked at when its bucket starts.
        let Some(view) = self.store.view(slot) else { return Ok(()) };
        match shim::gradient_place(variable, view)? {
            // A shadow's gradient is that of the last step.
            _ if self.run.as_ref().is_some_and(|run| run.is_shadow) => {
                return self.store.zero_view(slot)
            }
            GradientPlace::Undefined => return self.store.zero_view(slot),
            GradientPlace::InView => {}
            // It was frozen meanwhile, or somebody has set it.
            _ => shim::gradient_move(variable, view)?,
        }
        self.check_addition(slot)?;
        self.look_at_view(slot)
    }

    /// A gradient of `variable` has been accumulated.
    pub(super) fn gradient_came(&mut self, variable: usize) -> Result<()> {
        if !self.run.as_ref().is_some_and(|run| run.is_open) {
            self.open(Some(variable))?;
        }
        let Some(slot) = self.store.model.slot(variable) else {
            // It began to train in the middle of this backward.
            return Err(Error::ModelChanged {
                report: format!("  {}: it was unfrozen during backward\n", self.name_of(variable)),
            });
        };
        let sync = self.run.as_ref().is_some_and(|run| run.sync);
        if !self.place(slot, sync)? {
            return Ok(());
        }
        if !sync {
            self.accumulated.pending[slot] = true;
            return Ok(());
        }
        let is_counting = self.is_counting();
        let Some(run) = &mut self.run else { return Ok(()) };
        run.counts[slot] += 1;
        let actual = run.counts[slot];
        if actual == 1 {
            run.order.push(slot);
        }
        let expected = self.counts.as_ref().map_or(u32::MAX, |counts| counts[slot]);
        if actual > expected {
            let name = self.store.model.parameter(slot).name.clone();
            return Err(Error::StaticGraphChanged { name, expected, actual });
        }
        if is_counting {
            return Ok(());
        }
        self.bring_early(slot)?;
        let Some(marked) = self.run.as_mut().map(|it| it.ready.mark(slot)) else { return Ok(()) };
        let startable = marked.map_err(|late| Error::GradientTwice {
            name: self.store.model.parameter(late.parameter).name.clone(),
        })?;
        self.start_all(startable)
    }

    pub(super) fn name_of(&self, variable: usize) -> String {
        self.store.model.variables[variable].name.clone()
    }

    /// Brings a gradient to its view; with `look` it is looked at on the way. `false`: there is none.
    fn place(&mut self, slot: usize, look: bool) -> Result<bool> {
        let Some(view) = self.store.view(slot) else { return self.leave(slot, look) };
        let variable = &self.store.model.parameter(slot).tensor;
        let look = look && self.options.non_finite != NonFinite::Ignore;
        let on_host = !view.device().is_cuda();
        match shim::gradient_place(variable, view)? {
            GradientPlace::Undefined => return Ok(false),
            GradientPlace::InView => {
                self.check_addition(slot)?;
                if look {
                    self.look_at_view(slot)?;
                }
            }
            GradientPlace::Alike(_) if on_host => {
                let count = finite::copy_gradient(variable, view)?;
                if look {
                    self.found(slot, count);
                }
            }
            GradientPlace::Alike(_) | GradientPlace::Elsewhere => {
                shim::gradient_move(variable, view)?;
                if look {
                    self.look_at_view(slot)?;
                }
            }
            GradientPlace::Sparse => {
                if self.options.sparse_gradients == SparseGradients::Refuse {
                    let name = self.store.model.parameter(slot).name.clone();
                    return Err(Error::SparseGradient { name });
                }
                shim::gradient_move(variable, view)?;
                if look {
                    self.look_at_view(slot)?;
                }
            }
        }
        Ok(true)
    }

    /// Leaves a gradient where it is until its bucket starts: in the kind in which gradients add up, unless it is the only one of
    /// an exchange. `false`: there is none.
    fn leave(&mut self, slot: usize, is_exchanged: bool) -> Result<bool> {
        let named = self.store.model.parameter(slot);
        let Some(gradient) = self.store.gradient(slot)? else { return Ok(false) };
        if gradient.is_sparse() {
            if self.options.sparse_gradients == SparseGradients::Refuse {
                return Err(Error::SparseGradient { name: named.name.clone() });
            }
            let dense = gradient.f_to_dense(None, false)?;
            shim::gradient_set(&named.tensor, Some(&dense))?;
        }
        let is_added_to = !is_exchanged || self.is_counting() || self.expected(slot) > 1;
        let kind = self.store.storages[self.store.plan.places[slot].storage].gradients.kind();
        if is_added_to && gradient.kind() != kind {
            let wide = named.tensor.f_grad()?.f_to_kind(kind)?;
            shim::gradient_set(&named.tensor, Some(&wide))?;
        }
        Ok(true)
    }

    /// Gradients that were exchanged by weight cannot be added to: the sum would be divided again.
    fn check_addition(&self, slot: usize) -> Result<()> {
        let Some(run) = &self.run else { return Ok(()) };
        if run.asked.is_none() || self.accumulated.pending[slot] {
            return Ok(());
        }
        // More than one gradient in this backward.
        if run.counts.get(slot).is_some_and(|&count| count > 0) {
            return Ok(());
        }
        Err(Error::ExchangedTwice { name: self.store.model.parameter(slot).name.clone() })
    }

    /// Looks whether a gradient that is in its view is finite; on a GPU its whole bucket is looked at later.
    fn look_at_view(&mut self, slot: usize) -> Result<()> {
        if self.options.non_finite == NonFinite::Ignore || self.store.device().is_cuda() {
            return Ok(());
        }
        let Some(view) = self.store.view(slot) else { return Ok(()) };
        let count = finite::count(view)?;
        self.found(slot, count);
        Ok(())
    }

    pub(super) fn found(&mut self, slot: usize, count: usize) {
        if count == 0 {
            return;
        }
        if let Some(run) = &mut self.run {
            run.non_finite.get_or_insert((slot, count));
        }
    }
}
