//! One step of one rank: goes through its actions.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::{Duration, Instant};

use phalanx_ddp_core::{Ddp, Sync};
use tch::{Kind, Tensor};

use super::boundary::{self, Address, Outlet};
use super::messages::{tag, Expected, Messages};
use super::stage::{Computing, Shaped, Stage};
use super::Pipeline;
use crate::error::{Error, Result};
use crate::layer::Deferred;
use crate::pipeline::schedule::{Action, Part, Pass, Payload};

/// What a rank was doing when it failed, unless the schedule was at its end.
pub(super) struct Failed {
    pub(super) at: Option<Action>,
    pub(super) error: Box<Error>,
}

impl Failed {
    fn at(action: Action) -> impl Fn(Error) -> Self {
        move |error| Self { at: Some(action), error: Box::new(error) }
    }

    fn at_end(error: Error) -> Self {
        Self { at: None, error: Box::new(error) }
    }
}

/// What a micro-batch leaves in a chunk for its backward.
struct Held {
    input: Option<Outlet>,
    output: Tensor,
    deferred: Option<Deferred>,
}

type Key = (Payload, Part);

pub(super) struct Step<'a, S> {
    pipeline: &'a Pipeline,
    stage: &'a mut S,
    /// Who exchanges, and the weights of the micro-batches; none where it is forward alone.
    training: Option<(&'a Ddp, &'a [f64])>,
    rank: usize,
    /// What the rank does.
    actions: Vec<Action>,
    /// The computation that the exchange is part of.
    last: Option<(Pass, Part)>,
    held: BTreeMap<Part, Held>,
    /// Micro-batches whose weight `Ddp` was given.
    counted: BTreeSet<usize>,
    /// Gradients of weights that are still to be computed.
    left: BTreeMap<Part, Deferred>,
    /// What this rank needs for a part.
    given: BTreeMap<Key, Tensor>,
    /// What others need of this rank.
    made: BTreeMap<Key, (Tensor, Address)>,
    losses: Vec<Tensor>,
    messages: Messages,
    is_exchanged: bool,
    /// The wait at the end of the step.
    waited: Duration,
    /// How long passes took.
    pub(super) computing: Computing,
}

impl<'a, S: Stage> Step<'a, S> {
    pub(super) fn new(
        pipeline: &'a Pipeline,
        stage: &'a mut S,
        training: Option<(&'a Ddp, &'a [f64])>,
    ) -> Self {
        let (schedule, rank) = (&pipeline.schedule, pipeline.group.rank());
        let is_wanted = |action: &&Action| training.is_some() || is_forward(**action);
        let actions: Vec<Action> =
            schedule.actions(rank).iter().filter(is_wanted).copied().collect();
        let ends = |action: &Action| match *action {
            Action::Compute { pass, part } if pass.ends() => Some((pass, part)),
            _ => None,
        };
        // Gradients of tied weights are added up between the last backward and the exchange.
        let last = match pipeline.tied.is_empty() {
            true => actions.iter().rev().find_map(ends),
            false => None,
        };
        let expected = expected(pipeline, &actions);
        let sends_max = Messages::sends_max(schedule);
        let messages = Messages::new(&pipeline.group, pipeline.device, expected, sends_max);
        Self {
            pipeline,
            stage,
            training,
            rank,
            actions,
            last,
            held: BTreeMap::new(),
            counted: BTreeSet::new(),
            left: BTreeMap::new(),
            given: BTreeMap::new(),
            made: BTreeMap::new(),
            losses: Vec::new(),
            messages,
            is_exchanged: false,
            waited: Duration::ZERO,
            computing: Computing::default(),
        }
    }

    /// How long the rank had nothing to do.
    pub(super) fn idle(&self) -> Duration {
        self.messages.idle + self.waited
    }

