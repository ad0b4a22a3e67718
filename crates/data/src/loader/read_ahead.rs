//! Asking the disk for what a two-level shuffle reads soon: while block k of a window is delivered,
//! block k of the next window is on its way, be it of this epoch or the next. So the data of a
//! window are there when it begins, and the disk is asked for one block at a time. The first window
//! is asked for when a loader starts.
//!
//! A thread does this: bounds of rows of any length must be read before it is known what to ask
//! for, and the system may take its time.

use std::ops::Range;
use std::panic::{catch_unwind, AssertUnwindSafe};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crate::batches::Scratch;
use crate::error::{Error, Result};
use crate::order::blocks::BlockOrder;
use crate::order::mixing::Mixing;
use crate::order::sampler::Sampler;
use crate::order::Position;
use crate::samples::Samples;

/// The thread looks whether the loader is gone at least so often, should a wake-up be lost.
const LOOK_AGAIN: Duration = Duration::from_secs(1);

/// What was asked for, of each part of a mixture.
#[derive(Debug)]
pub(crate) struct Asking {
    sampler: Sampler,
    /// Nothing is needed after so many epochs.
    epochs: Option<u64>,
    /// Samples of a block and blocks of a window.
    sizes: (u64, u64),
    parts: Vec<BlocksAhead>,
    /// How often each part was drawn from.
    counts: Vec<u64>,
}

/// Samples with an order of their own.
#[derive(Debug)]
struct BlocksAhead {
    first: u64,
    samples: u64,
    seed: u64,
    /// An epoch, and how many blocks of its order were asked for, or need not be. Of earlier epochs
    /// nothing is needed.
    asked: Option<(u64, u64)>,
}

impl Asking {
    /// `None` if the order has no blocks.
    pub(crate) fn new(sampler: &Sampler, epochs: Option<u64>) -> Option<Self> {
        let (sizes, seed) = (sampler.blocks()?, sampler.seed());
        let parts: Vec<BlocksAhead> = match sampler.mixing() {
            None => {
                vec![BlocksAhead { first: 0, samples: sampler.sample_count(), seed, asked: None }]
            }
            Some(mixing) => {
                let of_part =
                    |(number, part): (usize, &crate::order::mixing::MixedPart)| BlocksAhead {
                        first: part.first,
                        samples: part.samples,
                        seed: Mixing::seed_of(seed, number),
                        asked: None,
                    };
                mixing.parts().iter().enumerate().map(of_part).collect()
            }
        };
        let counts = vec![0; parts.len()];
        Some(Asking { sampler: sampler.clone(), epochs, sizes, parts, counts })
    }

    /// Gives what must be asked for when a place is delivered, and was not asked for yet. Places
    /// come in ascending order.
    fn reach(&mut self, at: Position, ask: &mut dyn FnMut(Range<u64>)) {
        let Asking { sampler, epochs, sizes, parts, counts } = self;
        match sampler.mixing() {
            None => {
                let Position { epoch, next_global_sample: place } = at;
                let goes_on = epochs.is_none_or(|end| epoch.saturating_add(1) < end);
                parts[0].reach(*sizes, (epoch, place), goes_on, ask);
            }
            Some(mixing) => mixing.before(sampler.stream(at), counts, |part, round, place| {
                parts[part].reach(*sizes, (round, place), true, ask);
            }),
        }
    }
}

impl BlocksAhead {
    fn reach(
        &mut self,
        (block, window): (u64, u64),
        (epoch, place): (u64, u64),
        goes_on: bool,
        ask: &mut dyn FnMut(Range<u64>),
    ) {
        let order_of = |number| BlockOrder::new(self.samples, block, window, self.seed, number);
        let (of_epoch, of_next) = order_of(epoch).blocks_due(place);
        let of_next = 0..if goes_on { of_next } else { 0 };
        for (number, due) in [(epoch, of_epoch), (epoch.wrapping_add(1), of_next)] {
            let start = match self.asked {
                Some((later, _)) if later > number => continue,
                Some((same, blocks)) if same == number => blocks,
                _ => due.start,
            };
            if start >= due.end {
                continue;
            }
            let order = order_of(number);
            for range in (start..due.end).flat_map(|at| order.block_at(at)) {
                if !range.is_empty() {
                    ask(self.first + range.start..self.first + range.end);
                }
            }
            self.asked = Some((number, due.end));
        }
    }
}

