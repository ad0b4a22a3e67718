//! Shuffling in two levels, for data that does not fit memory: a bijection of positions that is
//! never written down.
//!
//! The samples, rotated by an epoch's offset, are cut into blocks of neighbours. The blocks are
//! permuted, and so many blocks in a row are a window; the samples of a window are permuted among
//! each other. What is left over after the last whole block belongs to the last window; the
//! rotation makes it other samples in every epoch. Frozen together with
//! [`crate::order::permutation::VERSION`].

use std::ops::Range;

use super::permutation::Permutation;
use crate::random::RandomStream;

const PURPOSE: u64 = 0x626C_6F63_6B00_0001; // "block", version 1

/// The order of one epoch.
#[derive(Clone, Debug)]
pub(crate) struct BlockOrder {
    count: u64,
    block: u64,
    /// Positions of a window.
    window: u64,
    windows: u64,
    rotation: u64,
    blocks: Permutation,
    seed: u64,
    current: Option<(u64, Permutation)>,
}

impl BlockOrder {
    /// `count` samples, `block` samples a block, `window` blocks a window; none of them 0.
    pub(crate) fn new(count: u64, block: u64, window: u64, seed: u64, epoch: u64) -> Self {
        let mut stream = RandomStream::keyed(PURPOSE, &[seed, epoch, count, block, window]);
        let (blocks_seed, seed_of_windows) = (stream.next(), stream.next());
        let rotation = stream.next() % count.max(1);
        let block = block.min(count.max(1));
        let whole = count / block;
        let window = window.min(whole);
        BlockOrder {
            count,
            block,
            window: window * block,
            windows: (whole / window).max(1),
            rotation,
            blocks: Permutation::new(whole, blocks_seed, epoch),
            seed: seed_of_windows,
            current: None,
        }
    }

    /// The sample at `place`, which is below the count.
    pub(crate) fn at(&mut self, place: u64) -> u64 {
        let number = (place / self.window).min(self.windows - 1);
        let start = number * self.window;
        let end = if number + 1 == self.windows { self.count } else { start + self.window };
        let fresh = || (number, Permutation::new(end - start, self.seed, number));
        let current = self.current.get_or_insert_with(fresh);
        if current.0 != number {
            *current = (number, Permutation::new(end - start, self.seed, number));
        }
        let within = start + current.1.at(place - start);
        let (block, rest) = (within / self.block, within % self.block);
        let block = if block < self.blocks.len() { self.blocks.at(block) } else { block };
        let sample = block * self.block + rest;
        // Both are below the count, which is below 2^62.
        (sample + self.rotation) % self.count
    }
}

impl BlockOrder {
    /// How many blocks there are, with what is left over.
    pub(crate) fn block_count(&self) -> u64 {
        self.count.div_ceil(self.block)
    }

    /// Which blocks of this order must be there, or on their way, when `place` is delivered, and
    /// how many of the next epoch's order. Needed are all blocks of the window of `place`, and of
    /// the window after it as large a share as has been begun of this one. After an epoch's last
    /// window that is the first window of the next epoch, and the second number counts its blocks.
    pub(crate) fn blocks_due(&self, place: u64) -> (Range<u64>, u64) {
        let of_window = self.window / self.block;
        let number = (place / self.window).min(self.windows - 1);
        let is_last = number + 1 == self.windows;
        // The last window has what is left over as well.
        let len = |of: u64| match of + 1 == self.windows {
            true => self.block_count() - of * of_window,
            false => of_window,
        };
        let first = number * of_window;
        let begun = (place - number * self.window) / self.block + 1;
        let next = u128::from(len(if is_last { 0 } else { number + 1 })) * u128::from(begun);
        let next = u64::try_from(next.div_ceil(u128::from(len(number)))).unwrap_or(u64::MAX);
        let end = first + len(number);
        if is_last {
            (first..end, next)
        } else {
            (first..end + next, 0)
        }
    }

