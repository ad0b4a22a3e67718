//! Which sample comes when: positions in the global order, the same for every world size and thread
//! count.
//!
//! Global batch after global batch, epoch after epoch. A position is two numbers, so that resuming
//! costs nothing and going to any place costs nothing either.

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::blocks::BlockOrder;
use super::mixing::{Mixing, MixtureComponent};
use super::options::{Order, Tail};
use super::permutation::Permutation;
use crate::cast::{to_u64, to_usize};
use crate::error::{Error, Result};

/// A sample, and the epoch in which it is visited: what its masks are keyed by.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Sample {
    /// The epoch, from 0. In a mixture: how often all samples of the sample's part were visited
    /// before.
    pub epoch: u64,
    /// The sample's number in the data, from 0. In a mixture: parts are counted one after the
    /// other.
    pub id: u64,
}

/// A place in the global order: the next sample that nobody has computed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Position {
    /// The epoch, from 0.
    pub epoch: u64,
    /// How many samples of the epoch's order are done.
    pub next_global_sample: u64,
}

/// How large a global batch is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct BatchSize {
    /// Rows of all ranks together.
    pub(crate) rows: usize,
    /// How many of them count: the first ones.
    pub(crate) valid: usize,
}

/// The global order of samples, cut into global batches.
#[derive(Clone, Debug)]
pub(crate) struct Sampler {
    sample_count: u64,
    global_batch: u64,
    seed: u64,
    order: Order,
    tail: Tail,
    /// The order ends after so many epochs.
    epochs: Option<u64>,
    mixing: Option<Arc<Mixing>>,
}

impl Sampler {
    /// The order of `sample_count` samples in batches of `global_batch`.
    ///
    /// # Errors
    /// [`Error::TooFewSamples`] if an epoch would have no batch, [`Error::InvalidOption`] for a
    /// global batch of 0 or an order of empty blocks.
    pub(crate) fn new(
        sample_count: u64,
        global_batch: usize,
        seed: u64,
        order: Order,
        tail: Tail,
    ) -> Result<Self> {
        let parts = [MixtureComponent { samples: sample_count, weight: 1.0 }];
        Self::mixed(&parts, global_batch, seed, order, tail)
    }

    /// The order of a mixture: from each part so many samples as its weight says, at every place of
    /// the order. An epoch is as many samples as all parts have; of how many samples of a part that
    /// is decide the weights.
    ///
    /// # Errors
    /// As [`Sampler::new`], and [`Error::InvalidOption`] for a part without samples, for a weight
    /// that is not positive, and for another tail than [`Tail::Wrap`] with more than one part.
    pub(crate) fn mixed(
        parts: &[MixtureComponent],
        global_batch: usize,
        seed: u64,
        order: Order,
        tail: Tail,
    ) -> Result<Self> {
        let global_batch = to_u64(global_batch);
        if global_batch == 0 {
            return Err(Error::option("global_batch", 0, "a batch needs at least one sample"));
        }
        if let Order::Blocks { block: 0, .. } | Order::Blocks { window: 0, .. } = order {
            let reason = "blocks and windows have at least one sample (for example b65536x16)";
            return Err(Error::option("order", order, reason));
        }
        let sample_count = parts.iter().fold(0_u64, |sum, part| sum.saturating_add(part.samples));
        if sample_count == 0 || (tail == Tail::Drop && sample_count < global_batch) {
            return Err(Error::TooFewSamples { samples: sample_count, global_batch });
        }
        let over = sample_count % global_batch;
        if tail == Tail::Refuse && over > 0 {
            let reason = format!(
                "{sample_count} samples are {} global batches of {global_batch} and {over} samples more: take {} samples, a global \
                 batch that divides them, or another tail (drop, wrap, pad, exact)",
                sample_count / global_batch,
                sample_count - over,
            );
            return Err(Error::option("tail", "refuse", reason));
        }
        if sample_count > 1 << 62 {
            return Err(Error::option("samples", sample_count, "there may be 2^62 at most"));
        }
        let mixing = match parts {
            [_] => None,
            _ if tail != Tail::Wrap => {
                let reason =
                    "a mixture has no end at which something could be left over: take wrap";
                return Err(Error::option("tail", format!("{tail:?}").to_lowercase(), reason));
            }
            _ => Some(Arc::new(Mixing::new(parts)?)),
        };
        Ok(Sampler { sample_count, global_batch, seed, order, tail, epochs: None, mixing })
    }

