//! Which nodes make the next generation, and when the one before ends. Pure.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use super::ended::{End, Ended};
use super::{Command, Condition, Life, Member, Order, Status, Times, Verdict, Wish};
use crate::restart::{Decision, Ending, Policy};

/// What does not change in a job's life.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Config {
    /// A generation has so many nodes at least …
    pub(crate) nodes_min: usize,
    /// … and at most.
    pub(crate) nodes_max: usize,
    pub(crate) times: Times,
}

/// A node that was heard of not long ago.
#[derive(Clone, Copy, Debug)]
struct Known {
    member: Member,
    heard: Duration,
    came: Duration,
    ran: Option<(u32, Condition)>,
    wish: Wish,
}

/// How far the job is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    Gathering { since: Duration },
    Running,
    Stopping,
    Finished,
}

/// Node 0's view of all nodes.
#[derive(Debug)]
pub(crate) struct Coordinator {
    config: Config,
    policy: Policy,
    phase: Phase,
    order: Arc<Order>,
    has_started: bool,
    nodes: BTreeMap<usize, Known>,
    /// The newest life and number of each node that was ever heard of.
    newest: BTreeMap<usize, (Life, u64)>,
    /// Nodes that will not come, as whoever was to start them says.
    gone: BTreeSet<usize>,
    /// How many of them want to leave, or the job to end.
    wishes: usize,
    ended: Ended,
    /// The failure that was told first.
    failure: Option<(usize, Ending, Option<u64>)>,
}

impl Coordinator {
    pub(crate) fn new(config: Config, policy: Policy, now: Duration) -> Self {
        let order = Order { number: 1, generation: 0, members: Vec::new(), command: Command::Wait };
        Self {
            config,
            policy,
            phase: Phase::Gathering { since: now },
            order: Arc::new(order),
            has_started: false,
            nodes: BTreeMap::new(),
            newest: BTreeMap::new(),
            gone: BTreeSet::new(),
            wishes: 0,
            ended: Ended::default(),
            failure: None,
        }
    }

    /// What is wanted now.
    pub(crate) const fn order(&self) -> &Arc<Order> {
        &self.order
    }

    /// Whether the job has ended: what is left is that all agents hear it.
    #[cfg(any(test, feature = "testing"))]
    pub(super) fn is_finished(&self) -> bool {
        self.phase == Phase::Finished
    }

    /// Nodes that are waited for, and have not been heard of.
    pub(crate) fn awaited(&self) -> Vec<usize> {
        let is_awaited = |node: &usize| !self.nodes.contains_key(node) && !self.gone.contains(node);
        match self.phase {
            Phase::Gathering { .. } => (0..self.config.nodes_max).filter(is_awaited).collect(),
            _ => Vec::new(),
        }
    }

    /// That node will not come.
    pub(crate) fn note_gone(&mut self, node: usize, now: Duration) {
        self.gone.insert(node);
        self.advance(now);
    }

    /// A status has come. Whether it was a new one.
    pub(crate) fn hear(&mut self, status: &Status, now: Duration) -> bool {
        let stamp = (status.life, status.number);
        if self.newest.get(&status.node).is_some_and(|newest| *newest >= stamp) {
            return false;
        }
        let known = self.nodes.get(&status.node).copied();
        let other_life = known.filter(|known| known.member.life != status.life);
        // Two launchers of one node: the first has its ranks until it has told their end or is lost.
        if other_life.is_some_and(|other| self.may_run(&other.member)) {
            return false;
        }
        self.newest.insert(status.node, stamp);
        let Status { node, life, ranks, ran, wish, .. } = *status;
        let before = known.filter(|known| known.member.life == life);
        let came = before.map_or(now, |it| it.came);
        let member = Member { node, life, ranks };
        let replaced = self.nodes.insert(node, Known { member, heard: now, came, ran, wish });
        self.wishes -= usize::from(replaced.is_some_and(|it| it.wish != Wish::Nothing));
        self.wishes += usize::from(wish != Wish::Nothing);
        let is_news = before.is_none_or(|it| (it.ran, it.wish) != (ran, wish));
        if is_news {
            self.note_end(&member, ran);
            self.advance(now);
        }
        true
    }

