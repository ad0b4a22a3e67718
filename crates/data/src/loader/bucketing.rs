//! Global batches of samples of similar length, so that little is padded; still an order that
//! depends on nothing but data, seed and place.
//!
//! A window of so many global batches is sorted by length, cut into batches, and these are
//! permuted. Windows are counted from the epoch's beginning; a last global batch that is not whole
//! stays as it is. A sample that is left out is as long as the one that stands in for it: its own
//! length may lie in what is damaged.
//!
//! Memory: 24 bytes for each sample of a window, in each prefetch thread; after the first window
//! nothing is allocated.

use super::holes::Holes;
use crate::batches::Scratch;
use crate::cast::{to_u64, to_usize};
use crate::error::{Error, Result};
use crate::order::permutation::Permutation;
use crate::order::sampler::{Cursor, Sampler};
use crate::order::{Position, Sample};
use crate::random::RandomStream;
use crate::samples::Samples;

const PURPOSE: u64 = 0x6275_636B_0000_0001; // "buck", version 1

/// Samples of a window are counted in so many bits.
const PLACE_BITS: u32 = 24;

/// The window that a thread is in.
#[derive(Debug, Default)]
pub(crate) struct BucketWindow {
    /// Epoch and number of the window.
    current: Option<(u64, u64)>,
    /// Sorted by length, and by place in the window where that is equal: both are in the key.
    samples: Vec<(u64, Sample)>,
    batches: Option<Permutation>,
}

impl BucketWindow {
    /// The samples of the global batch that starts at `start`. `None`: its samples are those of the
    /// order.
    pub(crate) fn batch(
        &mut self,
        (sampler, cursor): (&Sampler, &mut Cursor),
        batches: u64,
        start: Position,
        (data, holes, scratch): (&dyn Samples, &Holes, &mut Scratch),
    ) -> Result<Option<&[(u64, Sample)]>> {
        let global_batch = sampler.global_batch();
        let whole = sampler.sample_count() / global_batch;
        let number = start.next_global_sample / global_batch;
        if number >= whole {
            return Ok(None);
        }
        let window = number / batches;
        let first = window * batches;
        let in_window = batches.min(whole - first);
        if self.current != Some((start.epoch, window)) {
            self.current = None;
            self.samples.clear();
            for place in 0..in_window * global_batch {
                let sample = cursor.at(start.epoch, first * global_batch + place);
                let read = holes.instead(sample.id).unwrap_or(sample.id);
                let len = to_u64(data.sample_len(read, scratch)?);
                self.samples.push((key(len, place), sample));
            }
            // A stable sort would allocate; keys differ, so this one has the same result.
            self.samples.sort_unstable_by_key(|&(key, _)| key);
            let seed = RandomStream::keyed(PURPOSE, &[sampler.seed(), window]).next();
            self.batches = Some(Permutation::new(in_window, seed, start.epoch));
            self.current = Some((start.epoch, window));
        }
        let batch = self.batches.as_ref().map_or(0, |order| order.at(number - first));
        let at = to_usize(batch * global_batch);
        Ok(self.samples.get(at..at + to_usize(global_batch)))
    }
}

/// Orders by length, then by place.
fn key(len: u64, place: u64) -> u64 {
    len.min(u64::MAX >> PLACE_BITS) << PLACE_BITS | place
}

/// Whether batches of similar length can be made from here on.
pub(crate) fn check(sampler: &Sampler, wraps: bool, batches: u64, start: Position) -> Result<()> {
    let refuse = |reason: &str| Err(Error::option("bucketing", batches, reason));
    if wraps {
        return refuse(
            "batches of similar length need an epoch that ends: take another tail than wrap",
        );
    }
    if !start.next_global_sample.is_multiple_of(sampler.global_batch()) {
        return refuse(
            "the saved position is not at the beginning of a global batch: go on with the global batch of the run that saved it",
        );
    }
    if batches.saturating_mul(sampler.global_batch()) > 1 << PLACE_BITS {
        return refuse("a window may have 16 777 216 samples at most");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::batches::{Column, DType};
    use crate::order::{Order, Tail};
    use crate::samples::from_fn;

    #[test]
    fn the_order_is_frozen() {
        let columns = vec![Column::padded("n", DType::I64, [100])];
        let data = from_fn(203, columns, "v1", |_, _, _| Ok(()))
            .with_len(|id| Ok(to_usize(id * 7919 % 59) + 1));
        let sampler = Sampler::new(203, 8, 42, Order::Shuffled, Tail::Pad).unwrap();
        let (mut cursor, mut scratch) = (sampler.cursor(), Scratch::default());
        let mut window = BucketWindow::default();
        let mut batch = |number: u64| -> Vec<u64> {
            let start = Position { epoch: 3, next_global_sample: number * 8 };
            let data = (&data as &dyn Samples, &Holes::default(), &mut scratch);
            let batch = window.batch((&sampler, &mut cursor), 4, start, data);
            batch.unwrap().unwrap().iter().map(|(_, sample)| sample.id).collect()
        };
        let batches = [batch(0), batch(1), batch(24)];
        assert_eq!(batches, FROZEN, "the order of buckets changed: make a new version");
    }

    const FROZEN: [[u64; 8]; 3] = [
        [98, 89, 30, 148, 53, 162, 35, 99],
        [118, 14, 164, 96, 10, 60, 1, 178],
        [64, 138, 188, 25, 112, 153, 54, 195],
    ];

    #[test]
    fn keys_order_by_length_and_then_by_place() {
        let last = (1 << PLACE_BITS) - 1;
        let keys = [key(0, 0), key(0, last), key(1, 0), key(1, 7), key(2, 0), key(u64::MAX, last)];
        assert!(keys.is_sorted_by(|a, b| a < b));
    }
}
