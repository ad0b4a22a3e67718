//! Many agents, a coordinator and a network that loses, doubles, delays and reorders, in simulated time: the same seed
//! gives the same run. What must always hold is checked at every start of ranks.
//!
//! * At any time the ranks of one generation run, on whatever nodes.
//! * All nodes of a generation are told the same members, as many as there must and may be.
//! * No node starts a generation twice, and none before it has ended the one before.
//! * When the faults end and enough nodes live, the job ends well.
//!
//! Source: the method of the simulators of `FoundationDB` and `TigerBeetle`.

mod faults;

use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap};
use std::sync::Arc;
use std::time::Duration;

use self::faults::{Fault, Random};
use super::{
    Action, Agent, Command, Condition, Config, Coordinator, Order, Status, Times, Verdict,
};
use crate::restart::{Ending, Limits, Policy};

/// A job to simulate.
#[derive(Clone, Copy, Debug)]
pub struct Schedule {
    /// Everything that happens follows from it.
    pub seed: u64,
    /// How many nodes there are.
    pub nodes: usize,
    /// With how many the job goes on.
    pub nodes_min: usize,
    /// How long nodes die and come back, are cut off, and messages are lost. Zero: nothing goes wrong.
    pub faults_for: Duration,
}

impl Schedule {
    /// A job of one to eight nodes with half a minute of faults.
    #[must_use]
    pub fn with_faults(seed: u64) -> Self {
        let number = |value: u64| usize::try_from(value).unwrap_or(0);
        let nodes = 1 + number(seed % 8);
        let nodes_min = 1 + number(seed / 8 % nodes as u64);
        Self { seed, nodes, nodes_min, faults_for: Duration::from_secs(30) }
    }
}

/// What came of it.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Outcome {
    /// Events of the simulation.
    pub events: u64,
    /// Generations whose ranks ran.
    pub generations: usize,
    /// Simulated time until the ranks of the first generation ran on all its nodes.
    pub first_start: Duration,
    /// Simulated time in all.
    pub elapsed: Duration,
    /// A number that any other course of events would change.
    pub digest: u64,
}

/// A job that is not over so long after the faults hangs.
const LIMIT: Duration = Duration::from_secs(120);
/// The coordinator looks at the time this often.
const TICK: Duration = Duration::from_millis(250);

#[derive(Clone, Debug)]
enum Event {
    /// A status arrives at the coordinator.
    Tell {
        status: Status,
        sent: Duration,
    },
    /// The answer to a status arrives: the number of the newest order, and now and then that order, too.
    Answer {
        node: usize,
        life: u64,
        sent: Duration,
        newest: u64,
        order: Option<Arc<Order>>,
    },
    /// An order arrives.
    Order {
        node: usize,
        life: u64,
        order: Arc<Order>,
    },
    /// An agent says how it is, as it does now and then.
    Beat {
        node: usize,
        life: u64,
    },
    CoordinatorTick,
    /// A node's ranks end.
    RanksEnd {
        node: usize,
        life: u64,
        generation: u32,
        condition: Condition,
    },
    Fault(Fault),
}

/// A node: its launcher, if one lives, and the generation that its ranks are of, if they run.
#[derive(Debug)]
struct Node {
    life: u64,
    agent: Option<Agent>,
    running: Option<u32>,
    cut_off_until: Duration,
    has_finished: bool,
}

struct World {
    schedule: Schedule,
    random: Random,
    now: Duration,
    queue: BinaryHeap<Reverse<(Duration, u64)>>,
    /// By number, as the queue has them.
    pending: BTreeMap<u64, Event>,
    next: u64,
    events: u64,
    digest: u64,
    coordinator: Coordinator,
    nodes: Vec<Node>,
    /// How many nodes run ranks, and of which generation.
    running: (u32, usize),
    /// What was told to those who started a generation, and how many have.
    worlds: BTreeMap<u32, (Arc<Order>, usize)>,
    first_start: Duration,
}

/// Runs a job to its end.
///
/// # Panics
///
/// When something does not hold that must always hold; the message has the schedule.
#[must_use]
pub fn simulate(schedule: Schedule) -> Outcome {
    let mut world = World::new(schedule);
    let limit = schedule.faults_for + LIMIT;
    while !world.is_over() {
        assert!(world.now < limit, "{schedule:?}: not over at {:?}: {:?}", world.now, world.nodes);
        world.step();
    }
    Outcome {
        events: world.events,
        generations: world.worlds.len(),
        first_start: world.first_start,
        elapsed: world.now,
        digest: world.digest,
    }
}

impl World {
    fn new(schedule: Schedule) -> Self {
        let times = Times::default();
        let config = Config { nodes_min: schedule.nodes_min, nodes_max: schedule.nodes, times };
        let limits =
            Limits { restarts_max: u32::MAX, window: None, attempts_in_vain_max: u32::MAX };
        let coordinator = Coordinator::new(config, Policy::new(limits), Duration::ZERO);
        let nodes = (0..schedule.nodes).map(|_| Node::new()).collect();
        let mut world = Self {
            schedule,
            random: Random::new(schedule.seed),
            now: Duration::ZERO,
            queue: BinaryHeap::new(),
            pending: BTreeMap::new(),
            next: 0,
            events: 0,
            digest: schedule.seed,
            coordinator,
            nodes,
            running: (0, 0),
            worlds: BTreeMap::new(),
            first_start: Duration::ZERO,
        };
        world.at(TICK, Event::CoordinatorTick);
        for (at, fault) in faults::plan(schedule, &mut world.random) {
            world.at(at, Event::Fault(fault));
        }
        world
    }

