//! Which sample comes when: positions in the global order, the same for every world size and thread count.
//!
//! Global batch after global batch, epoch after epoch. A position is two numbers, so that resuming costs nothing and going
//! to any place costs nothing either.

use serde::{Deserialize, Serialize};

use crate::cast::to_u64;
use crate::error::{Error, Result};
use crate::permutation::Permutation;

/// In which order an epoch visits the samples.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Order {
    /// A [`Permutation`] chosen by seed and epoch.
    #[default]
    Shuffled,
    /// As they lie in the data, in every epoch.
    Sequential,
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
}

/// A sample, and the epoch in which it is visited: what its masks are keyed by.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Sample {
    /// The epoch, from 0.
    pub epoch: u64,
    /// The sample's number in the data, from 0.
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

/// The global order of samples, cut into global batches.
#[derive(Clone, Debug)]
pub struct Sampler {
    sample_count: u64,
    global_batch: u64,
    seed: u64,
    order: Order,
    tail: Tail,
}

impl Sampler {
    /// The order of `sample_count` samples in batches of `global_batch`.
    ///
    /// # Errors
    /// [`Error::TooFewSamples`] if an epoch would have no batch, [`Error::InvalidOption`] for a global batch of 0.
    pub fn new(
        sample_count: u64,
        global_batch: usize,
        seed: u64,
        order: Order,
        tail: Tail,
    ) -> Result<Self> {
        let global_batch = to_u64(global_batch);
        if global_batch == 0 {
            return Err(Error::option("global_batch", 0, "a batch needs at least one sample"));
        }
        if sample_count == 0 || (tail == Tail::Drop && sample_count < global_batch) {
            return Err(Error::TooFewSamples { samples: sample_count, global_batch });
        }
        Ok(Sampler { sample_count, global_batch, seed, order, tail })
    }

    /// How many samples an epoch has.
    pub fn sample_count(&self) -> u64 {
        self.sample_count
    }

    /// How many whole global batches an epoch has.
    pub fn batches_per_epoch(&self) -> u64 {
        self.sample_count / self.global_batch
    }

    /// Where the global batch at or after `position` starts: `position`, unless what is left of its epoch is dropped.
    pub fn start(&self, position: Position) -> Position {
        let Position { epoch, next_global_sample: next } = position;
        let left = self.sample_count.saturating_sub(next);
        let over = match self.tail {
            Tail::Drop => left < self.global_batch,
            Tail::Wrap => left == 0,
        };
        if over {
            // A position can come from a damaged file: no arithmetic on it may panic.
            Position { epoch: epoch.wrapping_add(1), next_global_sample: 0 }
        } else {
            position
        }
    }

    /// Where the order goes on after the global batch that starts at `start`.
    pub fn after(&self, start: Position) -> Position {
        let next = start.next_global_sample + self.global_batch;
        self.start(Position {
            epoch: start.epoch.wrapping_add((next - 1) / self.sample_count),
            next_global_sample: (next - 1) % self.sample_count + 1,
        })
    }

    /// Where a run stands after `batches` global batches from the beginning: constant cost.
    pub fn after_batches(&self, batches: u64) -> Position {
        match self.tail {
            Tail::Drop => {
                let per_epoch = self.batches_per_epoch();
                Position {
                    epoch: batches / per_epoch,
                    next_global_sample: batches % per_epoch * self.global_batch,
                }
            }
            Tail::Wrap => {
                let samples = u128::from(batches) * u128::from(self.global_batch);
                let count = u128::from(self.sample_count);
                let narrow = |value: u128| u64::try_from(value).unwrap_or(u64::MAX);
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
    pub fn cursor(&self) -> Cursor<'_> {
        Cursor { sampler: self, current: None }
    }
}

/// Reads samples off a [`Sampler`].
#[derive(Clone, Debug)]
pub struct Cursor<'a> {
    sampler: &'a Sampler,
    current: Option<(u64, Permutation)>,
}

impl Cursor<'_> {
    /// Sample `index` of the global batch that starts at `start`.
    pub fn sample(&mut self, start: Position, index: usize) -> Sample {
        let count = self.sampler.sample_count;
        let place = start.next_global_sample + to_u64(index);
        let (epoch, place) = (start.epoch.wrapping_add(place / count), place % count);
        match self.sampler.order {
            Order::Sequential => Sample { epoch, id: place },
            Order::Shuffled => Sample { epoch, id: self.permutation(epoch).at(place) },
        }
    }

    fn permutation(&mut self, epoch: u64) -> &Permutation {
        let Sampler { sample_count, seed, .. } = *self.sampler;
        let fresh = || (epoch, Permutation::new(sample_count, seed, epoch));
        let current = self.current.get_or_insert_with(fresh);
        if current.0 != epoch {
            *current = fresh();
        }
        &current.1
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
