//! Sharded gradients (ZeRO-2, 3): when a bucket starts, its gradients are copied from where
//! libtorch made them to an exchange buffer; when it has been exchanged, the rank's segment is
//! kept.

use std::time::Instant;

use tch::Tensor;

use super::backward::Started;
use super::{finite, Reducer};
use crate::shim::{self, GradientPlace};
use crate::store::pool::Taken;
use crate::{Error, NonFinite, Result};

impl Reducer {
    /// Where gradients stay where they are until now: brings a bucket's to a buffer, as soon as one is free.
    pub(super) fn bring(&mut self, index: usize) -> Result<Option<Taken>> {
        if self.store.sharding.has_whole_gradients() {
            return Ok(None);
        }
        let taken = loop {
            if let Some(taken) = self.store.pool.take(index) {
                break taken;
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
