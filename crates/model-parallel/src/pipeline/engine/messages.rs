//! A step's messages: receives that are asked for before they are needed, and sends that are waited for late.
//!
//! Inside a machine what is sent lies in shared memory until the receiver takes it. Between machines a sender sends when the receiver has asked, so what is asked for early travels
//! while both ranks compute. Over NCCL the messages of a group go one after the other,
//! and one that was asked for early would hold up those behind it: there the messages that stand between two computations go together, where the schedule has them.

use std::collections::{BTreeMap, VecDeque};
use std::time::{Duration, Instant};

use phalanx_ddp_core::collective::{MessageCall, Receiving, Sending, StartedMessage, TensorGroup};
use tch::{Device, Tensor};

use super::boundary::Address;
use super::stage::Shaped;
use crate::error::{Error, Result};
use crate::pipeline::schedule::{Action, Part, Payload, Schedule};

/// Messages that are asked for before the one that is needed has been used.
const RECEIVES_AHEAD: usize = 2;
/// Messages whose receivers may be this far behind, where a schedule ends with sends that wait.
const SENDS_MAX: usize = 4;

/// A message for this rank.
#[derive(Clone, Debug)]
pub(super) struct Expected {
    pub(super) key: (Payload, Part),
    pub(super) peer: usize,
    pub(super) shaped: Shaped,
    pub(super) tag: String,
}

/// One that goes together with others.
enum Parcel {
    Out((Tensor, Address)),
    In(Expected),
}

impl Parcel {
    fn call(&self, device: Device) -> MessageCall<'_> {
        match self {
            Self::Out((tensor, Address { peer, tag, .. })) => {
                MessageCall::Send { tensor, peer: *peer, tag }
            }
            Self::In(Expected { peer, shaped: Shaped { shape, kind }, tag, .. }) => {
                MessageCall::Receive { shape, kind: *kind, device, peer: *peer, tag }
            }
        }
    }
}

/// The messages of one step.
#[derive(Debug)]
pub(super) struct Messages {
    group: TensorGroup,
    device: Device,
    expected: VecDeque<Expected>,
    asked: VecDeque<((Payload, Part), Receiving)>,
    sending: VecDeque<Sending>,
    sends_max: usize,
    /// How long this rank waited for what it received.
    pub(super) idle: Duration,
}

/// The name of a message: the same on both sides.
pub(super) fn tag(payload: Payload, stage: usize, micro_batch: usize) -> String {
    let what = match payload {
        Payload::Activation => "activation",
        Payload::Gradient => "gradient",
    };
    format!("{what} for stage {stage}, micro-batch {micro_batch}")
}

impl Messages {
    pub(super) fn new(
        group: &TensorGroup,
        device: Device,
        expected: VecDeque<Expected>,
        sends_max: usize,
    ) -> Self {
        let (asked, sending) = (VecDeque::new(), VecDeque::new());
        Self {
            group: group.clone(),
            device,
            expected,
            asked,
            sending,
            sends_max,
            idle: Duration::ZERO,
        }
    }

    /// How many sends may be under way in a schedule: as many as there are where it needs sends that wait for nobody.
    pub(super) fn sends_max(schedule: &Schedule) -> usize {
        match schedule.sending() {
            crate::pipeline::schedule::Sending::Buffered => usize::MAX,
            _ => SENDS_MAX,
        }
    }

    /// Asks for what comes next.
    pub(super) fn ask(&mut self) -> Result<()> {
        while self.asked.len() < RECEIVES_AHEAD {
            let Some(next) = self.expected.pop_front() else { break };
            let of = (next.shaped.kind, self.device);
            let receiving =
                self.group.start_receive(&next.shaped.shape, of, next.peer, &next.tag)?;
            self.asked.push_back((next.key, receiving));
        }
        Ok(())
    }

    /// Waits for the next message.
    pub(super) fn receive(&mut self, key: (Payload, Part)) -> Result<Tensor> {
        self.ask()?;
        let next = self.asked.pop_front().filter(|(asked, _)| *asked == key);
        let Some((_, receiving)) = next else {
            return Err(Error::NotThere { what: "a message".to_owned() });
        };
        // Behind the one that is needed the others are asked for, for the time in which it is used.
        self.ask()?;
        let start = Instant::now();
        let tensor = receiving.wait()?;
        self.idle += start.elapsed();
        Ok(tensor)
    }

    /// Sends, and waits for messages of long ago.
    pub(super) fn send(&mut self, tensor: &Tensor, to: &Address) -> Result<()> {
        let sending = self.group.start_send(tensor, to.peer, &to.tag)?;
        self.sent(sending)
    }

    /// A message has been sent.
    pub(super) fn sent(&mut self, sending: Sending) -> Result<()> {
        self.sending.push_back(sending);
        while self.sending.len() > self.sends_max
            || self.sending.front().is_some_and(Sending::is_done)
        {
            let Some(oldest) = self.sending.pop_front() else { break };
            oldest.wait()?;
        }
        Ok(())
    }

    /// The messages between two computations, all together, in the order of the schedule; what was received. `made` has what is sent.
    pub(super) fn together(
        &mut self,
        actions: &[Action],
        made: &mut BTreeMap<(Payload, Part), (Tensor, Address)>,
    ) -> Result<Vec<((Payload, Part), Tensor)>> {
        let parcels = actions.iter().filter_map(|action| match *action {
            // Gone already: it was sent inside of its backward.
            Action::Send { payload, part, .. } => made.remove(&(payload, part)).map(Parcel::Out),
            Action::Receive { .. } => self.expected.pop_front().map(Parcel::In),
            Action::Compute { .. } => None,
        });
        let parcels: Vec<Parcel> = parcels.collect();
        let calls: Vec<MessageCall<'_>> =
            parcels.iter().map(|parcel| parcel.call(self.device)).collect();
        let started = self.group.start_together(&calls)?;
        let start = Instant::now();
        let mut received = Vec::new();
        for (one, parcel) in started.into_iter().zip(&parcels) {
            match (one, parcel) {
                (StartedMessage::Sending(sending), _) => sending.wait()?,
                (StartedMessage::Receiving(receiving), Parcel::In(expected)) => {
                    received.push((expected.key, receiving.wait()?));
                }
                (StartedMessage::Receiving(receiving), Parcel::Out(_)) => drop(receiving.wait()?),
            }
        }
        self.idle += start.elapsed();
        Ok(received)
    }

    /// Waits for what is still under way.
    pub(super) fn end(&mut self) -> Result<()> {
        self.sending.drain(..).try_for_each(|sending| Ok(sending.wait()?))
    }
}