    pub(super) fn run(&mut self) -> Result<(), Failed> {
        self.check_weights().map_err(Failed::at_end)?;
        let actions = std::mem::take(&mut self.actions);
        if !self.pipeline.is_together {
            self.messages.ask().map_err(Failed::at_end)?;
        }
        let mut left = actions.as_slice();
        while let [action, rest @ ..] = left {
            let failed = Failed::at(*action);
            left = rest;
            match *action {
                Action::Compute { pass, part } => self.compute(pass, part).map_err(failed)?,
                _ if self.pipeline.is_together => {
                    let others = rest.iter().take_while(|next| !is_compute(**next)).count();
                    let (_, from) = actions.split_at(actions.len() - rest.len() - 1);
                    self.together(&from[..=others]).map_err(failed)?;
                    left = &rest[others..];
                }
                Action::Receive { payload, part, .. } => {
                    let tensor = self.messages.receive((payload, part)).map_err(failed)?;
                    self.given.insert((payload, part), tensor);
                }
                Action::Send { payload, part, .. } => {
                    // Gone already, if it was sent inside of its backward.
                    if let Some((tensor, address)) = self.made.remove(&(payload, part)) {
                        self.messages.send(&tensor, &address).map_err(failed)?;
                    }
                }
            }
        }
        self.end().map_err(Failed::at_end)
    }

    fn check_weights(&self) -> Result<()> {
        let Some((_, weights)) = self.training else { return Ok(()) };
        let count = self.pipeline.schedule.micro_batch_count();
        if weights.len() == count {
            return Ok(());
        }
        Err(Error::BadSetting {
            setting: "weights of micro-batches",
            value: format!("{} numbers", weights.len()),
            expected: "one for each micro-batch of the schedule",
        })
    }

    fn together(&mut self, actions: &[Action]) -> Result<()> {
        let received = self.messages.together(actions, &mut self.made)?;
        self.given.extend(received);
        Ok(())
    }

    fn compute(&mut self, pass: Pass, part: Part) -> Result<()> {
        let start = Instant::now();
        match pass {
            Pass::Forward => self.forward(part)?,
            Pass::Backward | Pass::BackwardInput => self.backward(pass, part)?,
            Pass::BackwardWeight => self.weights(part)?,
        }
        let taken = match pass {
            Pass::Forward => &mut self.computing.forward,
            Pass::Backward | Pass::BackwardInput => &mut self.computing.backward,
            Pass::BackwardWeight => &mut self.computing.weights,
        };
        *taken += start.elapsed();
        Ok(())
    }

    fn forward(&mut self, part: Part) -> Result<()> {
        let index = self.pipeline.stage(part.chunk);
        let given = match index {
            0 => None,
            _ => Some(self.take(Payload::Activation, part)?),
        };
        if self.training.is_none() {
            let _unrecorded = tch::no_grad_guard();
            let output = self.stage.forward(part.chunk, part.micro_batch, given)?;
            return self.forwarded(index, part, &output);
        }
        let (outlet, input) = match given {
            None => (None, None),
            Some(given) => {
                let (outlet, input) = Outlet::of_input(&given)?;
                (Some(outlet), Some(input))
            }
        };
        let deferred = self.splits(part).then(Deferred::new);
        let stage = &mut *self.stage;
        let run = || stage.forward(part.chunk, part.micro_batch, input);
        let output = match &deferred {
            Some(deferred) => deferred.during(run),
            None => run(),
        }?;
        self.forwarded(index, part, &output)?;
        self.held.insert(part, Held { input: outlet, output, deferred });
        Ok(())
    }

    /// Whether the part's backward is two.
    fn splits(&self, part: Part) -> bool {
        let weight = Action::Compute { pass: Pass::BackwardWeight, part };
        self.pipeline.schedule.actions(self.rank).contains(&weight)
    }

