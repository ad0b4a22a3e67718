//! What each rank found beside its gradients (not finite, other parameters, its times), sent to all
//! ranks in the tail of each exchange, and what follows from it.

use std::time::Instant;

use phalanx_comm::{recorder, Work};
use tch::Tensor;

use super::backward::Run;
use super::fingerprint;
use super::notes::Tail;
use super::statistics::{RankTimes, Straggler};
use super::{Outcome, Reducer};
use crate::hooks::Hooked;
use crate::part::Refusal;
use crate::{Error, NonFinite, Result};

impl Reducer {
    /// Starts to tell what this rank found.
    pub(super) fn start_tail(&mut self, now: Instant) -> Result<Option<Work<'static>>> {
        if !self.options.exchange {
            return Ok(None);
        }
        self.read_flags()?;
        let interval = self.options.fingerprint_interval;
        let number = self.clock.statistics.exchange_count + 1;
        let is_suspect = std::mem::take(&mut self.is_suspect);
        let drifts = self.hooked.as_ref().is_some_and(Hooked::drifts);
        let fingerprint = match !drifts && (is_suspect || is_due(number, interval)) {
            true => Some(fingerprint::combined(&fingerprint::of_parameters(&self.store)?)),
            false => None,
        };
        let Some(run) = &self.run else { return Ok(None) };
        let outside = run.began.saturating_duration_since(self.clock.ended);
        let tail = Tail {
            non_finite: self.accumulated.non_finite.or(run.non_finite),
            fingerprint,
            outside: outside.saturating_sub(self.clock.waited),
            stepped: {
                let stepped = &self.store.optimizer;
                (stepped.steps, stepped.lr, stepped.settings)
            },
            backward: now.saturating_duration_since(run.began).saturating_sub(run.waited),
        };
        let tag = self.tag("what ranks found");
        Ok(Some(self.tail.start(&mut self.store.group, &tag, tail.encode())?))
    }

    /// Brings flags of buckets from the GPU.
    fn read_flags(&mut self) -> Result<()> {
        let mut flags = std::mem::take(&mut self.accumulated.flags);
        flags.append(
            &mut self.run.as_mut().map_or_else(Vec::new, |run| std::mem::take(&mut run.flags)),
        );
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

    /// Takes down what the exchange cost, here and on the other ranks.
    pub(super) fn finish_statistics(&mut self, run: &Run, tails: &[Tail], last_gradient: Instant) {
        let statistics = &mut self.clock.statistics;
        statistics.exchange_count += u64::from(self.options.exchange);
        statistics.bytes = self.accumulated.bytes + run.bytes;
        statistics.bytes_sent = self.accumulated.sent + run.sent;
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
            let known =
                |other: &Straggler| other.rank == straggler.rank && other.phase == straggler.phase;
            if self.store.group.rank() == 0 && !statistics.stragglers.iter().any(known) {
                tracing::warn!("{straggler}, over the last exchanges");
            }
        }
        statistics.stragglers = slow;
    }

    /// What becomes of gradients that are not finite: whether they may be used. Else what is told to the optimizer.
    pub(super) fn judge(&mut self, run: &Run, tails: &[Tail]) -> Result<Option<Outcome>> {
        let found = tails.iter().enumerate().find_map(|(rank, tail)| {
            tail.non_finite.map(|(slot, elements)| (rank, slot, elements))
        });
        // A rank that trains by itself has only its own.
        let own = run.non_finite.filter(|_| self.trains_locally());
        let found = found.or(own.map(|(slot, count)| (self.store.group.rank(), slot, count)));
        let Some((rank, slot, elements)) = found else { return Ok(None) };
        self.hooked.iter_mut().for_each(Hooked::reset);
        let named = self.store.model.parameter(slot);
        let refusal = Refusal {
            rank: self.store.part.as_ref().map_or(rank, |part| part.data_ranks[rank]),
            name: named.name.clone(),
            count: elements,
            total: named.tensor.numel(),
            exchange: self.clock.statistics.exchange_count,
        };
        let error = Error::from(refusal.clone());
        // Ranks with other parts hear of it in the step: they may still wait for what this one sends after its backward.
        let is_told_later = self.store.part.is_some() && self.store.optimizer.count > 0;
        match self.options.non_finite {
            NonFinite::Error if is_told_later => Ok(Some(Outcome::Refused(refusal))),
            NonFinite::Error => {
                if !self.trains_locally() {
                    recorder::tell_shared_error(&error.to_string());
                }
                self.store.clear_gradients()?;
                self.outcome = Outcome::Nothing;
                Err(error)
            }
            NonFinite::SkipStep => {
                tracing::warn!("{error}: the step is skipped on every rank");
                Ok(Some(Outcome::Skipped))
            }
            NonFinite::Warn | NonFinite::Ignore => {
                tracing::warn!("{error}");
                Ok(None)
            }
        }
    }

    /// Where ranks told different fingerprints: an error that names the parameter and the rank.
    pub(super) fn compare_fingerprints(&mut self, tails: &[Tail]) -> Result<()> {
        let report = stepped_report(tails);
        if !report.is_empty() {
            return Err(Error::RanksDiffer { what: "the steps of their optimizers", report });
        }
        match tails.iter().all(|tail| tail.fingerprint == tails[0].fingerprint) {
            true => Ok(()),
            false => self.compare_parameters(),
        }
    }
}

/// Whether parameters are compared this time: soon at first, where most mistakes show, then now and then. Pure.
pub(crate) fn is_due(number: u64, interval: u64) -> bool {
    let is_time = number.is_multiple_of(interval.max(1));
    interval > 0 && (is_time || (number < interval && number.is_power_of_two()))
}

/// One line for each rank, if optimizers were stepped differently. Pure.
fn stepped_report(tails: &[Tail]) -> String {
    let bits = |tail: &Tail| (tail.stepped.0, tail.stepped.1.to_bits(), tail.stepped.2);
    if tails.windows(2).all(|pair| bits(&pair[0]) == bits(&pair[1])) {
        return String::new();
    }
    let line = |(rank, tail): (usize, &Tail)| {
        let (steps, lr, settings) = tail.stepped;
        format!(
            "  rank {rank}: {steps} steps, the last with lr {lr}; clipping and scales {settings:08x}\n"
        )
    };
    tails.iter().enumerate().map(line).collect()
}
