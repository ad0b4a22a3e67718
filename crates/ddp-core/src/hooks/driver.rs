//! Between hooks and reducer: a bucket is given to the hook when it is full, and finished in the
//! same order at the end of backward.

use std::any::Any;
use std::fmt::Debug;

use phalanx_comm::Group;
use tch::{Device, Kind};

use super::bucket::{Facts, Memory};
use super::{Bucket, Hook, Placed, Pool, Progress, State, Wire};
use crate::shim;
use crate::store::pool::Taken;
use crate::store::Store;
use crate::{Error, Result};

/// A number of a saved state beside the hook's own.
const EXCHANGES: &str = "exchanges";
const HOOK: &str = "hook";

type Pending = Box<dyn Any + Send>;

/// A hook of any type.
trait Erased: Debug + Send {
    fn name(&self) -> String;
    fn start(&mut self, bucket: &mut Bucket<'_>) -> Result<Pending>;
    fn finish(&mut self, bucket: &mut Bucket<'_>, pending: Pending) -> Result<Progress<Pending>>;
    fn drifts(&self) -> bool;
    fn reset(&mut self);
    fn state(&self) -> Result<State>;
    fn load(&mut self, state: &State) -> Result<()>;
}

impl<H: Hook> Erased for H {
    fn name(&self) -> String {
        Hook::name(self)
    }

    fn start(&mut self, bucket: &mut Bucket<'_>) -> Result<Pending> {
        Ok(Box::new(Hook::start(self, bucket)?))
    }

    fn finish(&mut self, bucket: &mut Bucket<'_>, pending: Pending) -> Result<Progress<Pending>> {
        let Ok(own) = pending.downcast::<H::Pending>() else {
            unreachable!("a hook gets what it gave")
        };
        let progress = Hook::finish(self, bucket, *own)?;
        Ok(progress.map(|again| -> Pending { Box::new(again) }))
    }

    fn drifts(&self) -> bool {
        Hook::drifts(self)
    }

    fn reset(&mut self) {
        Hook::reset(self);
    }

    fn state(&self) -> Result<State> {
        Hook::state(self)
    }

    fn load(&mut self, state: &State) -> Result<()> {
        Hook::load(self, state)
    }
}

/// A hook at work.
#[derive(Debug)]
pub(crate) struct Hooked {
    hook: Box<dyn Erased>,
    pool: Pool,
    /// By bucket, of the store's layout of this number.
    layouts: Vec<Vec<Placed>>,
    layout: u64,
    exchange: u64,
    flights: Vec<Flight>,
    /// By bucket: whether there may be something between its parameters that is not zero.
    is_soiled: Vec<bool>,
    sent: u64,
}

/// What an exchange starts a bucket with.
#[derive(Debug)]
pub(crate) struct Start {
    pub(crate) index: usize,
    pub(crate) scale: f64,
    pub(crate) everywhere: bool,
    pub(crate) tag: String,
    /// The buffer that it is in, where it has no memory of its own.
    pub(crate) taken: Option<Taken>,
}

/// A bucket that was started.
#[derive(Debug)]
struct Flight {
    start: Start,
    pending: Pending,
}

impl Hooked {
    pub(crate) fn new(hook: impl Hook) -> Self {
        Self {
            hook: Box::new(hook),
            pool: Pool::default(),
            layouts: Vec::new(),
            layout: 0,
            exchange: 0,
            flights: Vec::new(),
            is_soiled: Vec::new(),
            sent: 0,
        }
    }

    /// What ranks compare.
    pub(crate) fn name(&self) -> String {
        self.hook.name()
    }

    /// Whether ranks come to different parameters.
    pub(crate) fn drifts(&self) -> bool {
        self.hook.drifts()
    }

    /// The gradients were not finite.
    pub(crate) fn reset(&mut self) {
        self.hook.reset();
        // A block with NaN in it is NaN altogether.
        self.is_soiled.fill(true);
    }

    /// Starts a bucket of gradients.
    pub(crate) fn start(&mut self, store: &mut Store, start: Start) -> Result<()> {
        self.begin(store, start, None)
    }

    /// As [`start`](Self::start), of other values than gradients, which lie in `wire`.
    pub(crate) fn start_over(
        &mut self,
        store: &mut Store,
        start: Start,
        wire: &Wire,
    ) -> Result<()> {
        self.begin(store, start, Some(wire))
    }

    fn begin(&mut self, store: &mut Store, start: Start, wire: Option<&Wire>) -> Result<()> {
        self.follow(store);
        let Self { hook, pool, layouts, sent, exchange, is_soiled, .. } = self;
        let parameters = layouts[start.index].as_slice();
        let facts = (parameters, &start, *exchange);
        let mut bucket = bucket((store, pool, sent), facts, wire)?;
        if wire.is_none() && std::mem::take(&mut is_soiled[start.index]) {
            clear_padding(&bucket)?;
        }
        let pending = hook.start(&mut bucket)?;
        self.flights.push(Flight { start, pending });
        Ok(())
    }

    /// Finishes all that was started; says how many bytes this rank has sent.
    pub(crate) fn finish(&mut self, store: &mut Store) -> Result<u64> {
        store.group.set_stream(shim::current_stream(store.device())?);
        let sent = self.finish_over(store, &[])?;
        self.exchange += 1;
        Ok(sent)
    }

    /// Finishes a bucket before the others, if it is not finished: its memory is needed.
    pub(crate) fn finish_bucket(&mut self, store: &mut Store, index: usize) -> Result<()> {
        while let Some(at) = self.flights.iter().position(|flight| flight.start.index == index) {
            store.group.set_stream(shim::current_stream(store.device())?);
            let Flight { start, pending } = self.flights.remove(at);
            let Self { hook, pool, layouts, sent, exchange, .. } = self;
            let facts = (layouts[index].as_slice(), &start, *exchange);
            let mut bucket = bucket((store, pool, sent), facts, None)?;
            if let Progress::Again(again) = hook.finish(&mut bucket, pending)? {
                self.flights.insert(at, Flight { start, pending: again });
            }
        }
        Ok(())
    }

    /// Finishes what was started over `wires`, by bucket; says how many bytes this rank has sent.
    pub(crate) fn finish_over(
        &mut self,
        store: &mut Store,
        wires: &[(usize, Wire)],
    ) -> Result<u64> {
        let mut flights = std::mem::take(&mut self.flights);
        let Self { hook, pool, layouts, sent, exchange, .. } = self;
        while !flights.is_empty() {
            for Flight { start, pending } in std::mem::take(&mut flights) {
                let wire = wires.iter().find(|(index, _)| *index == start.index);
                let facts = (layouts[start.index].as_slice(), &start, *exchange);
                let mut bucket = bucket((store, pool, sent), facts, wire.map(|(_, wire)| wire))?;
                if let Progress::Again(again) = hook.finish(&mut bucket, pending)? {
                    flights.push(Flight { start, pending: again });
                }
            }
        }
        Ok(std::mem::take(&mut self.sent))
    }

    /// An exchange over wires has ended; lets its memory go.
    pub(crate) fn end_exchange(&mut self) {
        self.exchange += 1;
        self.pool.clear();
    }

    /// Memory for [`start_over`](Self::start_over).
    pub(crate) fn take(&mut self, group: &mut Group, place: (Kind, Device, usize)) -> Result<Wire> {
        self.pool.take(group, place)
    }

    /// Follows the store to its present layout.
    fn follow(&mut self, store: &Store) {
        if self.layout == store.layout {
            return;
        }
        // Of an exchange that failed.
        self.flights.clear();
        self.pool.clear();
        self.layouts = layouts(store);
        self.is_soiled = vec![true; self.layouts.len()];
        self.layout = store.layout;
    }

    pub(crate) fn state(&self) -> Result<State> {
        let mut state = State::default();
        state.put(HOOK, self.hook.state()?);
        // Steps are far below 2^53.
        #[expect(clippy::cast_precision_loss, reason = "counts of exchanges")]
        state.numbers.insert(EXCHANGES.to_owned(), self.exchange as f64);
        Ok(state)
    }

    /// Goes on from a state.
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "a whole number that `state` wrote"
    )]
    pub(crate) fn load(&mut self, state: &State) -> Result<()> {
        let Some(&exchange) = state.numbers.get(EXCHANGES) else {
            let (setting, value) = ("a hook's state", "without a number of exchanges".to_owned());
            return Err(Error::BadSetting { setting, value, expected: "one of Ddp::hook_state" });
        };
        self.exchange = exchange as u64;
        self.hook.load(&state.inner(HOOK))
    }
}

