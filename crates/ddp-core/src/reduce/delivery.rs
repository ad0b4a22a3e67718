//! After the last bucket of an exchange: gradients are handed out, buffers are made equal on all
//! ranks, and once the buckets are laid out anew in the order in which gradients really became
//! ready.

use tch::Kind;

use super::backward::Run;
use super::Reducer;
use crate::shim::{self, GradientPlace};
use crate::store::broadcast;
use crate::store::model::Named;
use crate::{Buffers, Error, Result};

impl Reducer {
    /// By parameter: whether any rank has a gradient for it, of this backward or of one since the last step.
    pub(super) fn with_gradients(&self, run: &Run) -> Vec<bool> {
        let used = self.used.as_ref().filter(|_| self.tells_used());
        let used = used.map(|region| region.read(0..region.len()));
        let has = |slot: usize| {
            let is_here = run.counts[slot] > 0 || self.accumulated.pending[slot];
            let is_used = match &used {
                Some(used) => used[slot] > 0,
                None => is_here || !self.options.find_unused_parameters,
            };
            is_used && self.trains(slot)
        };
        (0..self.store.model.parameters().len()).map(has).collect()
    }

    /// Makes exchanged gradients those of the variables; sharded ones stay with the optimizer.
    pub(super) fn hand_out(&mut self, has_gradient: &[bool], is_shadow: bool) -> Result<()> {
        if self.store.sharding.needs_our_optimizer() {
            if self.store.optimizer.count == 0 {
                return Err(Error::ShardedWithoutOptimizer);
            }
            return self.store.clear_gradients();
        }
        for (slot, named) in self.store.model.parameters().enumerate() {
            let Some(view) = self.store.view(slot) else { continue };
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

    /// Which gradients an optimizer of this library may step on: those that nobody took away or added to.
    pub(crate) fn steppable(&mut self, mut has_gradient: Vec<bool>) -> Result<Vec<bool>> {
        if let Some(slot) = self.accumulated.pending.iter().position(|&pending| pending) {
            let name = self.store.model.parameter(slot).name.clone();
            return Err(Error::SteppedOnLocalGradients { name });
        }
        if self.store.sharding.needs_our_optimizer() {
            return Ok(has_gradient);
        }
        for (slot, named) in self.store.model.parameters().enumerate() {
            let Some(view) = self.store.view(slot) else { continue };
            match shim::gradient_place(&named.tensor, view)? {
                GradientPlace::Undefined => has_gradient[slot] = false,
                GradientPlace::InView => {}
                // Somebody put another one there.
                _ => shim::gradient_move(&named.tensor, view)?,
            }
        }
        if has_gradient.contains(&true) {
            return Ok(has_gradient);
        }
        Err(Error::NoGradients)
    }

    /// What the next forward starts from is the same on every rank, if so wanted.
    pub(crate) fn exchange_buffers(&mut self, leader: usize) -> Result<()> {
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
    pub(super) fn settle_order(&mut self, run: &Run) -> Result<()> {
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
        if self.store.optimizer.steps > 0 {
            return Ok(());
        }
        let rest = (0..count).rev().filter(|slot| !order.contains(slot)).collect::<Vec<_>>();
        order.extend(rest);
        if self.store.lay_anew(&order, &self.options)? {
            tracing::info!("buckets follow the order in which gradients became ready on rank 0");
        }
        Ok(())
    }
}

fn is_floating(kind: Kind) -> bool {
    matches!(kind, Kind::Float | Kind::Double | Kind::Half | Kind::BFloat16)
}
