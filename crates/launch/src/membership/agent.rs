//! What the launcher of one node does: it brings its ranks to what the newest order wants. Pure.

use std::sync::Arc;
use std::time::Duration;

use super::{Command, Condition, Life, Member, Order, Status, Verdict, Wish};

/// What an agent wants done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Action {
    /// Start this node's ranks of the order's generation.
    Start(Arc<Order>),
    /// Ask the ranks to end at the next boundary between steps.
    StopSoon,
    /// End the ranks.
    StopNow,
    /// Tell the coordinator [`Agent::status`].
    Tell,
    /// The job has ended.
    Finish(Verdict),
}

/// What its ranks are at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Ranks {
    /// None run; this became of the last ones.
    Idle(Option<(u32, Condition)>),
    Running(u32),
    /// Asked to end at the next boundary.
    EndingSoon(u32),
    /// Asked to end.
    Ending(u32),
}

/// The launcher of one node.
#[derive(Clone, Debug)]
pub(crate) struct Agent {
    node: usize,
    life: Life,
    ranks_count: usize,
    fence_after: Duration,
    ranks: Ranks,
    order: Option<Arc<Order>>,
    wish: Wish,
    told: u64,
    /// The number of the newest order that there is, as far as it knows.
    newest: u64,
    /// When the last status was sent of which it knows that it has arrived.
    contact: Duration,
    is_finished: bool,
}

impl Agent {
    pub(crate) const fn new(
        node: usize,
        life: Life,
        ranks_count: usize,
        fence_after: Duration,
        now: Duration,
    ) -> Self {
        Self {
            node,
            life,
            ranks_count,
            fence_after,
            ranks: Ranks::Idle(None),
            order: None,
            wish: Wish::Nothing,
            told: 0,
            newest: 0,
            contact: now,
            is_finished: false,
        }
    }

    /// What it has to tell now.
    pub(crate) fn status(&mut self) -> Status {
        self.told += 1;
        let ran = match self.ranks {
            Ranks::Idle(last) => last,
            Ranks::Running(generation)
            | Ranks::EndingSoon(generation)
            | Ranks::Ending(generation) => Some((generation, Condition::Running)),
        };
        Status {
            node: self.node,
            life: self.life,
            number: self.told,
            ranks: self.ranks_count,
            ran,
            wish: self.wish,
        }
    }

    /// An order has come.
    pub(crate) fn obey(&mut self, order: Arc<Order>, now: Duration) -> Vec<Action> {
        if self.order.as_ref().is_some_and(|newest| newest.number >= order.number) {
            return Vec::new();
        }
        self.order = Some(order);
        self.converge(now)
    }

    /// All ranks of this node have ended. Whoever was asked to end has ended in obedience, whatever the exit codes say.
    pub(crate) fn ended(&mut self, condition: Condition, now: Duration) -> Vec<Action> {
        let (generation, condition) = match self.ranks {
            Ranks::Idle(_) => return Vec::new(),
            Ranks::Running(generation) => (generation, condition),
            Ranks::EndingSoon(generation) | Ranks::Ending(generation) => {
                (generation, Condition::Stopped)
            }
        };
        self.ranks = Ranks::Idle(Some((generation, condition)));
        let mut actions = vec![Action::Tell];
        actions.extend(self.converge(now));
        actions
    }

    /// A status that was sent at `sent` has arrived, where order number `newest` was given by then. An older order that is
    /// still on its way is of no account.
    pub(crate) fn arrived(&mut self, sent: Duration, newest: u64) {
        self.contact = self.contact.max(sent);
        self.newest = self.newest.max(newest);
    }

    /// The user of this launcher wants something.
    pub(crate) fn wish(&mut self, wish: Wish) -> Vec<Action> {
        self.wish = wish;
        vec![Action::Tell]
    }

    /// For how long nobody has answered.
    pub(crate) const fn silence(&self, now: Duration) -> Duration {
        now.saturating_sub(self.contact)
    }

    /// Whether nobody has answered for so long that the ranks must not run.
    pub(crate) fn is_cut_off(&self, now: Duration) -> bool {
        self.silence(now) >= self.fence_after
    }

    /// Looks at the time: ranks of a node that is cut off end, and what such a node could not start it starts when it is
    /// answered again.
    pub(crate) fn tick(&mut self, now: Duration) -> Vec<Action> {
        match self.ranks {
            Ranks::Running(generation) | Ranks::EndingSoon(generation) if self.is_cut_off(now) => {
                self.ranks = Ranks::Ending(generation);
                vec![Action::StopNow]
            }
            Ranks::Idle(_) => self.converge(now),
            _ => Vec::new(),
        }
    }

