//! The exchange of one backward: buckets are started in order, waited for at the end, and what the ranks found is
//! told to all.

use std::ops::Range;
use std::time::{Duration, Instant};

use phalanx_comm::Max;
use tch::{Kind, Tensor};

use super::backward::Run;
use super::notes::{Head, Tail};
use super::statistics::RankTimes;
use super::{fingerprint, hidden, Asked, Outcome, Reducer};
use crate::shim::{self, GradientPlace};
use crate::store::flat::Scale;
use crate::store::model::{self, Named};
use crate::store::{agree, broadcast, Attached};
use crate::{Buffers, Error, NonFinite, Result};

impl Reducer {
    /// The name of a collective of this exchange.
    fn tag(&self, what: &str) -> String {
        self.step.map_or_else(|| what.to_owned(), |step| format!("step {step}, {what}"))
    }

    /// Starts to tell what the divisor depends on, where it does.
    pub(super) fn start_head(&mut self) -> Result<()> {
        let Some(run) = &self.run else { return Ok(()) };
        if !self.options.exchange || (run.asked.is_none() && !self.joining) {
            return Ok(());
        }
        let head = Head {
            weight: self.accumulated.weight + run.asked.map_or(0.0, |asked| asked.weight),
            is_weighted: run.asked.is_some(),
            takes_part: run.is_backward || self.accumulated.pending.contains(&true),
        };
        let tag = self.tag(if self.joining { "who takes part" } else { "weight" });
        let work = self.head.start(&mut self.store.group, &tag, head.encode())?;
        if let Some(run) = &mut self.run {
            run.head = Some(work);
        }
        Ok(())
    }

    /// The factor of this exchange; waits for the head, which was started before.
    fn scale(&mut self) -> Result<Scale> {
        if let Some(scale) = self.run.as_ref().and_then(|run| run.scale) {
            return Ok(scale);
        }
        let head = self.run.as_mut().and_then(|run| run.head.take());
        let scale = match head {
            None => Scale(one_over(count(self.store.group.world_size()))),
            Some(work) => {
                let start = Instant::now();
                work.wait()?;
                let heads: Vec<Head> = self.head.read().into_iter().map(Head::decode).collect();
                let first = heads.iter().position(|head| head.takes_part && self.joining);
                let leader = first.unwrap_or(0);
                if let Some(run) = &mut self.run {
                    run.waited += start.elapsed();
                    run.leader = leader;
                }
                divisor(&heads, self.joining)?
            }
        };
        if let Some(run) = &mut self.run {
            run.scale = Some(scale);
        }
        Ok(scale)
    }

    /// Starts buckets, in order.
    pub(super) fn start_all(&mut self, buckets: Range<usize>) -> Result<()> {
        buckets.into_iter().try_for_each(|bucket| self.start(bucket))
    }

    fn start(&mut self, index: usize) -> Result<()> {
        if !self.options.exchange {
            return Ok(());
        }
        let bucket = &self.store.plan.buckets[index];
        if !bucket.parameters.iter().any(|&slot| self.trains(slot)) {
            return Ok(()); // all of it is frozen, on every rank
        }
        let scale = self.scale()?;
        let tag = self.tag(&format!("bucket {index}"));
        self.flag_on_device(index)?;
        let store = &mut self.store;
        let bucket = &store.plan.buckets[index];
        let gradients = &store.storages[bucket.storage].gradients;
        let stream = shim::current_stream(gradients.device())?;
        store.group.set_stream(stream);
        let Some(run) = &mut self.run else { return Ok(()) };
        if run.first_start.is_none() {
            run.first_start = Some(Instant::now());
            run.first_mark = store.group.mark()?;
        }
        store.group.tagged(&tag);
        // Before the order is settled every rank gets all: it may yet be laid anew.
        let everywhere = !self.is_order_settled;
        let range = bucket.range.clone();
        let how = (scale, everywhere);
        run.works.push(store.sharding.reduce(&mut store.group, gradients, range, how)?);
        Ok(())
    }

    /// On a GPU: flags a bucket that is not finite, for the end to read.
    fn flag_on_device(&mut self, index: usize) -> Result<()> {
        let bucket = &self.store.plan.buckets[index];
        let gradients = &self.store.storages[bucket.storage].gradients;
        if self.options.non_finite == NonFinite::Ignore || !gradients.device().is_cuda() {
            return Ok(());
        }
        let finite = gradients.range(&bucket.range)?.f_isfinite()?;
        let flag = finite.f_logical_not()?.f_sum(Kind::Int64)?;
        if let Some(run) = &mut self.run {
            run.flags.push((index, flag));
        }
        Ok(())
    }

