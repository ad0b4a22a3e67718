//! Sharded gradients (ZeRO-2, 3): they are copied from where libtorch made them to an exchange buffer, those of the
//! bucket that starts next as they come, others when their bucket starts; when it has been exchanged, the rank's
//! segment is kept.

use std::time::Instant;

use tch::Tensor;

use super::backward::Started;
use super::{finite, Reducer};
use crate::shim::{self, GradientPlace};
use crate::store::pool::Taken;
use crate::{Error, NonFinite, Result};

/// A bucket that has a buffer before it starts.
#[derive(Debug)]
pub(super) struct Early {
    bucket: usize,
    taken: Taken,
    /// Parameters whose gradients are in it.
    brought: Vec<usize>,
}

impl Reducer {
    /// On the host: brings a gradient that has just come, and is in the processor's cache, to its bucket's buffer, if that bucket
    /// starts next and a buffer is free. Buckets take buffers in one order, sooner or later, so that it is the same one on all ranks.
    pub(super) fn bring_early(&mut self, slot: usize) -> Result<()> {
        let is_elsewhere = self.store.device().is_cuda() || !self.options.exchange;
        if is_elsewhere || self.store.sharding.has_whole_gradients() {
            return Ok(());
        }
        let bucket = self.store.plan.places[slot].bucket;
        let Some(run) = &mut self.run else { return Ok(()) };
        if run.ready.next() != bucket {
            return Ok(());
        }
        if run.early.is_none() {
            let Some(taken) = self.store.pool.take(bucket) else { return Ok(()) };
            run.early = Some(Early { bucket, taken, brought: Vec::new() });
        }
        let Some(early) = run.early.as_mut().filter(|early| early.bucket == bucket) else {
            return Ok(());
        };
        let view = self.store.place_in(self.store.pool.buffer(early.taken), slot)?;
        if early.brought.contains(&slot) {
            return self.bring_another(slot, &view);
        }
        early.brought.push(slot);
        self.bring_one(slot, &view)
    }

    /// Adds one more gradient of a parameter to `view`.
    fn bring_another(&mut self, slot: usize, view: &Tensor) -> Result<()> {
        let Some(gradient) = self.store.gradient(slot)? else { return Ok(()) };
        tch::no_grad(|| view.shallow_clone().f_add_(&gradient).map(drop))?;
        if self.options.non_finite != NonFinite::Ignore {
            let count = finite::count(view)?;
            self.found(slot, count);
        }
        shim::gradient_set(&self.store.model.parameter(slot).tensor, None)
    }

    /// Where gradients stay where they are until now: brings a bucket's to a buffer, as soon as one is free.
    pub(super) fn bring(&mut self, index: usize) -> Result<Option<Taken>> {
        if self.store.sharding.has_whole_gradients() {
            return Ok(None);
        }
        let early = self.run.as_mut().and_then(|run| run.early.take_if(|it| it.bucket == index));
        let (brought, has) = early.map(|it| (it.brought, it.taken)).unzip();
        let brought = brought.unwrap_or_default();
        let taken = loop {
            if let Some(free) = has.or_else(|| self.store.pool.take(index)) {
                break free;
            }
            let Some(run) = &mut self.run else { return Ok(None) };
            let is_of = |started: &Started| {
                started.taken.is_some_and(|taken| self.store.pool.is_of(index, taken))
            };
            let Some(oldest) = run.started.iter().position(is_of) else {
                return Err(Error::InsideBackward);
            };
            let Some(started) = run.started.remove(oldest) else { continue };
            let start = Instant::now();
            self.land(started)?;
            if let Some(waiting) = &mut self.run {
                waiting.waited += start.elapsed();
            }
        };
        let mut end = 0;
        for slot in self.store.plan.buckets[index].parameters.clone() {
            let range = self.store.plan.places[slot].range.clone();
            self.store.pool.buffer(taken).zero(end..range.start)?;
            end = range.end;
            if brought.contains(&slot) {
                continue;
            }
            let view = self.store.place_in(self.store.pool.buffer(taken), slot)?;
            self.bring_one(slot, &view)?;
        }
        let buffer = self.store.pool.buffer(taken);
        buffer.zero(end..self.store.plan.buckets[index].range.len())?;
        Ok(Some(taken))
    }

    /// Moves a gradient from where it is to `view`, zero where there is none.
    fn bring_one(&mut self, slot: usize, view: &Tensor) -> Result<()> {
        let variable = &self.store.model.parameter(slot).tensor;
        let is_shadow = self.run.as_ref().is_some_and(|run| run.is_shadow);
        let looks = self.options.non_finite != NonFinite::Ignore;
        let on_host = !view.device().is_cuda();
        let place = match is_shadow || !self.trains(slot) {
            true => GradientPlace::Undefined,
            false => shim::gradient_place(variable, view)?,
        };
        match place {
            GradientPlace::Undefined => {
                tch::no_grad(|| view.shallow_clone().f_zero_().map(drop))?;
                return Ok(());
            }
            GradientPlace::Alike(_) if on_host => {
                let count = finite::copy_gradient(variable, view)?;
                if looks {
                    self.found(slot, count);
                }
            }
            _ => {
                shim::gradient_move(variable, view)?;
                if looks && on_host {
                    let count = finite::count(view)?;
                    self.found(slot, count);
                }
            }
        }
        shim::gradient_set(&self.store.model.parameter(slot).tensor, None)
    }

    /// Waits for a bucket; its segment is kept, and its buffer is free.
    pub(super) fn land(&mut self, started: Started) -> Result<()> {
        let store = &mut self.store;
        let stream = shim::current_stream(store.device())?;
        match (started.work, &mut self.hooked) {
            (Some(work), _) => work.wait_on(stream)?,
            (None, Some(hooked)) => hooked.finish_bucket(store, started.bucket)?,
            (None, None) => {}
        }
        let Some(taken) = started.taken else { return Ok(()) };
        let bucket = &store.plan.buckets[started.bucket];
        let reduced = store.pool.buffer(taken).range(&store.sharding.segment(bucket))?;
        store.storages[bucket.storage].take_in(&reduced, started.factor)?;
        store.pool.give_back(taken);
        Ok(())
    }
}