    /// Looks at what a stage gave, and hands it on.
    fn forwarded(&mut self, index: usize, part: Part, output: &Tensor) -> Result<()> {
        let (actual, is_last) =
            (Shaped::of(output)?, index + 1 == self.pipeline.schedule.stage_count());
        if is_last {
            if output.numel() == 1 {
                self.losses.push(output.f_detach()?);
                return Ok(());
            }
        } else if self.pipeline.agreed.as_ref().is_none_or(|agreed| agreed[index] == actual) {
            self.hand(Payload::Activation, part, output.f_detach()?);
            return Ok(());
        }
        let agreed = self.pipeline.agreed.as_ref().map(|agreed| &agreed[index]);
        Err(Error::BadInput {
            layer: format!("stage {index}"),
            actual: format!("its output is {actual}"),
            expected: agreed.map_or_else(String::new, |agreed| {
                format!("{agreed}, as it was agreed on: call Pipeline::agree on all ranks before shapes change")
            }),
        })
    }

    fn backward(&mut self, pass: Pass, part: Part) -> Result<()> {
        let Some((ddp, weights)) = self.training else { return Ok(()) };
        let held = self.held.remove(&part);
        let Some(Held { input, output, deferred }) = held else {
            return Err(Error::NotThere { what: "an output".to_owned() });
        };
        let index = self.pipeline.stage(part.chunk);
        let root = match index + 1 == self.pipeline.schedule.stage_count() {
            true => output,
            false => boundary::resumed(&output, self.take(Payload::Gradient, part)?)?,
        };
        let sync = self.sync(pass, part);
        if let (Some(outlet), Some(address)) = (&input, self.address(Payload::Gradient, part)) {
            // Over NCCL a message that stands among others goes with them.
            if !self.pipeline.is_together || sync == Sync::Reduce {
                outlet.send_at_once(address);
            }
        }
        if root.requires_grad() {
            // A micro-batch counts once, whatever chunks of it the rank has, frozen ones among them.
            let weight = match self.counted.insert(part.micro_batch) {
                true => weights[part.micro_batch],
                false => 0.0,
            };
            let run = || ddp.backward(&root, weight, sync);
            match &deferred {
                Some(deferred) => deferred.during(run),
                None => run(),
            }?;
            self.is_exchanged |= sync == Sync::Reduce;
        }
        drop(root);
        if let Some(deferred) = deferred {
            self.left.insert(part, deferred);
        }
        match input {
            Some(outlet) => self.gradient_came(index, part, &outlet),
            None => Ok(()),
        }
    }

    /// Hands on the gradient of a stage's input.
    fn gradient_came(&mut self, index: usize, part: Part, outlet: &Outlet) -> Result<()> {
        let (gradient, sending) = outlet.take();
        if let Some(sending) = sending {
            return self.messages.sent(sending);
        }
        let gradient = match gradient {
            Some(gradient) => gradient,
            // The stage did not use its input.
            None => {
                let Some(Shaped { shape, kind }) = self.shaped(index.saturating_sub(1)) else {
                    return Err(Error::NotThere { what: "a shape".to_owned() });
                };
                Tensor::f_zeros(shape.as_slice(), (*kind, self.pipeline.device))?
            }
        };
        self.hand(Payload::Gradient, part, gradient);
        Ok(())
    }

    fn weights(&mut self, part: Part) -> Result<()> {
        let Some((ddp, _)) = self.training else { return Ok(()) };
        let Some(deferred) = self.left.remove(&part) else {
            return Err(Error::NotThere { what: "gradients of weights".to_owned() });
        };
        let gradients = deferred.take().compute()?;
        if gradients.is_empty() {
            return Ok(());
        }
        let sync = self.sync(Pass::BackwardWeight, part);
        ddp.backward(&boundary::delivering(gradients)?, 0.0, sync)?;
        self.is_exchanged |= sync == Sync::Reduce;
        Ok(())
    }

    fn sync(&self, pass: Pass, part: Part) -> Sync {
        if self.last == Some((pass, part)) {
            Sync::Reduce
        } else {
            Sync::Accumulate
        }
    }

    fn end(&mut self) -> Result<()> {
        if let Some((ddp, _)) = self.training.filter(|_| !self.is_exchanged) {
            let start = Instant::now();
            self.pipeline.add_tied()?;
            self.waited += start.elapsed();
            ddp.exchange_weighted()?;
        }
        self.messages.end()
    }