    /// The end of a backward.
    pub(super) fn finish(&mut self) -> Result<()> {
        let Some(run) = &self.run else { return Ok(()) };
        if !run.is_open {
            self.run = None; // it reached nothing of this model
            return Ok(());
        }
        if !run.sync {
            let asked = run.asked;
            self.run = None;
            self.accumulated.weight += asked.map_or(0.0, |asked| asked.weight);
            self.accumulated.is_weighted = asked.is_some();
            self.accumulated.states = self.store.model.states()?;
            self.accumulated.samples = fingerprint::sampled(&self.store);
            return Ok(());
        }
        self.settle_missing(false)?;
        self.complete()
    }

    /// An exchange without a backward: what has accumulated, and zero for the rest. Says how many ranks took part.
    pub(crate) fn exchange_now(&mut self, is_weighted: bool) -> Result<usize> {
        let asked = is_weighted.then_some(Asked { weight: 0.0, sync: true });
        let outcome = self.try_exchange_now(asked);
        match outcome {
            Ok(taking_part) => Ok(taking_part),
            Err(error) => {
                self.fail(error);
                self.run = None;
                Err(self.take_failure().unwrap_or(Error::InsideBackward))
            }
        }
    }

    /// An exchange of a rank that has no batch left; says how many ranks took part.
    pub(crate) fn shadow(&mut self) -> Result<usize> {
        self.exchange_now(self.accumulated.is_weighted)
    }

    fn try_exchange_now(&mut self, asked: Option<Asked>) -> Result<usize> {
        self.begin_without_backward(asked)?;
        self.open(None)?;
        if self.joining {
            self.scale()?;
            let heads = self.head.read().into_iter().map(Head::decode);
            let taking_part = heads.filter(|head| head.takes_part).count();
            if taking_part == 0 {
                self.run = None;
                return Ok(0);
            }
            self.settle_missing(true)?;
            self.complete()?;
            return Ok(taking_part);
        }
        self.settle_missing(true)?;
        self.complete()?;
        Ok(self.store.group.world_size())
    }

    /// Parameters whose gradients did not come take part with what has accumulated, or with zero where that is
    /// allowed; then every bucket has been started.
    fn settle_missing(&mut self, are_zero: bool) -> Result<()> {
        if self.is_counting() {
            self.count_gradients()?;
        }
        let missing = self.run.as_ref().map_or_else(Vec::new, |run| run.ready.missing());
        let lost: Vec<usize> = missing.iter().copied().filter(|&slot| self.is_lost(slot)).collect();
        if !are_zero && !lost.is_empty() {
            return Err(self.missing_gradients(&lost));
        }
        for slot in missing {
            self.stand_in(slot)?;
            let Some(run) = &mut self.run else { return Ok(()) };
            let startable = run.ready.settle(slot);
            self.start_all(startable)?;
        }
        Ok(())
    }

    /// Whether a parameter that is not ready ought to have a gradient.
    fn is_lost(&self, slot: usize) -> bool {
        let came = self.run.as_ref().is_some_and(|run| run.counts[slot] > 0);
        let is_unused = self.counts.as_ref().is_some_and(|counts| counts[slot] == 0);
        !(came
            || is_unused
            || self.accumulated.pending[slot]
            || self.options.find_unused_parameters)
    }

    /// The first backward of a static graph has ended: its counts are those of all, and its buckets start.
    fn count_gradients(&mut self) -> Result<()> {
        let Some(run) = &mut self.run else { return Ok(()) };
        let counts = run.counts.clone();
        let mut signature = vec![String::from("gradients in the first backward")];
        let lines = self.store.model.parameters().zip(&counts);
        signature.extend(lines.map(|(named, count)| format!("{}: {count} gradients", named.name)));
        agree::same_on_all_ranks(
            &mut self.store.group,
            "gradients of the static graph",
            &signature,
        )?;
        let startable = run.ready.startable();
        self.start_all(startable)?;
        for (slot, &count) in counts.iter().enumerate() {
            if count == 0 && !self.accumulated.pending[slot] {
                continue; // unused on every rank: `settle_missing` stands in
            }
            let Some(run) = &mut self.run else { return Ok(()) };
            let startable = run.ready.settle(slot);
            self.start_all(startable)?;
        }
        // What is frozen by now is taken to get one gradient when it trains.
        let later = |(slot, count): (usize, u32)| if self.trains(slot) { count } else { 1 };
        self.counts = Some(counts.into_iter().enumerate().map(later).collect());
        Ok(())
    }