    /// The same order, which ends after so many epochs: no sample of a later one counts. `None`: it
    /// has no end.
    #[must_use]
    pub(crate) fn with_epochs(self, epochs: Option<u64>) -> Self {
        Sampler { epochs, ..self }
    }

    /// How many samples an epoch has.
    pub(crate) fn sample_count(&self) -> u64 {
        self.sample_count
    }

    pub(crate) fn seed(&self) -> u64 {
        self.seed
    }

    /// Samples of a block and blocks of a window, where the order has them.
    pub(crate) fn blocks(&self) -> Option<(u64, u64)> {
        match self.order {
            Order::Blocks { block, window } => Some((block, window)),
            Order::Shuffled | Order::Sequential => None,
        }
    }

    pub(crate) fn mixing(&self) -> Option<&Mixing> {
        self.mixing.as_deref()
    }

    /// How many samples there are from a place on, in all epochs.
    fn left_of_all(&self, place: Position) -> u128 {
        let whole = |epochs: u64| u128::from(epochs) * u128::from(self.sample_count);
        self.epochs.map_or(u128::MAX, |epochs| whole(epochs).saturating_sub(self.stream(place)))
    }

    /// How many samples of the endless order come before a place.
    pub(crate) fn stream(&self, Position { epoch, next_global_sample: place }: Position) -> u128 {
        u128::from(epoch) * u128::from(self.sample_count) + u128::from(place)
    }

    pub(crate) fn global_batch(&self) -> u64 {
        self.global_batch
    }

    /// How many global batches an epoch has; the last one may be padded or smaller. [`Tail::Wrap`]:
    /// how many begin and end in it at least, if it is not the only one.
    pub(crate) fn batches_per_epoch(&self) -> u64 {
        match self.tail {
            Tail::Wrap if self.epochs == Some(1) => self.sample_count.div_ceil(self.global_batch),
            Tail::Drop | Tail::Wrap | Tail::Refuse => self.sample_count / self.global_batch,
            Tail::Pad | Tail::Exact => self.sample_count.div_ceil(self.global_batch),
        }
    }

    /// Where the global batch at or after `position` starts: `position`, unless what is left of its
    /// epoch is dropped.
    pub(crate) fn start(&self, position: Position) -> Position {
        let Position { epoch, next_global_sample: next } = position;
        let left = self.sample_count.saturating_sub(next);
        let over = match self.tail {
            Tail::Drop => left < self.global_batch,
            Tail::Wrap | Tail::Refuse | Tail::Pad | Tail::Exact => left == 0,
        };
        if over {
            // A position can come from a damaged file: no arithmetic on it may panic.
            Position { epoch: epoch.wrapping_add(1), next_global_sample: 0 }
        } else {
            position
        }
    }

    /// How large the global batch that starts at `start` is.
    pub(crate) fn size(&self, start: Position) -> BatchSize {
        let whole = to_usize(self.global_batch);
        let left = self.sample_count.saturating_sub(start.next_global_sample);
        let there = to_usize(self.global_batch.min(left));
        match self.tail {
            Tail::Drop | Tail::Refuse => BatchSize { rows: whole, valid: whole },
            Tail::Wrap => {
                let of_all = self.left_of_all(start).min(u128::from(self.global_batch));
                BatchSize { rows: whole, valid: u64::try_from(of_all).map_or(whole, to_usize) }
            }
            Tail::Pad => BatchSize { rows: whole, valid: there },
            Tail::Exact => BatchSize { rows: there, valid: there },
        }
    }