    /// Looks at the time: who is lost, who has had time enough.
    pub(crate) fn tick(&mut self, now: Duration) {
        let is_lost =
            |known: &Known| now.saturating_sub(known.heard) >= self.config.times.lost_after;
        let lost: Vec<Member> =
            self.nodes.values().filter(|known| is_lost(known)).map(|known| known.member).collect();
        for member in lost {
            if self.may_run(&member) {
                self.ended.insert(member.node, End::Lost);
            }
            let removed = self.nodes.remove(&member.node);
            self.wishes -= usize::from(removed.is_some_and(|it| it.wish != Wish::Nothing));
        }
        self.advance(now);
    }

    /// Whether this life of a node belongs to the generation and has not told its end.
    fn may_run(&self, member: &Member) -> bool {
        let has_generation = matches!(self.phase, Phase::Running | Phase::Stopping);
        has_generation
            && self.member(member.node).is_some_and(|it| it.life == member.life)
            && !self.ended.has(member.node)
    }

    /// A node in the generation; they stand there in the order of their numbers.
    fn member(&self, node: usize) -> Option<&Member> {
        let members = &self.order.members;
        members.binary_search_by_key(&node, |member| member.node).ok().map(|at| &members[at])
    }

    fn note_end(&mut self, member: &Member, ran: Option<(u32, Condition)>) {
        let Some((generation, condition)) = ran.filter(|(_, condition)| condition.has_ended())
        else {
            return;
        };
        if generation != self.order.generation || !self.may_run(member) {
            return;
        }
        self.ended.insert(member.node, End::Told(condition));
        if let Condition::Failed(ending, step) = condition {
            self.failure.get_or_insert((member.node, ending, step));
        }
    }

    fn advance(&mut self, now: Duration) {
        match self.phase {
            Phase::Gathering { since } => self.gather(since, now),
            Phase::Running => self.watch(now),
            Phase::Stopping => self.stop(now),
            Phase::Finished => {}
        }
    }

    /// Nodes that could be in the next generation. One whose ranks still run, of a generation that has ended for the
    /// others, is on its way out of that.
    fn candidates(&self) -> Vec<Member> {
        let is_stale = |known: &Known| {
            let runs = matches!(known.ran, Some((_, Condition::Running)));
            runs && !self.may_run(&known.member)
        };
        let nodes = self.nodes.values();
        let can = nodes.filter(|known| known.wish == Wish::Nothing && !is_stale(known));
        can.map(|known| known.member).take(self.config.nodes_max).collect()
    }

    fn gather(&mut self, since: Duration, now: Duration) {
        if let Some(verdict) = self.wished_end() {
            return self.finish(verdict);
        }
        let Config { nodes_min, nodes_max, times } = self.config;
        let gone = self.gone.iter().filter(|node| !self.nodes.contains_key(node)).count();
        let coming_max = nodes_max.saturating_sub(gone);
        let is_over = now.saturating_sub(since) >= times.gather_max || coming_max < nodes_min;
        if self.nodes.len() < nodes_min && !is_over {
            return;
        }
        let candidates = self.candidates();
        let newest = self.nodes.values().map(|known| known.came).max().unwrap_or(now);
        let is_settled = self.has_started || now.saturating_sub(newest) >= times.settle;
        let are_all = candidates.len() >= coming_max;
        if candidates.len() >= nodes_min && (are_all || is_settled) {
            self.start(candidates);
        } else if is_over {
            self.finish(Verdict::TooFew { nodes: candidates.len() });
        }
    }

    fn start(&mut self, members: Vec<Member>) {
        let generation = self.order.generation + u32::from(self.has_started);
        self.has_started = true;
        self.ended = Ended::default();
        self.failure = None;
        self.phase = Phase::Running;
        let number = self.order.number + 1;
        self.order = Arc::new(Order { number, generation, members, command: Command::Run });
    }