    /// Every bucket was started: waits for all, hears what the ranks found, and hands gradients out.
    fn complete(&mut self) -> Result<()> {
        let last_gradient = Instant::now();
        let used = self.start_used()?;
        let tail = self.start_tail(last_gradient)?;
        let Some(mut run) = self.run.take() else { return Ok(()) };
        self.wait_for_buckets(&mut run, last_gradient)?;
        if let Some(work) = used {
            work.wait()?;
        }
        let tails = match tail {
            None => Vec::new(),
            Some(work) => {
                work.wait()?;
                self.tail.read().into_iter().map(Tail::decode).collect()
            }
        };
        self.finish_statistics(&run, &tails, last_gradient);
        let has_gradient = self.with_gradients(&run);
        self.accumulated.pending.fill(false);
        self.accumulated.weight = 0.0;
        self.accumulated.is_weighted = false;
        let is_usable = self.judge(&tails)?;
        self.compare_fingerprints(&tails)?;
        if self.options.exchange {
            self.exchange_buffers(run.leader)?;
            self.settle_order(&run)?;
        }
        self.step = None;
        if !is_usable {
            self.store.clear_gradients()?;
            self.outcome = Outcome::Skipped;
            return Ok(());
        }
        self.hand_out(&has_gradient, run.is_shadow)?;
        self.outcome = Outcome::Reduced(has_gradient);
        self.clock.ended = Instant::now();
        self.clock.waited = Duration::ZERO;
        Ok(())
    }

    fn wait_for_buckets(&mut self, run: &mut Run, last_gradient: Instant) -> Result<()> {
        let device = self.store.device();
        // The stream that the caller goes on with; the hooks may have had another one.
        let stream = shim::current_stream(device)?;
        let group = &mut self.store.group;
        group.set_stream(stream);
        let waits = group.mark()?;
        let statistics = &mut self.clock.statistics;
        statistics.bucket_count = run.works.len();
        for work in run.works.drain(..) {
            work.wait_on(stream)?;
        }
        self.clock.marks = match (run.first_mark.take(), waits, group.mark()?) {
            (Some(first), Some(waits), Some(end)) => Some([first, waits, end]),
            _ => None,
        };
        statistics.exposed_comm = last_gradient.elapsed();
        statistics.exchange = run.first_start.map_or(Duration::ZERO, |start| start.elapsed());
        statistics.overlap = hidden(statistics.exposed_comm, statistics.exchange);
        Ok(())
    }

