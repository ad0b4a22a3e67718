//! Which sample comes when: positions in the global order, the same for every world size and thread count.
//!
//! Global batch after global batch, epoch after epoch. A position is two numbers, so that resuming costs nothing and going
//! to any place costs nothing either.

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::blocks::BlockOrder;
use crate::cast::{to_u64, to_usize};
use crate::error::{Error, Result};
use crate::mixing::Mixing;
use crate::permutation::Permutation;
use crate::samples::Part;

/// In which order an epoch visits the samples. As text: `shuffled`, `sequential`, `b65536x16`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum Order {
    /// A [`Permutation`] chosen by seed and epoch.
    #[default]
    Shuffled,
    /// As they lie in the data, in every epoch.
    Sequential,
    /// For data that does not fit memory: blocks of neighbours are shuffled, and then the samples of `window` blocks in a
    /// row. Reading touches `window` blocks at a time. How close that comes to a full shuffle: [`Quality`](crate::Quality).
    Blocks {
        /// Samples of a block.
        block: u64,
        /// Blocks of a window: 10 or more.
        window: u64,
    },
}

impl fmt::Display for Order {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Order::Shuffled => f.write_str("shuffled"),
            Order::Sequential => f.write_str("sequential"),
            Order::Blocks { block, window } => write!(f, "b{block}x{window}"),
        }
    }
}

impl FromStr for Order {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        let sizes = || {
            let (block, window) = text.strip_prefix('b')?.split_once('x')?;
            Some(Order::Blocks { block: block.parse().ok()?, window: window.parse().ok()? })
        };
        match text {
            "shuffled" => Ok(Order::Shuffled),
            "sequential" => Ok(Order::Sequential),
            _ => sizes().ok_or_else(|| {
                format!("`{text}` is no order: shuffled, sequential, or blocks such as b65536x16")
            }),
        }
    }
}

impl TryFrom<String> for Order {
    type Error = String;

    fn try_from(text: String) -> std::result::Result<Self, String> {
        text.parse()
    }
}

impl From<Order> for String {
    fn from(order: Order) -> String {
        order.to_string()
    }
}

/// What happens to the samples at an epoch's end that do not fill a global batch.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Tail {
    /// They are left out of this epoch; shuffled, other ones are left out of the next.
    #[default]
    Drop,
    /// They share a global batch with the first samples of the next epoch: every sample is seen exactly once an epoch.
    Wrap,
    /// There may be none: an epoch that does not divide into global batches is an error that says the numbers.
    Refuse,
    /// The epoch's last global batch is filled up with samples that do not count: every rank has as many rows as ever, and
    /// [`Batch::valid`](crate::Batch::valid) says which count.
    Pad,
    /// The epoch's last global batch is smaller, and ranks weigh as much as they have samples
    /// ([`Step::weight`](crate::Step::weight)). A rank for which there is none gets one row that does not count.
    Exact,
}

/// A sample, and the epoch in which it is visited: what its masks are keyed by.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Sample {
    /// The epoch, from 0. In a mixture: how often all samples of the sample's part were visited before.
    pub epoch: u64,
    /// The sample's number in the data, from 0. In a mixture: parts are counted one after the other.
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
pub struct BatchSize {
    /// Rows of all ranks together.
    pub rows: usize,
    /// How many of them count: the first ones.
    pub valid: usize,
}

/// The global order of samples, cut into global batches.
#[derive(Clone, Debug)]
pub struct Sampler {
    sample_count: u64,
    global_batch: u64,
    seed: u64,
    order: Order,
    tail: Tail,
    mixing: Option<Arc<Mixing>>,
}

impl Sampler {
    /// The order of `sample_count` samples in batches of `global_batch`.
    ///
    /// # Errors
    /// [`Error::TooFewSamples`] if an epoch would have no batch, [`Error::InvalidOption`] for a global batch of 0 or an order
    /// of empty blocks.
    pub fn new(
        sample_count: u64,
        global_batch: usize,
        seed: u64,
        order: Order,
        tail: Tail,
    ) -> Result<Self> {
        let parts = [Part { samples: sample_count, weight: 1.0 }];
        Self::mixed(&parts, global_batch, seed, order, tail)
    }