    /// Tells all ranks the losses. They hear, too, whether they had the same weights.
    pub(super) fn told(&mut self) -> Result<Vec<f64>, Failed> {
        let losses =
            self.losses.iter().map(|loss| Ok(loss.f_to_kind(Kind::Double)?.f_double_value(&[])?));
        let losses = losses.collect::<Result<Vec<f64>>>().map_err(Failed::at_end)?;
        let weights = self.training.map_or(&[][..], |(_, weights)| weights);
        let mine: Vec<u8> = weights.iter().chain(&losses).flat_map(|x| x.to_le_bytes()).collect();
        let start = Instant::now();
        let group = &self.pipeline.group;
        let all = group.with_group(|group| group.tagged("losses").all_gather_bytes(&mine));
        self.waited += start.elapsed();
        let all = all.map_err(|error| Failed::at_end(error.into()))?;
        let len = weights.len() * 8;
        if let Some(rank) = (1..all.len()).find(|rank| all[*rank][..len] != all[0][..len]) {
            return Err(Failed::at_end(Error::PipelineMismatch {
                who: self.pipeline.names.of(rank).to_owned(),
                what: format!("weights of micro-batches {:?}", numbers(&all[rank][..len])),
                expected: format!("the first rank's, {:?}", numbers(&all[0][..len])),
            }));
        }
        Ok(all.last().map_or_else(Vec::new, |last| numbers(&last[len..])))
    }

    fn take(&mut self, payload: Payload, part: Part) -> Result<Tensor> {
        let taken = self.given.remove(&(payload, part));
        taken.ok_or_else(|| Error::NotThere { what: "an input".to_owned() })
    }

    /// Gives what was computed to who needs it: this rank's own next chunk, or a message.
    fn hand(&mut self, payload: Payload, part: Part, tensor: Tensor) {
        match self.pipeline.schedule.target(self.rank, payload, part) {
            Some((peer, theirs)) if peer == self.rank => {
                self.given.insert((payload, theirs), tensor);
            }
            _ => {
                if let Some(address) = self.address(payload, part) {
                    self.made.insert((payload, part), (tensor, address));
                }
            }
        }
    }

    /// Another rank that what is computed here goes to.
    fn address(&self, payload: Payload, part: Part) -> Option<Address> {
        let schedule = &self.pipeline.schedule;
        let (peer, theirs) = schedule.target(self.rank, payload, part)?;
        let tag = tag(payload, schedule.stage(peer, theirs.chunk), part.micro_batch);
        let group = self.pipeline.group.clone();
        (peer != self.rank).then_some(Address { group, peer, tag })
    }

    fn shaped(&self, stage: usize) -> Option<&Shaped> {
        self.pipeline.agreed.as_ref()?.get(stage)
    }
}

/// What a rank receives, in order.
fn expected(pipeline: &Pipeline, actions: &[Action]) -> VecDeque<Expected> {
    let agreed = pipeline.agreed.as_deref().unwrap_or(&[]);
    let receives = actions.iter().filter_map(|action| match *action {
        Action::Receive { payload, part, peer } => {
            let stage = pipeline.stage(part.chunk);
            let maker = if payload == Payload::Activation { stage.checked_sub(1)? } else { stage };
            let shaped = agreed.get(maker)?.clone();
            let tag = tag(payload, stage, part.micro_batch);
            Some(Expected { key: (payload, part), peer, shaped, tag })
        }
        Action::Compute { .. } | Action::Send { .. } => None,
    });
    receives.collect()
}

const fn is_compute(action: Action) -> bool {
    matches!(action, Action::Compute { .. })
}

const fn is_forward(action: Action) -> bool {
    match action {
        Action::Compute { pass, .. } => matches!(pass, Pass::Forward),
        Action::Send { payload, .. } | Action::Receive { payload, .. } => {
            matches!(payload, Payload::Activation)
        }
    }
}

fn numbers(bytes: &[u8]) -> Vec<f64> {
    let number = |b: &[u8]| f64::from_le_bytes([b[0], b[1], b[2], b[3], b[4], b[5], b[6], b[7]]);
    bytes.chunks_exact(8).map(number).collect()
}
