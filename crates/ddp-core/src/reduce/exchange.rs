//! The exchange of one backward: buckets are started in order, waited for at the end, and what the ranks found is
//! told to all.

use std::ops::Range;
use std::time::{Duration, Instant};

use phalanx_comm::{recorder, Max, Work};
use tch::Kind;

use super::backward::{Run, Started};
use super::notes::{Head, Tail};
use super::{hidden, Asked, Outcome, Reducer};
use crate::hooks::Start;
use crate::shim;
use crate::store::{agree, flat::Scale, model, pool::Taken, Storage};
use crate::{Error, NonFinite, Result};

impl Reducer {
    /// The name of a collective of this exchange.
    pub(super) fn tag(&self, what: &str) -> String {
        // A rank that has run out of batches has no step of its own.
        let step = self.step.filter(|_| !self.joining);
        step.map_or_else(|| what.to_owned(), |step| format!("step {step}, {what}"))
    }

    /// Starts to tell what the divisor depends on, where it does.
    pub(super) fn start_head(&mut self) -> Result<()> {
        let Some(open) = &self.run else { return Ok(()) };
        let has_divisor = open.asked.is_some() || self.joining;
        if !self.options.exchange || open.accumulates || !has_divisor {
            return Ok(());
        }
        let head = Head {
            weight: self.accumulated.weight + open.asked.map_or(0.0, |asked| asked.weight),
            is_weighted: open.asked.is_some(),
            takes_part: open.is_backward || self.accumulated.pending.contains(&true),
        };
        let tag = self.tag(if self.joining { "who takes part" } else { "weight" });
        let group = self.weighing.as_mut().unwrap_or(&mut self.store.group);
        let work = self.head.start(group, &tag, head.encode())?;
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
            None => {
                let group = self.weighing.as_ref().unwrap_or(&self.store.group);
                Scale(one_over(count(group.world_size())))
            }
            Some(work) => {
                let start = Instant::now();
                work.wait()?;
                let heads: Vec<Head> = self.head.read().into_iter().map(Head::decode).collect();
                let first = heads.iter().position(|of| of.takes_part && self.joining);
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
        let parameters = &self.store.plan.buckets[index].parameters;
        if !parameters.iter().any(|&slot| self.trains(slot)) {
            return Ok(()); // all of it is frozen, on every rank
        }
        self.store.meet()?;
        let scale = self.scale()?;
        let accumulates = self.run.as_ref().is_some_and(|run| run.accumulates);
        let tag = self.tag(&match accumulates {
            true => format!("micro-batch {}, bucket {index}", self.accumulated.exchange_count),
            false => format!("bucket {index}"),
        });
        let taken = self.bring(index)?;
        self.flag_on_device(index, taken)?;
        let store = &mut self.store;
        let bucket = &store.plan.buckets[index];
        let memory = store.storages[bucket.storage].exchanged(&store.pool, taken);
        let Some(gradients) = memory else { return Ok(()) };
        let stream = shim::current_stream(gradients.device())?;
        store.group.set_stream(stream);
        let Some(run) = &mut self.run else { return Ok(()) };
        if run.first_start.is_none() {
            run.first_start = Some(Instant::now());
            run.first_mark = store.group.mark()?;
        }
        run.bucket_count += 1;
        let bytes = bucket.range.len() * gradients.kind().elt_size_in_bytes();
        run.bytes += bytes as u64;
        // Before the order is settled every rank gets all: it may yet be laid anew.
        let to_all = !self.is_order_settled || store.sharding.reduces_to_all();
        if let Some(hooked) = &mut self.hooked {
            let start = Start { index, scale: scale.0, everywhere: to_all, tag, taken };
            let factor = Some(scale.0);
            run.started.push_back(Started { bucket: index, work: None, taken, factor });
            return hooked.start(store, start);
        }
        store.group.tagged(&tag);
        run.sent += store.sharding.bytes_sent(bytes, (store.group.world_size(), to_all));
        let range = bucket.range.clone();
        // To sums only sums can be added.
        let has_sums = store.storages[bucket.storage].has_sums();
        let how = (if has_sums { Scale(1.0) } else { scale }, to_all);
        let work = Some(store.sharding.reduce(&mut store.group, gradients, range, how)?);
        let factor = (!accumulates).then_some(scale.0);
        run.started.push_back(Started { bucket: index, work, taken, factor });
        Ok(())
    }

    /// On a GPU: flags a bucket that is not finite, for the end to read.
    fn flag_on_device(&mut self, index: usize, taken: Option<Taken>) -> Result<()> {
        if self.options.non_finite == NonFinite::Ignore || !self.store.device().is_cuda() {
            return Ok(());
        }
        let bucket = &self.store.plan.buckets[index];
        let storage = &self.store.storages[bucket.storage];
        let Some(gradients) = storage.exchanged(&self.store.pool, taken) else { return Ok(()) };
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
            return self.note_accumulated(asked);
        }
        if run.accumulates {
            self.settle_missing(true)?;
            return self.keep_sums();
        }
        self.settle_missing(false)?;
        self.complete()
    }