    /// Starts to tell which parameters have gradients here.
    fn start_used(&mut self) -> Result<Option<phalanx_comm::Work<'static>>> {
        let tag = self.tag("used parameters");
        let is_told = self.tells_used();
        let (Some(region), Some(run)) = (&self.used, &self.run) else { return Ok(None) };
        if !is_told {
            return Ok(None);
        }
        let states = self.store.model.states()?;
        let has = |(slot, &count): (usize, &u32)| {
            let is_held = states[self.store.model.variable_of(slot)].has_gradient != 0;
            let is_used = count > 0 || self.accumulated.pending[slot];
            i32::from(is_used || (is_held && !run.is_shadow))
        };
        let mine: Vec<i32> = run.counts.iter().enumerate().map(has).collect();
        region.write(0, &mine);
        Ok(Some(self.store.group.tagged(&tag).all_reduce(region.full(), Max)?))
    }

    /// Whether ranks tell which parameters they used: where that can differ.
    fn tells_used(&self) -> bool {
        let is_static = self.options.static_graph;
        let leaves_out = |slot| {
            self.counts.as_ref().is_some_and(|counts| counts[slot] == 0) && self.trains(slot)
        };
        let count = self.store.model.parameters().len();
        self.options.exchange && (!is_static || (0..count).any(leaves_out))
    }

    /// By parameter: whether any rank has a gradient for it, of this backward or of one since the last step.
    fn with_gradients(&self, run: &Run) -> Vec<bool> {
        let used = self.used.as_ref().filter(|_| self.tells_used());
        let used = used.map(|region| region.read(0..region.len()));
        let has = |slot: usize| {
            let is_here = run.counts[slot] > 0 || self.accumulated.pending[slot];
            let is_used = match (&used, &self.counts) {
                (Some(used), _) => used[slot] > 0,
                (None, Some(counts)) => counts[slot] > 0 || is_here,
                (None, None) => is_here || !self.options.find_unused_parameters,
            };
            is_used && self.trains(slot)
        };
        (0..self.store.model.parameters().len()).map(has).collect()
    }

    fn start_tail(&mut self, now: Instant) -> Result<Option<phalanx_comm::Work<'static>>> {
        if !self.options.exchange {
            return Ok(None);
        }
        self.read_flags()?;
        let interval = self.options.fingerprint_interval;
        let number = self.clock.statistics.exchange_count + 1;
        let is_time = number.is_multiple_of(interval) || std::mem::take(&mut self.is_suspect);
        let fingerprint = match interval > 0 && is_time {
            true => Some(fingerprint::combined(&fingerprint::of_parameters(&self.store)?)),
            false => None,
        };
        let Some(run) = &self.run else { return Ok(None) };
        let outside = run.began.saturating_duration_since(self.clock.ended);
        let tail = Tail {
            non_finite: run.non_finite,
            fingerprint,
            outside: outside.saturating_sub(self.clock.waited),
            backward: now.saturating_duration_since(run.began).saturating_sub(run.waited),
        };
        let tag = self.tag("what ranks found");
        Ok(Some(self.tail.start(&mut self.store.group, &tag, tail.encode())?))
    }

    /// Brings flags of buckets from the GPU.
    fn read_flags(&mut self) -> Result<()> {
        let flags = self.run.as_mut().map_or_else(Vec::new, |run| std::mem::take(&mut run.flags));
        if flags.is_empty() {
            return Ok(());
        }
        let counts: Vec<&Tensor> = flags.iter().map(|(_, flag)| flag).collect();
        let counts = Tensor::f_stack(&counts, 0)?.f_to_device(tch::Device::Cpu)?;
        let counts: Vec<i64> = Vec::try_from(&counts)?;
        for ((bucket, _), count) in flags.iter().zip(counts) {
            let first = self.store.plan.buckets[*bucket].parameters.first().copied();
            if let Some(slot) = first {
                self.found(slot, usize::try_from(count).unwrap_or(0));
            }
        }
        Ok(())
    }

    fn finish_statistics(&mut self, run: &Run, tails: &[Tail], last_gradient: Instant) {
        let statistics = &mut self.clock.statistics;
        statistics.exchange_count += u64::from(self.options.exchange);
        statistics.bytes = self.store.exchanged_bytes();
        let own = RankTimes {
            outside: run.began.saturating_duration_since(self.clock.ended),
            backward: last_gradient.saturating_duration_since(run.began),
        };
        let of = |tail: &Tail| RankTimes { outside: tail.outside, backward: tail.backward };
        let ranks: Vec<RankTimes> =
            if tails.is_empty() { vec![own] } else { tails.iter().map(of).collect() };
        statistics.ranks.clone_from(&ranks);
        if tails.is_empty() {
            return;
        }
        // A first backward has no exchange before it.
        let slow =
            if statistics.exchange_count > 1 { self.clock.window.push(ranks) } else { vec![] };
        for straggler in &slow {
            let known = |other: &super::statistics::Straggler| {
                other.rank == straggler.rank && other.phase == straggler.phase
            };
            if self.store.group.rank() == 0 && !statistics.stragglers.iter().any(known) {
                tracing::warn!("{straggler}, over the last exchanges");
            }
        }
        statistics.stragglers = slow;
    }

    /// What becomes of gradients that are not finite: whether they may be used.
    fn judge(&mut self, tails: &[Tail]) -> Result<bool> {
        let found = tails.iter().enumerate().find_map(|(rank, tail)| {
            tail.non_finite.map(|(slot, elements)| (rank, slot, elements))
        });
        let Some((rank, slot, elements)) = found else { return Ok(true) };
        let named = self.store.model.parameter(slot);
        let error = Error::NonFinite {
            rank,
            name: named.name.clone(),
            count: elements,
            total: named.tensor.numel(),
            exchange: self.clock.statistics.exchange_count,
        };
        match self.options.non_finite {
            NonFinite::Error => {
                self.store.clear_gradients()?;
                self.outcome = Outcome::Nothing;
                Err(error)
            }
            NonFinite::SkipStep => {
                tracing::warn!("{error}: the step is skipped on every rank");
                Ok(false)
            }
            NonFinite::Warn | NonFinite::Ignore => {
                tracing::warn!("{error}");
                Ok(true)
            }
        }
    }

    /// Where ranks told different fingerprints: an error that names the parameter and the rank.
    fn compare_fingerprints(&mut self, tails: &[Tail]) -> Result<()> {
        match tails.iter().all(|tail| tail.fingerprint == tails[0].fingerprint) {
            true => Ok(()),
            false => self.compare_parameters(),
        }
    }

    /// What the next forward starts from is the same on every rank, if so wanted.
    fn exchange_buffers(&mut self, leader: usize) -> Result<()> {
        let tag = self.tag("buffers");
        let (group, buffers) = (&mut self.store.group, &self.store.model.buffers);
        let is_mean = self.options.buffers == Buffers::Mean;
        let averaged = |named: &Named| is_mean && is_floating(named.tensor.kind());
        if self.options.buffers == Buffers::Own {
            return Ok(());
        }
        let means: Vec<&Named> = buffers.iter().filter(|named| averaged(named)).collect();
        broadcast::mean(group, &tag, &means)?;
        let sent: Vec<&Named> = buffers.iter().filter(|named| !averaged(named)).collect();
        broadcast::tensors(group, &tag, leader, &sent)
    }

    /// Settles the order in which gradients become ready: the one that rank 0 saw, as soon as it has seen
    /// one, unless the optimizer has begun to keep things by place.
    fn settle_order(&mut self, run: &Run) -> Result<()> {
        if self.is_order_settled {
            return Ok(());
        }
        let count = self.store.model.parameters().len();
        let mut seen = vec![-1_i64; count];
        for (place, &slot) in seen.iter_mut().zip(&run.order) {
            *place = i64::try_from(slot).unwrap_or(-1);
        }
        let tag = self.tag("ready order");
        self.store.group.tagged(&tag).broadcast(&mut seen[..], 0)?.wait()?;
        let mut order: Vec<usize> =
            seen.into_iter().filter_map(|slot| usize::try_from(slot).ok()).collect();
        if order.is_empty() {
            return Ok(()); // rank 0 had no backward
        }
        self.is_order_settled = true;
        if self.store.optimizer == Attached::Stepped {
            return Ok(());
        }
        let rest = (0..count).rev().filter(|slot| !order.contains(slot)).collect::<Vec<_>>();
        order.extend(rest);
        if self.store.lay_anew(&order, &self.options)? {
            tracing::info!("buckets follow the order in which gradients became ready on rank 0");
        }
        Ok(())
    }

    /// Makes exchanged gradients those of the variables; sharded ones stay with the optimizer.
    fn hand_out(&mut self, has_gradient: &[bool], is_shadow: bool) -> Result<()> {
        if self.store.sharding.needs_our_optimizer() {
            if self.store.optimizer == Attached::No {
                return Err(Error::ShardedWithoutOptimizer);
            }
            return self.store.clear_gradients();
        }
        for (slot, named) in self.store.model.parameters().enumerate() {
            let view = self.store.view(slot);
            let place = shim::gradient_place(&named.tensor, view)?;
            if has_gradient[slot] && place != GradientPlace::InView {
                shim::gradient_set(&named.tensor, Some(view))?;
            }
            // What a shadow still has is of a step before.
            if is_shadow && !has_gradient[slot] && self.trains(slot) {
                shim::gradient_set(&named.tensor, None)?;
            }
        }
        Ok(())
    }

    fn missing_gradients(&self, missing: &[usize]) -> Error {
        let names = missing.iter().map(|&slot| self.store.model.parameter(slot).name.as_str());
        Error::MissingGradients {
            rank: self.store.group.rank(),
            count: missing.len(),
            total: self.store.model.parameters().len(),
            names: model::listed(names.collect()),
        }
    }
}

/// The factor that makes sums of all ranks' gradients means. Pure.
fn divisor(heads: &[Head], joining: bool) -> Result<Scale> {
    let taking_part = heads.iter().filter(|head| head.takes_part);
    let weighted = taking_part.clone().filter(|head| head.is_weighted).count();
    let total = taking_part.count();
    if joining && weighted != 0 && weighted != total {
        return Err(Error::MixedWeights);
    }
    let is_weighted = if joining { weighted > 0 } else { true };
    let sum: f64 = heads.iter().map(|head| head.weight).sum();
    Ok(Scale(one_over(if is_weighted { sum } else { count(total) })))
}

fn is_floating(kind: Kind) -> bool {
    matches!(kind, Kind::Float | Kind::Double | Kind::Half | Kind::BFloat16)
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