    /// The order of a mixture: from each part so many samples as its weight says, at every place of the order. An epoch
    /// is as many samples as all parts have; of how many samples of a part that is decide the weights.
    ///
    /// # Errors
    /// As [`Sampler::new`], and [`Error::InvalidOption`] for a part without samples, for a weight that is not positive, and
    /// for another tail than [`Tail::Wrap`] with more than one part.
    pub fn mixed(
        parts: &[Part],
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
        Ok(Sampler { sample_count, global_batch, seed, order, tail, mixing })
    }

    /// How many samples an epoch has.
    pub fn sample_count(&self) -> u64 {
        self.sample_count
    }

    pub(crate) fn seed(&self) -> u64 {
        self.seed
    }

    /// Samples of a block and blocks of a window, where the order has them and the data is no mixture.
    pub(crate) fn blocks(&self) -> Option<(u64, u64)> {
        match self.order {
            Order::Blocks { block, window } if self.mixing.is_none() => Some((block, window)),
            _ => None,
        }
    }

    pub(crate) fn global_batch(&self) -> u64 {
        self.global_batch
    }

    /// How many global batches an epoch has; the last one may be padded or smaller. [`Tail::Wrap`]: how many begin and end
    /// in it at least.
    pub fn batches_per_epoch(&self) -> u64 {
        match self.tail {
            Tail::Drop | Tail::Wrap | Tail::Refuse => self.sample_count / self.global_batch,
            Tail::Pad | Tail::Exact => self.sample_count.div_ceil(self.global_batch),
        }
    }

    /// Where the global batch at or after `position` starts: `position`, unless what is left of its epoch is dropped.
    pub fn start(&self, position: Position) -> Position {
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
    pub fn size(&self, start: Position) -> BatchSize {
        let whole = to_usize(self.global_batch);
        let left = self.sample_count.saturating_sub(start.next_global_sample);
        let there = to_usize(self.global_batch.min(left));
        match self.tail {
            Tail::Drop | Tail::Wrap | Tail::Refuse => BatchSize { rows: whole, valid: whole },
            Tail::Pad => BatchSize { rows: whole, valid: there },
            Tail::Exact => BatchSize { rows: there, valid: there },
        }
    }

    /// Where the order goes on after the global batch that starts at `start`.
    pub fn after(&self, start: Position) -> Position {
        let next = start.next_global_sample + to_u64(self.size(start).valid);
        self.start(Position {
            epoch: start.epoch.wrapping_add((next - 1) / self.sample_count),
            next_global_sample: (next - 1) % self.sample_count + 1,
        })
    }

    /// Where a run stands after `batches` global batches from the beginning: constant cost.
    pub fn after_batches(&self, batches: u64) -> Position {
        let narrow = |value: u128| u64::try_from(value).unwrap_or(u64::MAX);
        match self.tail {
            Tail::Drop | Tail::Refuse | Tail::Pad | Tail::Exact => {
                let per_epoch = self.batches_per_epoch();
                Position {
                    epoch: batches / per_epoch,
                    next_global_sample: batches % per_epoch * self.global_batch,
                }
            }
            Tail::Wrap => {
                let samples = u128::from(batches) * u128::from(self.global_batch);
                let count = u128::from(self.sample_count);
                Position {
                    epoch: narrow(samples / count),
                    next_global_sample: narrow(samples % count),
                }
            }
        }
    }

    /// Sample `index` of the global batch that starts at `start`.
    pub fn sample(&self, start: Position, index: usize) -> Sample {
        self.cursor().sample(start, index)
    }

    /// A reader of many samples, which keeps an epoch's permutation while the epoch lasts.
    pub fn cursor(&self) -> Cursor {
        let parts = self.mixing.as_ref().map_or(1, |mixing| mixing.parts().len());
        Cursor { sampler: self.clone(), current: vec![None; parts] }
    }
}

/// Reads samples off a [`Sampler`].
#[derive(Clone, Debug)]
pub struct Cursor {
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
    /// Sample `index` of the global batch that starts at `start`. Rows that do not count repeat the epoch's first ones.
    pub fn sample(&mut self, start: Position, index: usize) -> Sample {
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
        let stream = u128::from(epoch) * u128::from(self.sampler.sample_count) + u128::from(place);
        let drawn = mixing.at(stream);
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
        for batch in 0..batches {
            assert_eq!(sampler.start(sampler.after_batches(batch as u64)), start);
            samples.extend((0..global_batch).map(|index| sampler.sample(start, index)));
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
