//! Data that a two-level shuffle reads soon, asked for from the disk before: while block k of the order is delivered, block
//! k + window is on its way. So a window's data are there when it begins, and the disk is asked for one block at a time.

use std::sync::Mutex;

use crate::blocks::BlockOrder;
use crate::sampler::Position;
use crate::samples::Samples;

/// What was asked for. Shared by the threads of a loader.
#[derive(Debug)]
pub(crate) struct Ahead {
    count: u64,
    block: u64,
    window: u64,
    seed: u64,
    state: Mutex<Option<State>>,
}

#[derive(Debug)]
struct State {
    epoch: u64,
    order: BlockOrder,
    /// Blocks of the epoch's order that were asked for, or need not be.
    asked: u64,
}

impl Ahead {
    /// For `count` samples in blocks and windows as [`BlockOrder`] takes them.
    pub(crate) fn new(count: u64, (block, window): (u64, u64), seed: u64) -> Self {
        Ahead { count, block, window, seed, state: Mutex::new(None) }
    }

    /// To be called when a place is delivered.
    pub(crate) fn reach(&self, place: Position, samples: &dyn Samples) {
        // Another thread is at it; if its place is an earlier one, the next call makes up for it.
        let Ok(mut state) = self.state.try_lock() else { return };
        let (epoch, place) = (place.epoch, place.next_global_sample);
        if state.as_ref().is_none_or(|state| state.epoch < epoch) {
            let order = BlockOrder::new(self.count, self.block, self.window, self.seed, epoch);
            let asked = order.blocks_due(place).start;
            *state = Some(State { epoch, order, asked });
        }
        let Some(state) = state.as_mut().filter(|state| state.epoch == epoch) else { return };
        let until = state.order.blocks_due(place).end;
        while state.asked < until {
            for range in state.order.block_at(state.asked) {
                if !range.is_empty() {
                    samples.will_need(range);
                }
            }
            state.asked += 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::ops::Range;

    use super::*;
    use crate::batch::{Column, Rows};
    use crate::error::Result;
    use crate::fingerprint::Fingerprint;
    use crate::samples::Scratch;

    /// Remembers what was asked for.
    #[derive(Default)]
    struct Asked(Mutex<Vec<Range<u64>>>);

    impl Samples for Asked {
        fn sample_count(&self) -> u64 {
            0
        }

        fn columns(&self) -> &[Column] {
            &[]
        }

        fn fingerprint(&self) -> Fingerprint {
            Fingerprint(0)
        }

        fn will_need(&self, samples: Range<u64>) {
            self.0.lock().unwrap().push(samples);
        }

        fn fill(&self, _: u64, _: &mut Rows<'_>, _: &mut Scratch) -> Result<()> {
            Ok(())
        }
    }

    #[test]
    fn what_is_delivered_was_asked_for_once_and_little_else() {
        for (count, block, window) in
            [(1000, 10, 4), (997, 10, 4), (35, 10, 4), (7, 10, 4), (640, 64, 20)]
        {
            let ahead = Ahead::new(count, (block, window), 7);
            for epoch in 0..3 {
                let asked = Asked::default();
                let mut order = BlockOrder::new(count, block, window, 7, epoch);
                for place in 0..count {
                    ahead.reach(Position { epoch, next_global_sample: place }, &asked);
                    let ranges = asked.0.lock().unwrap();
                    let sample = order.at(place);
                    assert!(
                        ranges.iter().any(|range| range.contains(&sample)),
                        "{place} of {count}"
                    );
                    let total: u64 = ranges.iter().map(|range| range.end - range.start).sum();
                    assert!(total <= place + (2 * window + 2) * block, "{total} at {place}");
                }
                let total: u64 = asked.0.lock().unwrap().iter().map(|r| r.end - r.start).sum();
                assert_eq!(total, count, "each sample once");
            }
        }
    }

    #[test]
    fn a_resumed_run_asks_for_the_rest_of_its_window_and_for_no_earlier_one() {
        let (ahead, asked) = (Ahead::new(1000, (10, 4), 7), Asked::default());
        ahead.reach(Position { epoch: 5, next_global_sample: 505 }, &asked);
        let total: u64 = asked.0.lock().unwrap().iter().map(|r| r.end - r.start).sum();
        // Block 50: its window begins at block 48, and block 54 is on its way.
        assert_eq!(total, 70);
        ahead.reach(Position { epoch: 4, next_global_sample: 990 }, &asked);
        assert_eq!(asked.0.lock().unwrap().iter().map(|r| r.end - r.start).sum::<u64>(), 70);
    }
}
