//! The part of local training that is the reducer's: where ranks have started from, and how they come together again.

use std::collections::BTreeMap;

use tch::Kind;

use super::DiLoCoOptions;
use crate::hooks::{Hook, Hooked, Kept, Start, State, Wire};
use crate::reduce::Reducer;
use crate::shim;
use crate::store::flat::Flat;
use crate::store::{agree, Store};
use crate::Result;

/// Buckets that are averaged at a time: bounds the memory that travels.
const AT_A_TIME: usize = 4;

const HOOK: &str = "hook";
const MOMENTUM: &str = "momentum";
const STEPS: &str = "steps";
const AVERAGED: &str = "averaged";

/// Local training, from plain steps on.
#[derive(Debug)]
#[expect(clippy::struct_excessive_bools, reason = "what is and what was")]
pub(crate) struct Local {
    pub(super) options: DiLoCoOptions,
    hooked: Hooked,
    /// Whether the `Ddp` exchanges when ranks do not train by themselves.
    pub(super) exchange: bool,
    /// Whether ranks train by themselves.
    trains_locally: bool,
    /// Steps made, and those since the last averaging.
    step_count: u64,
    own_steps: u64,
    pub(super) averaged_count: u64,
    pub(super) bytes_sent: u64,
    /// By storage, in f32: where ranks have started from, and the momentum.
    starts: Vec<Flat>,
    momenta: Vec<Flat>,
    /// Momentum of a saved state, by parameter, until memory for it is there.
    loaded: BTreeMap<String, tch::Tensor>,
}

impl Local {
    pub(super) fn new(options: DiLoCoOptions, hook: impl Hook, exchange: bool) -> Self {
        Self {
            options,
            hooked: Hooked::new(hook),
            exchange,
            trains_locally: false,
            step_count: 0,
            own_steps: 0,
            averaged_count: 0,
            bytes_sent: 0,
            starts: Vec::new(),
            momenta: Vec::new(),
            loaded: BTreeMap::new(),
        }
    }

    /// Whether backwards give each rank its own gradients.
    pub(crate) fn trains_locally(&self) -> bool {
        self.trains_locally
    }

    /// Takes the parameters of storages that are new for where ranks start from.
    pub(crate) fn follow(&mut self, store: &Store) -> Result<()> {
        if !self.trains_locally {
            return Ok(());
        }
        for storage in store.storages.iter().skip(self.starts.len()) {
            let Some(whole) = storage.parameters.whole() else { continue };
            let len = whole.len();
            let flat = || Flat::private(Kind::Float, whole.device(), len);
            let start = flat()?;
            let parameters = whole.range(&(0..len))?;
            tch::no_grad(|| start.range(&(0..len))?.f_copy_(&parameters).map_err(Into::into))
                .and_then(|()| {
                    self.starts.push(start);
                    if self.options.outer.momentum > 0.0 {
                        self.momenta.push(flat()?);
                    }
                    Ok::<(), crate::Error>(())
                })?;
        }
        let loaded = std::mem::take(&mut self.loaded);
        for (slot, named) in store.model.parameters().enumerate() {
            let Some(saved) = loaded.get(&named.name) else { continue };
            if let Some(mut view) = self.momentum_of(store, slot)? {
                tch::no_grad(|| view.f_copy_(saved))?;
            }
        }
        Ok(())
    }

    /// The momentum of a parameter, in its shape.
    fn momentum_of(&self, store: &Store, slot: usize) -> Result<Option<tch::Tensor>> {
        let place = &store.plan.places[slot];
        let tensor = &store.model.parameter(slot).tensor;
        let Some(momenta) = self.momenta.get(place.storage) else { return Ok(None) };
        Ok(Some(momenta.view(&place.range, &tensor.size(), &tensor.stride())?))
    }