    /// What brings the ranks nearer to what is wanted.
    fn converge(&mut self, now: Duration) -> Vec<Action> {
        let Some(order) = &self.order else { return Vec::new() };
        let may_start = order.number >= self.newest && !self.is_cut_off(now);
        let is_me = |member: &Member| member.node == self.node && member.life == self.life;
        let is_member = order.members.iter().any(is_me);
        let wanted = order.generation;
        let is_new = |last: Option<(u32, Condition)>| last.is_none_or(|(last, _)| last < wanted);
        match (self.ranks, order.command) {
            (Ranks::Idle(_), Command::Finish(verdict)) if !self.is_finished => {
                self.is_finished = true;
                vec![Action::Finish(verdict)]
            }
            (Ranks::Idle(last), Command::Run) if is_member && may_start && is_new(last) => {
                let start = Action::Start(Arc::clone(order));
                self.ranks = Ranks::Running(wanted);
                vec![start, Action::Tell]
            }
            // Stopped before it was started: from here on it will not be.
            (Ranks::Idle(last), Command::StopSoon | Command::StopNow)
                if is_member && is_new(last) =>
            {
                self.ranks = Ranks::Idle(Some((wanted, Condition::Stopped)));
                vec![Action::Tell]
            }
            (Ranks::Running(mine), Command::StopSoon) if mine == wanted => {
                self.ranks = Ranks::EndingSoon(mine);
                vec![Action::StopSoon]
            }
            (Ranks::Running(mine) | Ranks::EndingSoon(mine), command)
                if mine != wanted || matches!(command, Command::StopNow | Command::Finish(_)) =>
            {
                self.ranks = Ranks::Ending(mine);
                vec![Action::StopNow]
            }
            _ => Vec::new(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FENCE: Duration = Duration::from_secs(3);
    const NOW: Duration = Duration::from_secs(1);

    fn agent() -> Agent {
        Agent::new(1, 7, 2, FENCE, Duration::ZERO)
    }

    fn order(number: u64, generation: u32, command: Command) -> Arc<Order> {
        let member = |node, life| Member { node, life, ranks: 2 };
        let members = vec![member(0, 1), member(1, 7)];
        Arc::new(Order { number, generation, members, command })
    }

    fn start(order: &Arc<Order>) -> [Action; 2] {
        [Action::Start(Arc::clone(order)), Action::Tell]
    }

    #[test]
    fn orders_are_obeyed_once_and_only_forward() {
        let mut agent = agent();
        let run = order(3, 1, Command::Run);
        assert_eq!(agent.obey(Arc::clone(&run), NOW), start(&run));
        assert_eq!(agent.obey(run, NOW), [], "the same again");
        assert_eq!(agent.obey(order(2, 1, Command::StopNow), NOW), [], "an older one");
        assert_eq!(agent.obey(order(4, 1, Command::StopSoon), NOW), [Action::StopSoon]);
        assert_eq!(agent.obey(order(5, 1, Command::StopNow), NOW), [Action::StopNow]);
        assert_eq!(agent.ended(Condition::Well, NOW), [Action::Tell]);
        assert_eq!(agent.status().ran, Some((1, Condition::Stopped)));
        // An agent never starts a generation twice.
        assert_eq!(agent.obey(order(6, 1, Command::Run), NOW), []);
        let next = order(7, 2, Command::Run);
        assert_eq!(agent.obey(Arc::clone(&next), NOW), start(&next));
    }

    #[test]
    fn who_is_no_member_starts_nothing() {
        let mut agent = agent();
        let mut others = (*order(1, 1, Command::Run)).clone();
        others.members[1].life = 6;
        assert_eq!(agent.obey(Arc::new(others), NOW), [], "an earlier life of this node is meant");
    }

    #[test]
    fn a_newer_generation_waits_for_the_end_of_the_older_one() {
        let mut agent = agent();
        agent.obey(order(1, 1, Command::Run), NOW);
        assert_eq!(agent.obey(order(2, 2, Command::Run), NOW), [Action::StopNow]);
        let actions = agent.ended(Condition::Stopped, NOW);
        assert!(
            matches!(&actions[..], [Action::Tell, Action::Start(order), Action::Tell] if order.generation == 2)
        );
    }

    #[test]
    fn ranks_of_a_node_that_is_cut_off_end() {
        let mut agent = agent();
        agent.obey(order(1, 1, Command::Run), NOW);
        agent.arrived(Duration::from_secs(2), 1);
        assert_eq!(agent.tick(Duration::from_millis(4999)), []);
        assert_eq!(agent.tick(Duration::from_secs(5)), [Action::StopNow]);
        assert_eq!(agent.tick(Duration::from_secs(6)), [], "once is enough");
    }

    #[test]
    fn what_it_may_have_missed_it_does_not_start() {
        let mut agent = agent();
        let late = FENCE + NOW;
        assert_eq!(agent.obey(order(1, 1, Command::Run), late), [], "cut off");
        agent.arrived(late, 2);
        assert_eq!(agent.tick(late), [], "there is a newer order");
        assert_eq!(agent.obey(order(2, 1, Command::StopNow), late), [Action::Tell]);
        assert_eq!(agent.status().ran, Some((1, Condition::Stopped)), "it never will");
    }

    #[test]
    fn it_finishes_when_its_ranks_have_ended() {
        let mut agent = agent();
        agent.obey(order(1, 1, Command::Run), NOW);
        let finish = order(2, 1, Command::Finish(Verdict::Well));
        assert_eq!(agent.obey(finish, NOW), [Action::StopNow]);
        let actions = agent.ended(Condition::Well, NOW);
        assert_eq!(actions, [Action::Tell, Action::Finish(Verdict::Well)]);
    }
}