    fn give(&mut self, command: Command) {
        let number = self.order.number + 1;
        self.order = Arc::new(Order { number, command, ..(*self.order).clone() });
    }

    fn watch(&mut self, now: Duration) {
        if self.all_ended() && self.ended.all_well() {
            return self.finish(Verdict::Well);
        }
        // Nobody was asked to stop: who has, was cut off for a while.
        let is_bad = self.ended.is_bad() || self.ended.has_stopped();
        if !is_bad && self.wished_end().is_none() && !self.is_resize_due(now) {
            return;
        }
        self.phase = Phase::Stopping;
        self.give(if is_bad { Command::StopNow } else { Command::StopSoon });
        self.stop(now);
    }

    /// The generation is to end: has it?
    fn stop(&mut self, now: Duration) {
        if self.ended.is_bad() && self.order.command == Command::StopSoon {
            self.give(Command::StopNow);
        }
        if !self.all_ended() {
            return;
        }
        if let Some(verdict) = self.wished_end() {
            return self.finish(verdict);
        }
        if self.ended.all_well() {
            return self.finish(Verdict::Well);
        }
        // Ranks fail because a node is lost or leaves: that is no fault of theirs.
        let is_loss = self.ended.lost() > 0 || self.wishes > 0;
        if let Some((node, ending, step)) = self.failure.filter(|_| !is_loss) {
            if let Decision::GiveUp(why) = self.policy.decide(ending, step, now) {
                return self.finish(Verdict::Failed { node, why });
            }
        }
        self.phase = Phase::Gathering { since: now };
        self.gather(now, now);
    }

    /// Who asks this one has no way to go on.
    pub(crate) fn resign(&mut self) {
        if self.phase != Phase::Finished {
            self.finish(Verdict::NoOrders);
        }
    }

    fn finish(&mut self, verdict: Verdict) {
        self.phase = Phase::Finished;
        self.give(Command::Finish(verdict));
    }

    fn all_ended(&self) -> bool {
        self.ended.count() == self.order.members.len()
    }

    fn wished_end(&self) -> Option<Verdict> {
        if self.wishes == 0 {
            return None;
        }
        self.nodes.values().find_map(|known| match known.wish {
            Wish::End(signal) => Some(Verdict::Ended { node: known.member.node, signal }),
            Wish::Nothing | Wish::Leave => None,
        })
    }