    /// Brings the ranks' models together.
    fn average(&mut self, store: &mut Store) -> Result<()> {
        self.bytes_sent = 0;
        let buckets: Vec<usize> = (0..store.plan.buckets.len()).collect();
        for some in buckets.chunks(AT_A_TIME) {
            let mut wires = Vec::with_capacity(some.len());
            for &index in some {
                let wire = self.change(store, index)?;
                let start = Start {
                    index,
                    scale: one_over(store.group.world_size()),
                    everywhere: true,
                    tag: format!("change of bucket {index}"),
                    taken: None,
                };
                self.hooked.start_over(store, start, &wire)?;
                wires.push((index, wire));
            }
            self.bytes_sent += self.hooked.finish_over(store, &wires)?;
            for (index, wire) in wires {
                self.step(store, index, &wire)?;
            }
        }
        self.hooked.end_exchange();
        Ok(())
    }

    /// What this rank's part of a bucket has come from its start: start − parameters.
    fn change(&mut self, store: &mut Store, index: usize) -> Result<Wire> {
        let bucket = &store.plan.buckets[index];
        let memory = &store.storages[bucket.storage].parameters;
        let parameters = memory.at(&bucket.range, &bucket.range).0.range(&bucket.range)?;
        let start = self.starts[bucket.storage].range(&bucket.range)?;
        let place = (Kind::Float, store.device(), bucket.range.len());
        let wire = self.hooked.take(&mut store.group, place)?;
        let mut change = wire.tensor().shallow_clone();
        tch::no_grad(|| -> Result<()> {
            change.f_copy_(&start)?;
            // bf16 and f16 are widened first.
            let _same = change.f_sub_(&parameters.f_to_kind(Kind::Float)?)?;
            Ok(())
        })?;
        Ok(wire)
    }

    /// The outer step of a bucket on the mean change; parameters become its result.
    fn step(&self, store: &Store, index: usize, mean: &Wire) -> Result<()> {
        let bucket = &store.plan.buckets[index];
        let start = self.starts[bucket.storage].range(&bucket.range)?;
        let momentum = self.momenta.get(bucket.storage);
        let momentum = momentum.map(|flat| flat.range(&bucket.range)).transpose()?;
        tch::no_grad(|| self.options.outer.step(&start, mean.tensor(), momentum.as_ref()))?;
        for &slot in &bucket.parameters {
            let named = store.model.parameter(slot);
            let (shape, strides) = (named.tensor.size(), named.tensor.stride());
            let range = &store.plan.places[slot].range;
            let result = self.starts[bucket.storage].view(range, &shape, &strides)?;
            // Through the variable: who keeps something that belongs to it sees that it has changed.
            tch::no_grad(|| named.tensor.shallow_clone().f_copy_(&result))?;
        }
        Ok(())
    }

    /// What must be saved, after an averaging.
    pub(crate) fn state(&self, store: &Store) -> Result<State> {
        let mut state = State::default();
        #[expect(clippy::cast_precision_loss, reason = "counts of steps are far below 2^53")]
        for (name, count) in [(STEPS, self.step_count), (AVERAGED, self.averaged_count)] {
            state.numbers.insert(name.to_owned(), count as f64);
        }
        for (slot, named) in store.model.parameters().enumerate() {
            if let Some(momentum) = self.momentum_of(store, slot)? {
                let name = format!("{MOMENTUM}/{}", named.name);
                state.tensors.insert(name, Kept::Alike(momentum));
            }
        }
        state.put(HOOK, self.hooked.state()?);
        Ok(state)
    }

    /// What ranks have compared, for messages.
    pub(crate) fn name(&self) -> String {
        format!("DiLoCo, averaged by {}", self.hooked.name())
    }
}

impl Reducer {
    /// Whether backwards give each rank its own gradients.
    pub(crate) fn trains_locally(&self) -> bool {
        self.local.as_ref().is_some_and(Local::trains_locally)
    }