    /// Where the order goes on after the global batch that starts at `start`.
    pub(crate) fn after(&self, start: Position) -> Position {
        let next = start.next_global_sample.saturating_add(to_u64(self.size(start).valid));
        let last = next.saturating_sub(1);
        self.start(Position {
            epoch: start.epoch.wrapping_add(last / self.sample_count),
            next_global_sample: last % self.sample_count + 1,
        })
    }

    /// A reader of many samples, which keeps an epoch's permutation while the epoch lasts.
    pub(crate) fn cursor(&self) -> Cursor {
        let parts = self.mixing.as_ref().map_or(1, |mixing| mixing.parts().len());
        Cursor { sampler: self.clone(), current: vec![None; parts] }
    }
}

/// Reads samples off a [`Sampler`].
#[derive(Clone, Debug)]
pub(crate) struct Cursor {
    sampler: Sampler,
    /// By part.
    current: Vec<Option<(u64, Epoch)>>,
}

/// The order of one epoch of a part.
#[derive(Clone, Debug)]
enum Epoch {
    Whole(Permutation),
    Blocks(BlockOrder),
}

impl Cursor {
    /// Sample `index` of the global batch that starts at `start`. Rows that do not count repeat the
    /// epoch's first ones.
    pub(crate) fn sample(&mut self, start: Position, index: usize) -> Sample {
        let count = self.sampler.sample_count;
        let place = start.next_global_sample.saturating_add(to_u64(index));
        let epoch = match self.sampler.tail {
            Tail::Pad | Tail::Exact => start.epoch,
            Tail::Drop | Tail::Wrap | Tail::Refuse => start.epoch.wrapping_add(place / count),
        };
        self.at(epoch, place % count)
    }

    /// The sample at a place of an epoch.
    pub(crate) fn at(&mut self, epoch: u64, place: u64) -> Sample {
        let Some(mixing) = &self.sampler.mixing else {
            let count = self.sampler.sample_count;
            return Sample { epoch, id: self.of_part(0, count, epoch, place) };
        };
        let drawn = mixing.at(self.sampler.stream(Position { epoch, next_global_sample: place }));
        let id = self.of_part(drawn.part, drawn.samples, drawn.round, drawn.place);
        Sample { epoch: drawn.round, id: drawn.first + id }
    }