    fn at(&mut self, at: Duration, event: Event) {
        self.queue.push(Reverse((at, self.next)));
        self.pending.insert(self.next, event);
        self.next += 1;
    }

    fn has_faults(&self) -> bool {
        self.now < self.schedule.faults_for
    }

    fn is_over(&self) -> bool {
        let told = self.nodes.iter().all(|node| node.agent.is_none() || node.has_finished);
        self.coordinator.is_finished() && told
    }

    fn step(&mut self) {
        let Some(Reverse((at, number))) = self.queue.pop() else {
            panic!("{:?}: nothing happens any more", self.schedule);
        };
        let Some(event) = self.pending.remove(&number) else { return };
        self.now = at;
        self.events += 1;
        self.digest =
            faults::mix(self.digest ^ number ^ u64::try_from(at.as_micros()).unwrap_or(0));
        match event {
            Event::Tell { status, sent } => self.hear(&status, sent),
            Event::Answer { node, life, sent, newest, order } => {
                let now = self.now;
                self.act(node, life, |agent| {
                    agent.arrived(sent, newest);
                    order.map(|order| agent.obey(order, now)).unwrap_or_default()
                });
            }
            Event::Order { node, life, order } => {
                let now = self.now;
                self.act(node, life, |agent| agent.obey(order, now));
            }
            Event::Beat { node, life } => self.beat(node, life),
            Event::CoordinatorTick => {
                let before = self.coordinator.order().number;
                self.coordinator.tick(self.now);
                self.publish(before);
                self.at(self.now + TICK, Event::CoordinatorTick);
            }
            Event::RanksEnd { node, life, generation, condition } => {
                self.ranks_end(node, life, generation, condition);
            }
            Event::Fault(fault) => self.strike(fault),
        }
    }

    fn hear(&mut self, status: &Status, sent: Duration) {
        let before = self.coordinator.order().number;
        let is_new = self.coordinator.hear(status, self.now);
        self.publish(before);
        if is_new {
            let (node, life) = (status.node, status.life);
            let newest = self.coordinator.order().number;
            let order = self.random.one_in(2).then(|| Arc::clone(self.coordinator.order()));
            self.send(node, &Event::Answer { node, life, sent, newest, order });
        }
    }

    /// Tells all agents of a new order. Who does not hear it hears it with an answer.
    fn publish(&mut self, before: u64) {
        let order = Arc::clone(self.coordinator.order());
        if order.number == before {
            return;
        }
        for node in 0..self.nodes.len() {
            let life = self.nodes[node].life;
            self.send(node, &Event::Order { node, life, order: Arc::clone(&order) });
        }
    }

    /// Hands a message of or for a node to the network.
    fn send(&mut self, node: usize, event: &Event) {
        if self.nodes[node].cut_off_until > self.now {
            return;
        }
        let copies = if self.has_faults() { self.random.copies() } else { 1 };
        for _ in 0..copies {
            let delay = self.random.delay(self.has_faults());
            self.at(self.now + delay, event.clone());
        }
    }

    fn beat(&mut self, node: usize, life: u64) {
        let now = self.now;
        if self.nodes[node].life != life || self.nodes[node].agent.is_none() {
            return;
        }
        self.act(node, life, |agent| {
            let mut actions = agent.tick(now);
            actions.push(Action::Tell);
            actions
        });
        if !self.nodes[node].has_finished {
            let jitter = self.random.below(50);
            self.at(now + Times::default().beat + jitter, Event::Beat { node, life });
        }
    }

    /// Lets the agent of a node, if it still is of this life, do something, and does what it then wants.
    fn act(&mut self, node: usize, life: u64, what: impl FnOnce(&mut Agent) -> Vec<Action>) {
        if self.nodes[node].life != life {
            return;
        }
        let actions = self.nodes[node].agent.as_mut().map(what).unwrap_or_default();
        for action in actions {
            match action {
                Action::Start(order) => self.start(node, &order),
                Action::StopSoon => self.end_ranks(node, 1000, Condition::Stopped),
                Action::StopNow => self.end_ranks(node, 300, Condition::Stopped),
                Action::Finish(verdict) => {
                    assert_eq!(verdict, Verdict::Well, "{:?}", self.schedule);
                    self.nodes[node].has_finished = true;
                }
                Action::Tell => {
                    let Some(agent) = &mut self.nodes[node].agent else { return };
                    let (status, sent) = (agent.status(), self.now);
                    self.send(node, &Event::Tell { status, sent });
                }
            }
        }
    }