    /// From here on the ranks train by themselves.
    pub(super) fn train_locally(&mut self) -> Result<()> {
        let Some(local) = &mut self.local else { return Ok(()) };
        local.trains_locally = true;
        local.starts.clear();
        local.momenta.clear();
        self.options.exchange = false;
        self.store.trains_locally = true;
        local.follow(&self.store)
    }

    /// From here on backwards exchange, as they did before.
    pub(super) fn exchange_again(&mut self) {
        if let Some(local) = &mut self.local {
            local.trains_locally = false;
            self.options.exchange = local.exchange;
            self.store.trains_locally = false;
        }
    }

    /// The parameters were set from elsewhere, alike on all ranks: ranks start from them.
    pub(crate) fn start_anew(&mut self) -> Result<()> {
        let Some(local) = &mut self.local else { return Ok(()) };
        local.own_steps = 0;
        if local.trains_locally {
            self.train_locally()?;
        }
        Ok(())
    }

    /// The inner optimizer has made a step; says whether ranks have averaged.
    pub(super) fn stepped_by_itself(&mut self) -> Result<bool> {
        let Some(local) = &mut self.local else { return Ok(false) };
        local.step_count += 1;
        if !local.trains_locally {
            if local.step_count >= local.options.plain_steps {
                self.train_locally()?;
            }
            return Ok(false);
        }
        local.own_steps += 1;
        if local.own_steps < local.options.sync_every {
            return Ok(false);
        }
        self.average()?;
        Ok(true)
    }

    /// Brings the ranks together, if they have made steps by themselves.
    pub(crate) fn average(&mut self) -> Result<()> {
        let Some(local) = &mut self.local else { return Ok(()) };
        let group = &mut self.store.group;
        let steps = local.own_steps.to_le_bytes();
        let told = group.tagged("steps since the last averaging").all_gather_bytes(&steps)?;
        let line = |bytes: &Vec<u8>| {
            let theirs = bytes.iter().rev().fold(0_u64, |n, &byte| n << 8 | u64::from(byte));
            vec![format!("{theirs} steps since the last averaging")]
        };
        let lines: Vec<Vec<String>> = told.iter().map(line).collect();
        agree::compared("the steps that they have made by themselves", &lines)?;
        let is_compared = self.options.fingerprint_interval > 0 && !local.hooked.drifts();
        if local.own_steps == 0 {
            // Unless somebody has made a step and not told.
            return if is_compared && local.trains_locally {
                self.compare_parameters()
            } else {
                Ok(())
            };
        }
        self.store.group.set_stream(shim::current_stream(self.store.device())?);
        local.average(&mut self.store)?;
        local.own_steps = 0;
        local.averaged_count += 1;
        let (count, interval) = (local.averaged_count, self.options.fingerprint_interval);
        self.exchange_buffers(0)?;
        // As of exchanges: soon at first, then now and then.
        if is_compared && (count.is_power_of_two() || count.is_multiple_of(interval)) {
            self.compare_parameters()?;
        }
        Ok(())
    }

    /// Goes on from a state; parameters are those that belong to it.
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "whole numbers that `state` wrote"
    )]
    pub(crate) fn load_local(&mut self, state: &State) -> Result<()> {
        let Some(local) = &mut self.local else { return Ok(()) };
        let number = |name: &str| state.numbers.get(name).copied().unwrap_or(0.0) as u64;
        local.step_count = number(STEPS);
        local.averaged_count = number(AVERAGED);
        local.own_steps = 0;
        local.hooked.load(&state.inner(HOOK))?;
        let tensors = state.inner(MOMENTUM).tensors.into_iter();
        local.loaded = tensors.map(|(name, kept)| (name, kept.tensor().shallow_clone())).collect();
        let trains_locally = local.step_count >= local.options.plain_steps;
        if trains_locally {
            return self.train_locally();
        }
        self.exchange_again();
        Ok(())
    }
}

#[expect(clippy::cast_precision_loss, reason = "world sizes are far below 2^53")]
fn one_over(ranks: usize) -> f64 {
    1.0 / ranks as f64
}