    /// A member wants to leave, or others have come, and no more are coming in this moment.
    fn is_resize_due(&self, now: Duration) -> bool {
        // If those that are not lost are all that is known, nobody else has come.
        let present = self.order.members.len().saturating_sub(self.ended.lost());
        if self.wishes == 0 && self.nodes.len() == present {
            return false;
        }
        let is_member = |node: usize| self.member(node).is_some();
        let leaves = |known: &Known| known.wish == Wish::Leave && is_member(known.member.node);
        if self.nodes.values().any(leaves) {
            return true;
        }
        let candidates = self.candidates();
        let mut newcomers = candidates.iter().filter(|member| !is_member(member.node)).peekable();
        if newcomers.peek().is_none() {
            return false;
        }
        let came = |member: &Member| self.nodes.get(&member.node).map(|known| known.came);
        let newest = newcomers.filter_map(came).max().unwrap_or(now);
        let is_settled = now.saturating_sub(newest) >= self.config.times.settle;
        candidates.len() >= self.config.nodes_max || is_settled
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::process::Exit;
    use crate::restart::{GiveUp, Limits};

    fn seconds(count: u64) -> Duration {
        Duration::from_secs(count)
    }

    fn coordinator(nodes_min: usize, nodes_max: usize, restarts_max: u32) -> Coordinator {
        let limits = Limits { restarts_max, window: None, attempts_in_vain_max: 3 };
        let config = Config { nodes_min, nodes_max, times: Times::default() };
        Coordinator::new(config, Policy::new(limits), Duration::ZERO)
    }

    /// Statuses of nodes, numbered as they come.
    struct Nodes {
        number: u64,
        coordinator: Coordinator,
    }

    impl Nodes {
        fn new(coordinator: Coordinator) -> Self {
            Self { number: 0, coordinator }
        }

        fn say(&mut self, node: usize, ran: Option<(u32, Condition)>, at: u64) {
            self.wish(node, ran, Wish::Nothing, at);
        }

        fn wish(&mut self, node: usize, ran: Option<(u32, Condition)>, wish: Wish, at: u64) {
            self.number += 1;
            let status = Status { node, life: 1, number: self.number, ranks: 2, ran, wish };
            self.coordinator.hear(&status, seconds(at));
        }

        fn wanted(&self) -> (u32, Command, Vec<usize>) {
            let order = self.coordinator.order();
            let nodes = order.members.iter().map(|member| member.node).collect();
            (order.generation, order.command, nodes)
        }
    }

    const FAILED: Condition = Condition::Failed(Ending::Failed, Some(5));

    #[test]
    fn all_start_when_all_are_there_and_the_job_ends_when_all_have_ended() {
        let mut nodes = Nodes::new(coordinator(2, 2, 0));
        nodes.say(0, None, 0);
        nodes.coordinator.tick(seconds(4));
        assert_eq!(nodes.wanted(), (0, Command::Wait, vec![]));
        nodes.say(1, None, 4);
        assert_eq!(nodes.wanted(), (0, Command::Run, vec![0, 1]));
        nodes.say(0, Some((0, Condition::Well)), 5);
        assert_eq!(nodes.wanted().1, Command::Run);
        nodes.say(1, Some((0, Condition::Well)), 6);
        assert_eq!(nodes.wanted().1, Command::Finish(Verdict::Well));
    }

    #[test]
    fn a_failure_restarts_all_when_all_have_ended_and_the_budget_ends_it() {
        let mut nodes = Nodes::new(coordinator(2, 2, 1));
        nodes.say(0, None, 0);
        nodes.say(1, None, 0);
        nodes.say(1, Some((0, FAILED)), 1);
        assert_eq!(nodes.wanted(), (0, Command::StopNow, vec![0, 1]));
        nodes.say(0, Some((0, Condition::Stopped)), 1);
        assert_eq!(nodes.wanted(), (1, Command::Run, vec![0, 1]));
        nodes.say(0, Some((1, FAILED)), 2);
        nodes.say(1, Some((1, Condition::Stopped)), 2);
        let why = GiveUp::BudgetSpent { restarts: 1, window: None };
        assert_eq!(nodes.wanted().1, Command::Finish(Verdict::Failed { node: 0, why }));
    }

    #[test]
    fn the_job_goes_on_with_those_that_are_left_and_takes_others_in() {
        let mut nodes = Nodes::new(coordinator(2, 3, 0));
        (0..3).for_each(|node| nodes.say(node, None, 0));
        (0..2).for_each(|node| nodes.say(node, Some((0, Condition::Running)), 3));
        // Those that are left lose their peers before node 2 is lost.
        nodes.say(0, Some((0, FAILED)), 4);
        nodes.say(1, Some((0, Condition::Stopped)), 4);
        nodes.coordinator.tick(seconds(4));
        assert_eq!(nodes.wanted().1, Command::StopNow, "node 2 may still run");
        nodes.coordinator.tick(seconds(5));
        assert_eq!(nodes.wanted(), (1, Command::Run, vec![0, 1]), "and it costs no restart");
        (0..2).for_each(|node| nodes.say(node, Some((1, Condition::Running)), 6));
        // It comes back: as many as there may be, so nobody else is waited for.
        nodes.say(2, Some((0, Condition::Stopped)), 7);
        assert_eq!(nodes.wanted(), (1, Command::StopSoon, vec![0, 1]));
        (0..2).for_each(|node| nodes.say(node, Some((1, Condition::Stopped)), 8));
        assert_eq!(nodes.wanted(), (2, Command::Run, vec![0, 1, 2]));
    }

    #[test]
    fn too_few_nodes_are_waited_for_and_then_the_end() {
        let mut nodes = Nodes::new(coordinator(2, 4, 0));
        nodes.say(0, None, 0);
        for at in 1..300 {
            nodes.say(0, None, at);
            nodes.coordinator.tick(seconds(at));
        }
        assert_eq!(nodes.wanted().1, Command::Wait);
        nodes.say(0, None, 300);
        nodes.coordinator.tick(seconds(300));
        assert_eq!(nodes.wanted().1, Command::Finish(Verdict::TooFew { nodes: 1 }));
    }

    #[test]
    fn a_node_that_will_not_come_is_not_waited_for() {
        let mut nodes = Nodes::new(coordinator(2, 3, 0));
        nodes.say(0, None, 0);
        assert_eq!(nodes.coordinator.awaited(), [1, 2]);
        nodes.coordinator.note_gone(2, seconds(1));
        assert_eq!(nodes.wanted().1, Command::Wait);
        assert_eq!(nodes.coordinator.awaited(), [1]);
        nodes.say(1, None, 1);
        assert_eq!(nodes.wanted(), (0, Command::Run, vec![0, 1]), "these are all that come");
        let mut alone = Nodes::new(coordinator(2, 2, 0));
        alone.say(0, None, 0);
        alone.coordinator.note_gone(1, seconds(1));
        assert_eq!(alone.wanted().1, Command::Finish(Verdict::TooFew { nodes: 1 }));
        nodes.coordinator.resign();
        assert_eq!(nodes.wanted().1, Command::Finish(Verdict::NoOrders));
    }

    #[test]
    fn who_leaves_is_left_out_and_who_ends_the_job_ends_it() {
        let mut nodes = Nodes::new(coordinator(1, 2, 0));
        (0..2).for_each(|node| nodes.say(node, None, 0));
        nodes.wish(1, Some((0, Condition::Running)), Wish::Leave, 1);
        assert_eq!(nodes.wanted().1, Command::StopSoon);
        nodes.wish(1, Some((0, Condition::Stopped)), Wish::Leave, 2);
        nodes.say(0, Some((0, Condition::Stopped)), 2);
        assert_eq!(nodes.wanted(), (1, Command::Run, vec![0]));
        nodes.wish(0, Some((1, Condition::Running)), Wish::End(2), 3);
        nodes.wish(0, Some((1, Condition::Stopped)), Wish::End(2), 3);
        let ended = Verdict::Ended { node: 0, signal: 2 };
        assert_eq!(nodes.wanted().1, Command::Finish(ended));
    }

    #[test]
    fn a_second_launcher_of_a_node_waits_until_the_first_is_lost() {
        let mut nodes = Nodes::new(coordinator(1, 1, 0));
        nodes.say(0, None, 0);
        let second =
            |number| Status { node: 0, life: 2, number, ranks: 2, ran: None, wish: Wish::Nothing };
        assert!(!nodes.coordinator.hear(&second(1), seconds(1)));
        nodes.coordinator.tick(seconds(5));
        assert_eq!(nodes.wanted().1, Command::StopNow, "{:?}", nodes.coordinator);
        assert!(nodes.coordinator.hear(&second(2), seconds(6)));
        assert_eq!(nodes.wanted().0, 1);
    }

    #[test]
    fn what_would_come_again_is_final() {
        let mut nodes = Nodes::new(coordinator(1, 1, 5));
        nodes.say(0, None, 0);
        let usage = Condition::Failed(Ending::of(Exit::Code(64)), None);
        nodes.say(0, Some((0, usage)), 1);
        let why = GiveUp::Certain { code: 64 };
        assert_eq!(nodes.wanted().1, Command::Finish(Verdict::Failed { node: 0, why }));
    }
}