    fn start(&mut self, node: usize, order: &Arc<Order>) {
        let (schedule, generation) = (self.schedule, order.generation);
        assert_eq!(order.command, Command::Run, "{schedule:?}");
        let is_idle = self.nodes[node].running.is_none();
        assert!(is_idle, "{schedule:?}: node {node} runs two generations");
        let (current, count) = self.running;
        assert!(
            count == 0 || current == generation,
            "{schedule:?}: generation {generation} begins on node {node} while {current} runs on {count} nodes"
        );
        let members = order.members.len();
        let is_quorum = (schedule.nodes_min..=schedule.nodes).contains(&members);
        assert!(is_quorum, "{schedule:?}: generation {generation} has {members} nodes");
        let fresh = (Arc::clone(order), 0);
        let (told, started) = self.worlds.entry(generation).or_insert(fresh);
        let is_same = Arc::ptr_eq(told, order) || told.members == order.members;
        assert!(is_same, "{schedule:?}: two worlds in generation {generation}");
        *started += 1;
        assert!(*started <= members, "{schedule:?}: a node started generation {generation} twice");
        if generation == 0 {
            self.first_start = self.now;
        }
        self.nodes[node].running = Some(generation);
        self.running = (generation, count + 1);
        self.plan_end(node);
    }

    /// How the ranks that were just started would end if nobody asked them to.
    fn plan_end(&mut self, node: usize) {
        if self.has_faults() && self.random.one_in(8) {
            let step = self.random.one_in(2).then_some(self.events);
            return self.end_ranks(node, 10_000, Condition::Failed(Ending::Failed, step));
        }
        let work = Duration::from_secs(10);
        let left = self.schedule.faults_for.saturating_sub(self.now) + work;
        let after = if self.schedule.faults_for.is_zero() { work } else { left };
        self.end_after(node, after, Condition::Well);
    }

    fn end_ranks(&mut self, node: usize, within_ms: u64, condition: Condition) {
        let after = self.random.below(within_ms);
        self.end_after(node, after, condition);
    }

    fn end_after(&mut self, node: usize, after: Duration, condition: Condition) {
        if let Some(generation) = self.nodes[node].running {
            let life = self.nodes[node].life;
            self.at(self.now + after, Event::RanksEnd { node, life, generation, condition });
        }
    }

    fn ranks_end(&mut self, node: usize, life: u64, generation: u32, condition: Condition) {
        if self.nodes[node].life != life || self.nodes[node].running != Some(generation) {
            return;
        }
        self.gone(node, condition == Condition::Well);
        let now = self.now;
        self.act(node, life, |agent| agent.ended(condition, now));
    }

    /// A node's ranks are gone; unless they have ended well, those of other nodes notice.
    fn gone(&mut self, node: usize, well: bool) {
        let Some(generation) = self.nodes[node].running.take() else { return };
        self.running.1 -= 1;
        if well {
            return;
        }
        for other in 0..self.nodes.len() {
            if self.nodes[other].running == Some(generation) {
                self.end_ranks(other, 600, Condition::Failed(Ending::Failed, None));
            }
        }
    }

    fn strike(&mut self, fault: Fault) {
        match fault {
            Fault::Kill { node } => {
                self.gone(node, false);
                self.nodes[node].agent = None;
            }
            Fault::Start { node } if self.nodes[node].agent.is_none() => {
                let life = self.nodes[node].life + 1;
                let fence_after = Times::default().fence_after;
                let agent = Agent::new(node, life, 8, fence_after, self.now);
                self.nodes[node] = Node { life, agent: Some(agent), ..Node::new() };
                self.beat(node, life);
            }
            Fault::Start { .. } => {}
            Fault::CutOff { node, until } => self.nodes[node].cut_off_until = until,
        }
    }
}

impl Node {
    const fn new() -> Self {
        Self {
            life: 0,
            agent: None,
            running: None,
            cut_off_until: Duration::ZERO,
            has_finished: false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whatever_happens_one_generation_runs_at_a_time_and_the_job_ends_well() {
        let each = (0..300).map(|seed| simulate(Schedule::with_faults(seed)).generations);
        let generations: usize = each.sum();
        assert!(generations > 600, "{generations} generations: the faults do nothing");
    }

    /// With seed 404 an agent that is cut off must not start what it hears late; with 2347 it must not start an order
    /// that is not the newest one it has heard of.
    #[test]
    fn orders_that_come_late_start_nothing() {
        for seed in [404, 2347] {
            assert!(simulate(Schedule::with_faults(seed)).generations > 1);
        }
    }

    #[test]
    fn the_same_seed_gives_the_same_run() {
        let run = |seed| simulate(Schedule::with_faults(seed));
        assert_eq!(run(7), run(7));
        assert_ne!(run(7).digest, run(8).digest);
    }

    #[test]
    fn two_hundred_nodes_meet_and_end_together() {
        let schedule = Schedule { seed: 1, nodes: 200, nodes_min: 200, faults_for: Duration::ZERO };
        let outcome = simulate(schedule);
        assert_eq!(outcome.generations, 1);
        assert!(outcome.first_start < Duration::from_secs(2), "{outcome:?}");
    }
}