/// The thread that asks.
#[derive(Debug)]
pub(crate) struct ReadAhead {
    shared: Arc<ReadAheadShared>,
    /// Something may be due whenever so many samples were delivered.
    block: u64,
}

#[derive(Debug)]
struct ReadAheadShared {
    state: Mutex<ReadAheadState>,
    /// There is another place, or the loader is gone.
    changed: Condvar,
}

#[derive(Debug)]
struct ReadAheadState {
    /// The farthest place that was delivered.
    reached: Position,
    closed: bool,
}

impl ReadAhead {
    /// Starts to ask for what is due at `place`.
    pub(crate) fn start(
        asking: Asking,
        samples: Arc<dyn Samples>,
        place: Position,
    ) -> Result<Self> {
        let block = asking.sizes.0;
        let state = Mutex::new(ReadAheadState { reached: place, closed: false });
        let shared = Arc::new(ReadAheadShared { state, changed: Condvar::new() });
        let ahead = ReadAhead { shared: Arc::clone(&shared), block };
        let named = std::thread::Builder::new().name("data-ahead".to_owned());
        match named.spawn(move || shared.work(asking, &*samples)) {
            // It ends by itself when the loader is gone, be it in the middle of a read.
            Ok(_) => Ok(ahead),
            Err(error) => {
                let reason =
                    format!("the thread that asks for blocks ahead cannot be started: {error}");
                Err(Error::option("order", "blocks", reason))
            }
        }
    }

    /// To be called when a place is delivered. Waits for nothing.
    pub(crate) fn reach(&self, place: Position) {
        let block_of = |at: Position| (at.epoch, at.next_global_sample / self.block);
        let mut state = self.shared.lock();
        if block_of(place) > block_of(state.reached) {
            state.reached = place;
            drop(state);
            self.shared.changed.notify_one();
        }
    }
}

impl Drop for ReadAhead {
    fn drop(&mut self) {
        self.shared.lock().closed = true;
        self.shared.changed.notify_one();
    }
}