    /// A backward has added to what is exchanged, or divided, later.
    fn note_accumulated(&mut self, asked: Option<Asked>) -> Result<()> {
        self.accumulated.weight += asked.map_or(0.0, |asked| asked.weight);
        self.accumulated.is_weighted = asked.is_some();
        self.accumulated.states = self.store.model.states()?;
        self.accumulated.samples = self.store.samples();
        self.accumulated.views = self.store.gradient_versions()?;
        Ok(())
    }

    /// The end of a micro-batch that was exchanged by itself: its sums are kept for the last one.
    fn keep_sums(&mut self) -> Result<()> {
        let Some(mut run) = self.run.take() else { return Ok(()) };
        self.store.meet()?;
        self.wait_for_buckets(&mut run, Instant::now())?;
        for (pending, &count) in self.accumulated.pending.iter_mut().zip(&run.counts) {
            *pending |= count > 0;
        }
        let accumulated = &mut self.accumulated;
        accumulated.non_finite = accumulated.non_finite.or(run.non_finite);
        accumulated.flags.append(&mut run.flags);
        accumulated.bytes += run.bytes;
        accumulated.sent += run.sent;
        accumulated.exchange_count += 1;
        self.note_accumulated(run.asked)
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
        if self.joining && !self.options.exchange {
            self.run = None;
            return Ok(0);
        }
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

    /// The first backward of a static graph has ended: its counts are those of all, and its buckets start. A rank
    /// that had no backward goes by the others.
    fn count_gradients(&mut self) -> Result<()> {
        let Some(first) = &mut self.run else { return Ok(()) };
        let own = first.counts.clone();
        let mine = if first.is_backward { own.as_slice() } else { &[] };
        let encoded: Vec<u8> = mine.iter().flat_map(|count| count.to_le_bytes()).collect();
        let frozen = first.ready.startable();
        let group = &mut self.store.group;
        let told = group.tagged("gradients of the static graph").all_gather_bytes(&encoded)?;
        let decoded = |bytes: &Vec<u8>| -> Vec<u32> {
            let numbers = bytes.chunks_exact(4);
            numbers.map(|b| u32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect()
        };
        let all: Vec<Vec<u32>> = told.iter().map(decoded).collect();
        let Some(counts) = all.iter().find(|counts| !counts.is_empty()).cloned() else {
            return self.start_all(frozen); // nobody had one: the next exchange counts
        };
        let lines = |of_rank: &Vec<u32>| {
            let of_rank = if of_rank.is_empty() { &counts } else { of_rank };
            let line = |(named, count): (&model::Named, &u32)| {
                format!("{}: {count} gradients", named.name)
            };
            let title = std::iter::once(String::from("gradients in the first backward"));
            title.chain(self.store.model.parameters().zip(of_rank).map(line)).collect()
        };
        let lines: Vec<Vec<String>> = all.iter().map(lines).collect();
        agree::compared("what the static graph uses", &lines)?;
        self.start_all(frozen)?;
        for (slot, &count) in counts.iter().enumerate() {
            if count == 0 && !self.accumulated.pending[slot] {
                continue; // unused on every rank: `settle_missing` stands in
            }
            if own[slot] == 0 {
                self.stand_in(slot)?;
            }
            let Some(run) = &mut self.run else { return Ok(()) };
            let startable = run.ready.settle(slot);
            self.start_all(startable)?;
        }
        self.counts = Some(counts);
        Ok(())
    }

    /// Every bucket was started: waits for all, hears what the ranks found, and hands gradients out.
    fn complete(&mut self) -> Result<()> {
        let last_gradient = Instant::now();
        if self.options.exchange {
            self.store.meet()?;
        }
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
        self.divide_by_own_weight(&run)?;
        let has_gradient = self.with_gradients(&run);
        self.accumulated.clear();
        self.store.storages.iter_mut().for_each(Storage::forget_sums);
        self.clock.waited = Duration::ZERO;
        self.clock.ended = Instant::now();
        let unusable = self.judge(&run, &tails)?;
        self.compare_fingerprints(&tails)?;
        if self.options.exchange {
            self.exchange_buffers(run.leader)?;
            self.settle_order(&run)?;
        }
        self.step = None;
        if let Some(outcome) = unusable {
            self.store.clear_gradients()?;
            self.outcome = outcome;
            return Ok(());
        }
        self.hand_out(&has_gradient, run.is_shadow)?;
        self.outcome = Outcome::Reduced(has_gradient);
        // Training goes on: what it has met before is no reason for its end any more.
        drop(recorder::take_shared_error());
        self.accumulated.views = self.store.gradient_versions()?;
        self.clock.ended = Instant::now();
        Ok(())
    }

    /// Gradients that stay this rank's own are means as well: of its own weights.
    fn divide_by_own_weight(&self, run: &Run) -> Result<()> {
        let Some(asked) = run.asked.filter(|_| self.trains_locally()) else { return Ok(()) };
        let factor = one_over(self.accumulated.weight + asked.weight);
        for bucket in &self.store.plan.buckets {
            let memory = self.store.storages[bucket.storage].gradients.whole();
            let Some(whole) = memory else { continue };
            let mut sums = whole.range(&bucket.range)?;
            tch::no_grad(|| sums.f_mul_scalar_(factor).map(drop))?;
        }
        Ok(())
    }

    fn wait_for_buckets(&mut self, run: &mut Run, last_gradient: Instant) -> Result<()> {
        let device = self.store.device();
        // The stream that the caller goes on with; the hooks may have had another one.
        let stream = shim::current_stream(device)?;
        let group = &mut self.store.group;
        group.set_stream(stream);
        let waits = group.mark()?;
        if let Some(hooked) = &mut self.hooked {
            run.sent = hooked.finish(&mut self.store)?;
        }
        for started in std::mem::take(&mut run.started) {
            self.land(started)?;
        }
        let statistics = &mut self.clock.statistics;
        statistics.bucket_count = run.bucket_count;
        let end = self.store.group.mark()?;
        self.clock.marks = match (run.first_mark.take(), waits, end) {
            (Some(first), Some(waits), Some(end)) => Some([first, waits, end]),
            _ => None,
        };
        statistics.exposed_comm = last_gradient.elapsed();
        statistics.exchange = run.first_start.map_or(Duration::ZERO, |start| start.elapsed());
        statistics.overlap = hidden(statistics.exposed_comm, statistics.exchange);
        Ok(())
    }

    /// Starts to tell which parameters have gradients here.
    fn start_used(&mut self) -> Result<Option<Work<'static>>> {
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
    pub(super) fn tells_used(&self) -> bool {
        let leaves_out = |slot| {
            self.counts.as_ref().is_some_and(|counts| counts[slot] == 0) && self.trains(slot)
        };
        let count = self.store.model.parameters().len();
        self.options.exchange && (!self.options.static_graph || (0..count).any(leaves_out))
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