    fn of_part(&mut self, part: usize, count: u64, epoch: u64, place: u64) -> u64 {
        let order = self.sampler.order;
        if order == Order::Sequential {
            return place;
        }
        let seed = self.sampler.seed;
        let seed = if self.sampler.mixing.is_some() { Mixing::seed_of(seed, part) } else { seed };
        let fresh = || match order {
            Order::Blocks { block, window } => {
                Epoch::Blocks(BlockOrder::new(count, block, window, seed, epoch))
            }
            Order::Shuffled | Order::Sequential => {
                Epoch::Whole(Permutation::new(count, seed, epoch))
            }
        };
        let current = self.current[part].get_or_insert_with(|| (epoch, fresh()));
        if current.0 != epoch {
            *current = (epoch, fresh());
        }
        match &mut current.1 {
            Epoch::Whole(permutation) => permutation.at(place),
            Epoch::Blocks(blocks) => blocks.at(place),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn epochs(sampler: &Sampler, global_batch: usize, batches: usize) -> Vec<Sample> {
        let mut start = sampler.start(Position::default());
        let mut samples = Vec::new();
        for _ in 0..batches {
            samples.extend((0..global_batch).map(|index| sampler.cursor().sample(start, index)));
            start = sampler.after(start);
        }
        samples
    }

    #[test]
    fn dropping_the_tail_visits_no_sample_twice_and_rolls_over() {
        for order in [Order::Shuffled, Order::Sequential] {
            let sampler = Sampler::new(10, 4, 1, order, Tail::Drop).unwrap();
            let samples = epochs(&sampler, 4, 4);
            let per_epoch: Vec<u64> = samples.iter().map(|s| s.epoch).collect();
            assert_eq!(per_epoch, [[0; 8], [1; 8]].concat());
            for epoch in samples.chunks(8) {
                let mut ids: Vec<u64> = epoch.iter().map(|s| s.id).collect();
                ids.sort_unstable();
                ids.dedup();
                assert_eq!(ids.len(), 8);
            }
        }
    }

    #[test]
    fn wrapping_visits_every_sample_exactly_once_an_epoch() {
        for global_batch in [1, 3, 4, 10, 23] {
            let sampler = Sampler::new(10, global_batch, 9, Order::Shuffled, Tail::Wrap).unwrap();
            let samples = epochs(&sampler, global_batch, 40);
            for (epoch, seen) in samples.chunks_exact(10).enumerate() {
                let mut ids: Vec<u64> = seen.iter().map(|s| s.id).collect();
                ids.sort_unstable();
                assert_eq!(ids, (0..10).collect::<Vec<_>>());
                assert!(seen.iter().all(|s| s.epoch == epoch as u64));
            }
        }
    }

    #[test]
    fn a_wrapping_order_ends_with_its_last_epoch() {
        for (global_batch, count) in [(4, 10), (3, 10), (10, 10), (5, 10), (23, 10), (40, 10)] {
            let sampler =
                Sampler::new(count, global_batch, 9, Order::Shuffled, Tail::Wrap).unwrap();
            let sampler = sampler.with_epochs(Some(3));
            let (mut start, mut seen) = (Position::default(), Vec::new());
            while start.epoch < 3 {
                let size = sampler.size(start);
                assert_eq!(size.rows, global_batch);
                seen.extend((0..size.valid).map(|index| sampler.cursor().sample(start, index)));
                start = sampler.after(start);
            }
            assert_eq!(start, Position { epoch: 3, next_global_sample: 0 });
            seen.sort_unstable();
            let all = (0..3).flat_map(|epoch| (0..count).map(move |id| Sample { epoch, id }));
            assert_eq!(
                seen,
                all.collect::<Vec<_>>(),
                "each sample once an epoch, and of no fourth"
            );
        }
        let one = Sampler::new(10, 4, 9, Order::Shuffled, Tail::Wrap).unwrap();
        assert_eq!(one.batches_per_epoch(), 2);
        assert_eq!(one.with_epochs(Some(1)).batches_per_epoch(), 3);
    }

    #[test]
    fn a_place_out_of_a_damaged_file_is_no_panic() {
        for tail in [Tail::Drop, Tail::Wrap, Tail::Refuse, Tail::Pad, Tail::Exact] {
            let sampler =
                Sampler::new(8, 4, 9, Order::Shuffled, tail).unwrap().with_epochs(Some(2));
            for next_global_sample in [0, 7, 8, 9, u64::MAX] {
                let start = Position { epoch: u64::MAX, next_global_sample };
                sampler.after(start);
                sampler.cursor().sample(start, 3);
            }
        }
    }

    #[test]
    fn sequential_is_the_order_of_the_data() {
        let sampler = Sampler::new(8, 4, 1, Order::Sequential, Tail::Drop).unwrap();
        let ids: Vec<u64> = epochs(&sampler, 4, 4).iter().map(|s| s.id).collect();
        assert_eq!(ids, [0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 2, 3, 4, 5, 6, 7]);
    }

    #[test]
    fn too_little_data_is_an_error_that_names_both_numbers() {
        let error = Sampler::new(3, 4, 0, Order::Shuffled, Tail::Drop).unwrap_err().to_string();
        assert!(error.contains("3 samples") && error.contains("global batch of 4"), "{error}");
        assert!(Sampler::new(3, 4, 0, Order::Shuffled, Tail::Wrap).is_ok());
        assert!(Sampler::new(0, 4, 0, Order::Shuffled, Tail::Wrap).is_err());
        assert!(Sampler::new(3, 0, 0, Order::Shuffled, Tail::Drop).is_err());
    }
}