impl ReadAheadShared {
    fn lock(&self) -> MutexGuard<'_, ReadAheadState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn work(&self, mut asking: Asking, samples: &dyn Samples) {
        let (mut scratch, mut done) = (Scratch::default(), None);
        while let Some(place) = self.next(done) {
            asking.reach(place, &mut |range| {
                if !self.lock().closed {
                    // Samples that a program implements may panic: whoever reads them meets that
                    // again.
                    let asked = catch_unwind(AssertUnwindSafe(|| {
                        samples.will_need(range.clone(), &mut scratch);
                    }));
                    if asked.is_err() {
                        scratch = Scratch::default();
                        let Range { start, end } = range;
                        tracing::warn!(
                            start,
                            end,
                            "asking for samples ahead panicked: they are read when they are needed"
                        );
                    }
                }
            });
            done = Some(place);
        }
    }

    /// The place that was reached, once that is another one; `None` when the loader is gone.
    fn next(&self, done: Option<Position>) -> Option<Position> {
        let mut state = self.lock();
        while !state.closed && Some(state.reached) == done {
            let waited = self.changed.wait_timeout(state, LOOK_AGAIN);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        (!state.closed).then_some(state.reached)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::{self, Receiver, Sender};

    use super::super::options::LoaderOptions;
    use super::super::Loader;
    use super::*;
    use crate::batches::{Column, DType, Rows};
    use crate::fingerprint::Fingerprint;
    use crate::order::{MixtureComponent, Order, Tail};

    type Ranges = Vec<Range<u64>>;

    fn sampler(counts: &[u64], (block, window): (u64, u64)) -> Sampler {
        let parts = counts.iter().zip([1.0, 0.5, 0.25]);
        let parts: Vec<_> =
            parts.map(|(&samples, weight)| MixtureComponent { samples, weight }).collect();
        Sampler::mixed(&parts, 1, 7, Order::Blocks { block, window }, Tail::Wrap).unwrap()
    }

    fn total(ranges: &Ranges) -> u64 {
        ranges.iter().map(|range| range.end - range.start).sum()
    }

    fn reach(asking: &mut Asking, epoch: u64, place: u64) -> Ranges {
        let mut ranges = Vec::new();
        let place = Position { epoch, next_global_sample: place };
        asking.reach(place, &mut |range| ranges.push(range));
        ranges
    }

    /// What was asked for of one part, epoch by epoch.
    struct Asked {
        first: u64,
        samples: u64,
        epochs: Vec<Ranges>,
    }

    impl Asked {
        /// Epochs are asked for one after the other.
        fn push(&mut self, range: Range<u64>) {
            if self.epochs.last().is_none_or(|last| total(last) == self.samples) {
                self.epochs.push(Vec::new());
            }
            self.epochs.last_mut().unwrap().push(range);
        }

        fn has(&self, epoch: u64, sample: u64) -> bool {
            let ranges = self.epochs.get(usize::try_from(epoch).unwrap());
            ranges.is_some_and(|ranges| ranges.iter().any(|range| range.contains(&sample)))
        }

        fn total(&self) -> u64 {
            self.epochs.iter().map(total).sum()
        }
    }

    #[test]
    fn what_is_delivered_was_asked_for_before_and_little_else() {
        for (count, block, window) in
            [(1000, 10, 4), (997, 10, 4), (35, 10, 4), (7, 10, 4), (640, 64, 20)]
        {
            let sampler = sampler(&[count], (block, window));
            let mut asking = Asking::new(&sampler, Some(3)).unwrap();
            let mut cursor = sampler.cursor();
            let mut asked = Asked { first: 0, samples: count, epochs: Vec::new() };
            for delivered in 0..3 * count {
                let (epoch, place) = (delivered / count, delivered % count);
                let sample = cursor.at(epoch, place);
                let was_asked = delivered == 0 || asked.has(epoch, sample.id);
                assert!(was_asked, "{place} of {count} in epoch {epoch}");
                reach(&mut asking, epoch, place).into_iter().for_each(|range| asked.push(range));
                let ahead = asked.total() - delivered;
                assert!(ahead <= (2 * window + 2) * block, "{ahead} at {place} of {count}");
            }
            let epochs: Vec<u64> = asked.epochs.iter().map(total).collect();
            assert_eq!(epochs, [count; 3], "each sample once an epoch, and of no fourth one");
        }
    }

    #[test]
    fn each_part_of_a_mixture_was_asked_for_before() {
        let (counts, (block, window)) = ([1000, 397, 30], (10, 4));
        let sampler = sampler(&counts, (block, window));
        let mut asking = Asking::new(&sampler, None).unwrap();
        let mut cursor = sampler.cursor();
        let mut first = 0;
        let mut parts = counts.map(|samples| {
            first += samples;
            Asked { first: first - samples, samples, epochs: Vec::new() }
        });
        let of_part = |sample: u64| usize::from(sample >= 1000) + usize::from(sample >= 1397);
        let mut delivered = [0; 3];
        for stream in 0..20_000 {
            let (epoch, place) = (stream / 1427, stream % 1427);
            let sample = cursor.at(epoch, place);
            let part = of_part(sample.id);
            let was_asked = stream == 0 || parts[part].has(sample.epoch, sample.id);
            assert!(was_asked, "{sample:?} at {stream}");
            delivered[part] += 1;
            // As a loader's thread is woken.
            if place % block == 0 {
                for range in reach(&mut asking, epoch, place) {
                    let asked = &mut parts[of_part(range.start)];
                    assert!(range.end <= asked.first + asked.samples, "{range:?}");
                    asked.push(range);
                }
            }
            for (asked, drawn) in parts.iter().zip(delivered) {
                assert!(asked.total() <= drawn + (2 * window + 2) * block);
            }
        }
    }

    #[test]
    fn a_resumed_run_asks_for_the_rest_of_its_window_and_for_no_earlier_one() {
        let mut asking = Asking::new(&sampler(&[1000], (10, 4)), None).unwrap();
        // Block 50: its window begins at block 48, and block 54 is on its way.
        assert_eq!(total(&reach(&mut asking, 5, 505)), 70);
        assert_eq!(reach(&mut asking, 4, 990), []);
        assert_eq!(total(&reach(&mut asking, 5, 510)), 10);
    }

    /// Says what it is asked for, and then stays there until it is let go.
    struct Stuck {
        columns: [Column; 1],
        asked: Sender<Range<u64>>,
        goes_on: Mutex<Receiver<()>>,
    }

    impl Samples for Stuck {
        fn sample_count(&self) -> u64 {
            1000
        }

        fn columns(&self) -> &[Column] {
            &self.columns
        }

        fn fingerprint(&self) -> Fingerprint {
            Fingerprint(0)
        }

        fn will_need(&self, samples: Range<u64>, _scratch: &mut Scratch) {
            // The test may be over.
            self.asked.send(samples).ok();
            self.goes_on.lock().unwrap().recv_timeout(LIMIT).ok();
        }

        fn fill(&self, _: u64, _: &mut Rows<'_>, _: &mut Scratch) -> Result<()> {
            Ok(())
        }
    }

    const LIMIT: Duration = Duration::from_secs(60);

    #[test]
    fn a_panic_in_asking_does_not_end_it() {
        let (asked, asks) = mpsc::channel();
        let columns = [Column::new("x", DType::U8, [])];
        let (go_on, goes_on) = mpsc::channel();
        // What it waits for is poisoned by the first panic: every later block panics as well.
        let poisoned = Mutex::new(goes_on);
        let panics = catch_unwind(AssertUnwindSafe(|| {
            let _held = poisoned.lock();
            panic!("this is to break the lock");
        }));
        assert!(panics.is_err());
        drop(go_on);
        let stuck = Stuck { columns, asked, goes_on: poisoned };
        let order = Order::Blocks { block: 10, window: 4 };
        let options = LoaderOptions { order, threads: 0, global_batch: 10, ..Default::default() };
        let mut loader = Loader::new(Arc::new(stuck), options).unwrap();
        let mut ranges = Vec::new();
        while total(&ranges) < 40 {
            ranges.push(asks.recv_timeout(LIMIT).unwrap());
        }
        loader.next_step().unwrap();
        loader.next_step().unwrap();
        assert!(asks.recv_timeout(LIMIT).is_ok(), "the next window is asked for as well");
    }

    #[test]
    fn the_first_window_is_asked_for_at_the_start_and_delivery_does_not_wait_for_it() {
        for threads in [0, 2] {
            let (asked, asks) = mpsc::channel();
            let (go_on, goes_on) = mpsc::channel();
            let columns = [Column::new("x", DType::U8, [])];
            let stuck = Stuck { columns, asked, goes_on: Mutex::new(goes_on) };
            let order = Order::Blocks { block: 10, window: 4 };
            let timeout = LIMIT / 2;
            let options =
                LoaderOptions { order, threads, timeout, global_batch: 10, ..Default::default() };
            let mut loader = Loader::new(Arc::new(stuck), options).unwrap();
            let mut ranges = vec![asks.recv_timeout(LIMIT).unwrap()];
            // It is in the middle of the first block.
            for _ in 0..150 {
                loader.next_step().unwrap();
            }
            assert!(asks.try_recv().is_err());
            if threads > 0 {
                // They may have delivered the first window before it was looked at.
                continue;
            }
            while total(&ranges) < 40 {
                go_on.send(()).unwrap();
                ranges.push(asks.recv_timeout(LIMIT).unwrap());
            }
            let mut blocks = BlockOrder::new(1000, 10, 4, 0, 0);
            for sample in (0..40).map(|place| blocks.at(place)) {
                assert!(ranges.iter().any(|range| range.contains(&sample)), "{sample}");
            }
        }
    }
}