    /// The samples of block `number` of the order, which is below the count of blocks: one range,
    /// or two where it goes on at the data's beginning.
    pub(crate) fn block_at(&self, number: u64) -> [Range<u64>; 2] {
        let block = if number < self.blocks.len() { self.blocks.at(number) } else { number };
        let start = block * self.block + self.rotation;
        let end = ((block + 1) * self.block).min(self.count) + self.rotation;
        let within = |at: u64| at.min(self.count);
        let beyond = |at: u64| at.saturating_sub(self.count);
        [within(start)..within(end), beyond(start)..beyond(end)]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_sample_comes_once_whatever_the_sizes_are() {
        for (count, block, window) in [
            (1, 1, 1),
            (10, 3, 2),
            (100, 7, 3),
            (1000, 64, 4),
            (1000, 2000, 5),
            (997, 10, 200),
            (12, 4, 3),
        ] {
            for epoch in 0..3 {
                let mut order = BlockOrder::new(count, block, window, 7, epoch);
                let mut seen: Vec<u64> = (0..count).map(|place| order.at(place)).collect();
                let mut jumping = BlockOrder::new(count, block, window, 7, epoch);
                for place in (0..count).rev() {
                    let at = usize::try_from(place).unwrap();
                    assert_eq!(jumping.at(place), seen[at], "places are independent of each other");
                }
                seen.sort_unstable();
                assert!(seen.into_iter().eq(0..count), "{count} {block} {window}");
            }
        }
    }

    #[test]
    fn the_order_is_frozen() {
        let mut order = BlockOrder::new(1_000, 16, 4, 42, 3);
        let first: Vec<u64> = (0..8).map(|place| order.at(place)).collect();
        let last: Vec<u64> = (992..1_000).map(|place| order.at(place)).collect();
        assert_eq!((first, last), (FROZEN_FIRST.to_vec(), FROZEN_LAST.to_vec()), "{CHANGED}");
    }

    const CHANGED: &str = "the order of blocks changed: make a new version";
    const FROZEN_FIRST: [u64; 8] = [979, 848, 122, 244, 118, 254, 119, 251];
    const FROZEN_LAST: [u64; 8] = [887, 73, 159, 726, 727, 929, 161, 758];

    #[test]
    fn a_window_touches_few_blocks_and_epochs_differ() {
        let (count, block, window) = (100_000, 100, 10);
        let mut order = BlockOrder::new(count, block, window, 7, 0);
        for start in (0..count).step_by(1000) {
            let mut touched: Vec<u64> = (start..start + 1000)
                .map(|place| (order.at(place) + count - order.rotation) % count / block)
                .collect();
            touched.sort_unstable();
            touched.dedup();
            assert_eq!(touched.len(), 10);
        }
        let mut next = BlockOrder::new(count, block, window, 7, 1);
        assert!((0..count).filter(|&place| order.at(place) == next.at(place)).count() < 20);
    }

    #[test]
    fn blocks_hold_the_samples_that_come_at_their_places() {
        for (count, block) in [(1000, 10), (997, 10), (35, 10), (7, 10)] {
            let mut order = BlockOrder::new(count, block, 1, 7, 3);
            for number in 0..order.block_count() {
                let [first, second] = order.block_at(number);
                let mut listed: Vec<u64> = first.chain(second).collect();
                let places = number * block..((number + 1) * block).min(count);
                // A window of one block; what is left over shares a window with the block before
                // it.
                let whole = count / block;
                if number + 1 < whole {
                    let mut seen: Vec<u64> = places.map(|place| order.at(place)).collect();
                    listed.sort_unstable();
                    seen.sort_unstable();
                    assert_eq!(listed, seen, "block {number} of {count}");
                }
            }
            let mut all: Vec<u64> =
                (0..order.block_count()).flat_map(|n| order.block_at(n)).flatten().collect();
            all.sort_unstable();
            assert!(all.into_iter().eq(0..count));
        }
    }
}