/// Zeroes what lies between parameters and behind them: hooks look at all of a bucket.
fn clear_padding(bucket: &Bucket<'_>) -> Result<()> {
    let gradients = bucket.gradients()?;
    let mut end = 0;
    let starts = bucket.parameters().iter().map(|placed| (placed.range.start, placed.range.end));
    for (start, next) in starts.chain([(bucket.len(), bucket.len())]) {
        if end < start {
            let mut gap = bucket.part(&gradients, &(end..start))?;
            let _same = tch::no_grad(|| gap.f_zero_())?;
        }
        end = next;
    }
    Ok(())
}

/// What lies where, by bucket.
fn layouts(store: &Store) -> Vec<Vec<Placed>> {
    let placed = |start: usize, slot: usize| {
        let named = store.model.parameter(slot);
        let range = &store.plan.places[slot].range;
        Placed {
            name: named.name.clone(),
            shape: named.tensor.size(),
            strides: named.tensor.stride(),
            range: range.start - start..range.end - start,
        }
    };
    let of = |bucket: &crate::plan::Bucket| {
        let slots = bucket.parameters.iter();
        slots.map(|&slot| placed(bucket.range.start, slot)).collect()
    };
    store.plan.buckets.iter().map(of).collect()
}

fn bucket<'a>(
    (store, pool, sent): (&'a mut Store, &'a mut Pool, &'a mut u64),
    (parameters, start, exchange): (&'a [Placed], &'a Start, u64),
    wire: Option<&'a Wire>,
) -> Result<Bucket<'a>> {
    let planned = &store.plan.buckets[start.index];
    let range = (planned.range.start, planned.range.end);
    let own = store.storages[planned.storage].exchanged(&store.pool, start.taken);
    let memory = match (wire, own) {
        (Some(wire), _) => Memory::Wire(wire),
        (None, Some(flat)) => Memory::Flat(flat, range),
        (None, None) => return Err(Error::InsideBackward),
    };
    Ok(Bucket {
        group: &mut store.group,
        pool,
        sent,
        memory,
        facts: Facts {
            index: start.index,
            exchange,
            parameters,
            scale: start.scale,
            everywhere: start.everywhere,
            tag: &start.tag,
            lost: None,
        },
    })
}
