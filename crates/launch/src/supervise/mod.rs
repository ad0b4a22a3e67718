//! The launcher's loop: output, exits and signals of all ranks, from one thread and one poll.
//!
//! The first rank that fails is the root cause: the others are asked to end (SIGTERM), and killed after a grace, a short
//! one if they are to be started again. Every process group is killed before its leader's number is given back, so that
//! nothing stays behind.
//!
//! | file | what |
//! |---|---|
//! | `mod` | the loop: what is waited for, signals, how far the end has come |
//! | `blame` | who has ended, which of them is the cause, and what follows |
//! | `orders` | what node 0 wants of this node's ranks in an elastic job |
//! | `output` | what the ranks say |
//! | `staying` | ranks that wait for the next generation |

mod blame;
mod orders;
mod output;
mod staying;

use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use phalanx_comm::recorder;
use rustix::event::{poll, PollFd, PollFlags, Timespec};
use rustix::process::Signal;

use crate::elastic::Link;
use crate::error::{system, LaunchError};
use crate::guard::Guard;
use crate::nodes::Nodes;
use crate::out_of_memory::{self, MemoryWatch};
use crate::process;
use crate::rank::{Rank, Staying};
use crate::report::Failure;
use crate::restart::{Decision, Policy};
use crate::screen::Screen;
use crate::signals::{Meaning, Signals};
use crate::stay::Channel;
use crate::suspect::Suspect;

/// After a kill everything should be gone in no time; a process stuck in the kernel is left to it after this.
pub(crate) const KILL_MAX: Duration = Duration::from_secs(5);
/// What ranks that are to be started again get instead of the grace: their group is dead, and there is nothing to save.
/// One that is committing a checkpoint gets the grace all the same.
const RESTART_GRACE: Duration = Duration::from_millis(100);
/// How often ranks are looked at whose memory alone says what they are at.
const LOOK_EVERY: Duration = Duration::from_millis(2);
/// How often ranks are asked what they have in memory.
const MEMORY_LOOK_EVERY: Duration = Duration::from_secs(1);
/// How often a node of an elastic job looks whether it is cut off.
const LINK_LOOK_EVERY: Duration = Duration::from_millis(500);

/// How far the job's end has come.
#[derive(Clone, Copy, Debug)]
enum Stage {
    Running,
    /// Who is committing, or is expected to stay, has until `patience`, the others until `kill_at`.
    Ending {
        kill_at: Instant,
        patience: Instant,
    },
    Killed {
        give_up_at: Instant,
    },
}

/// Whether this node may leave its job, and does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Leaving {
    MayNot,
    May,
    Does,
}

/// The ranks and everything around them.
#[derive(Debug)]
pub(crate) struct Supervisor {
    pub(crate) ranks: Vec<Rank>,
    /// Those that the last generation has left, and that have no place yet.
    kept: Vec<Rank>,
    pub(crate) signals: Signals,
    pub(crate) guard: Guard,
    pub(crate) screen: Screen,
    pub(crate) nodes: Option<Nodes>,
    /// In an elastic job: what decides about this node's ranks.
    pub(crate) link: Option<Link>,
    pub(crate) leaving: Leaving,
    /// Which generation of ranks runs.
    pub(crate) generation: u32,
    pub(crate) host: String,
    pub(crate) grace: Duration,
    pub(crate) policy: Policy,
    /// Where the ranks' operations are written when they fail.
    pub(crate) lineup_path: PathBuf,
    /// How many ranks all nodes have.
    pub(crate) world_size: usize,
    /// When the first attempt began.
    pub(crate) begun: Instant,
    /// When this attempt began.
    started: Instant,
    memory: MemoryWatch,
    /// When the ranks are asked next what they have in memory.
    memory_look_at: Instant,
    state: AttemptState,
}

#[derive(Debug)]
struct AttemptState {
    stage: Stage,
    suspect: Option<Suspect>,
    /// The ranks end in order to be started again.
    is_hasty: bool,
    end: AttemptEnd,
}

/// How an attempt ended.
#[derive(Clone, Debug, Default)]
pub(crate) struct AttemptEnd {
    /// What was wrong first, if anything was.
    pub(crate) failure: Option<Failure>,
    /// What is done about the failure.
    pub(crate) decision: Option<Decision>,
    /// The signal that the user ended the job with.
    pub(crate) ended_by: Option<i32>,
    /// The furthest step that a rank of this launcher had told when the failure came.
    pub(crate) step: Option<u64>,
    /// The ranks of a node in an elastic job were asked to stop.
    pub(crate) was_stopped: bool,
}

impl AttemptState {
    fn new() -> Self {
        let end = AttemptEnd::default();
        Self { stage: Stage::Running, suspect: None, is_hasty: false, end }
    }
}

impl Supervisor {
    pub(crate) fn new(
        signals: Signals,
        nodes: Option<Nodes>,
        grace: Duration,
        policy: Policy,
    ) -> Self {
        let now = Instant::now();
        Self {
            ranks: Vec::new(),
            kept: Vec::new(),
            signals,
            guard: Guard::start(),
            screen: Screen::new(),
            nodes,
            link: None,
            leaving: Leaving::MayNot,
            generation: 0,
            host: rustix::system::uname().nodename().to_string_lossy().into_owned(),
            grace,
            policy,
            lineup_path: PathBuf::new(),
            world_size: 0,
            begun: now,
            started: now,
            memory: MemoryWatch::new(),
            memory_look_at: now,
            state: AttemptState::new(),
        }
    }

    /// A new attempt begins; of the one before, all ranks have ended, or wait for this one.
    pub(crate) fn begin(&mut self, world_size: usize, lineup_path: PathBuf) {
        self.kept = std::mem::take(&mut self.ranks).into_iter().filter(Rank::waits).collect();
        self.guard.forget();
        self.state = AttemptState::new();
        self.started = Instant::now();
        self.memory.begin();
        self.memory_look_at = self.started;
        self.world_size = world_size;
        self.lineup_path = lineup_path;
    }

    /// Puts a started rank under supervision.
    pub(crate) fn add(&mut self, rank: Rank) {
        self.guard.watch(rank.process.id());
        self.ranks.push(rank);
    }

    /// Runs until every rank has ended, or waits for the next generation.
    pub(crate) fn run(&mut self) -> Result<AttemptEnd, LaunchError> {
        self.hear_orders(Instant::now());
        while self.has_work() {
            self.poll(&self.ranks, None)?;
            let now = Instant::now();
            for (signal, meaning, count) in self.signals.pending() {
                self.handle_signal(signal, meaning, count, now);
            }
            for at in 0..self.ranks.len() {
                self.read(at);
            }
            self.hear_ranks(now);
            self.look_at_memory(now);
            self.collect(now)?;
            self.hear_news(now);
            self.hear_orders(now);
            self.advance(now);
        }
        if self.is_running() {
            self.wait_for_nodes()?;
        }
        if let Some(nodes) = &mut self.nodes {
            nodes.flush();
        }
        self.line_up_nodes();
        Ok(self.state.end.clone())
    }

    /// So that the report of one that is killed for lack of memory can say how much it had.
    fn look_at_memory(&mut self, now: Instant) {
        if now < self.memory_look_at {
            return;
        }
        self.memory_look_at = now + MEMORY_LOOK_EVERY;
        for rank in self.ranks.iter_mut().filter(|rank| rank.ended.is_none()) {
            let resident = out_of_memory::resident_bytes(rank.process.id());
            rank.resident_bytes = resident.or(rank.resident_bytes);
        }
    }

    /// How many ranks the last generation has left, that wait for a place.
    pub(crate) fn kept_count(&self) -> usize {
        self.kept.len()
    }

    /// Between two generations of an elastic job: waits for an order, a signal, or a little while.
    pub(crate) fn wait_for_orders(&self) -> Result<(), LaunchError> {
        self.poll(&[], None)
    }

    /// A rank was killed and has not ended: it is stuck in the kernel. No other attempt may run beside it.
    pub(crate) fn has_left_behind(&mut self) -> bool {
        let stuck: Vec<usize> =
            self.ranks.iter().filter(|rank| !rank.is_done()).map(|rank| rank.number).collect();
        if !stuck.is_empty() {
            self.notice(&format!("not started again: ranks {stuck:?} were killed and do not end"));
        }
        !stuck.is_empty()
    }

    /// Whether the user has asked for the end between two attempts.
    pub(crate) fn is_interrupted(&self) -> Option<i32> {
        let pending = self.signals.pending();
        let end = pending.iter().find(|(_, meaning, _)| *meaning == Meaning::End);
        end.map(|(signal, ..)| signal.as_raw())
    }

    /// All ranks of this node have ended well; node 0 stays for the others, whose store it hosts.
    fn wait_for_nodes(&mut self) -> Result<(), LaunchError> {
        let Some(nodes) = &self.nodes else { return Ok(()) };
        let (done, hosts_store) = (nodes.finish()?, nodes.is_first());
        if hosts_store {
            self.screen
                .notice("the ranks of this node have ended; waiting for those of the other nodes");
        }
        loop {
            self.poll(&self.ranks, Some(done.as_fd()))?;
            for (signal, meaning, _) in self.signals.pending() {
                if meaning == Meaning::End {
                    self.state.end.ended_by = Some(signal.as_raw());
                    return Ok(());
                }
            }
            let news = self.nodes.as_ref().and_then(Nodes::news);
            if news.is_some() || is_readable(&done)? {
                // What happens elsewhere does not change that the ranks of another node have ended well.
                self.state.end.failure = news.filter(|_| hosts_store);
                return Ok(());
            }
        }
    }

    /// Ranks that live, streams that may still bring something, or a suspect who is not yet judged.
    fn has_work(&self) -> bool {
        if let Stage::Killed { give_up_at } = self.state.stage {
            if Instant::now() >= give_up_at {
                return false;
            }
        }
        if self.is_running() && self.state.suspect.is_some() {
            return true;
        }
        let speaks = |rank: &Rank| rank.process.streams.iter().any(Option::is_some);
        self.ranks.iter().any(|rank| !rank.waits() && (rank.ended.is_none() || speaks(rank)))
    }

    /// Waits for a signal, news, output or an exit of `ranks`, `also`, or the next deadline.
    fn poll(&self, ranks: &[Rank], also: Option<BorrowedFd<'_>>) -> Result<(), LaunchError> {
        let mut fds: Vec<BorrowedFd<'_>> = self.signals.fds().collect();
        fds.extend(self.nodes.iter().filter(|_| self.is_running()).map(Nodes::fd));
        fds.extend(self.link.iter().map(Link::fd));
        for rank in ranks {
            if rank.ended.is_none() {
                fds.push(rank.process.pidfd.as_fd());
                fds.extend(rank.channel.iter().map(Channel::fd));
            }
            fds.extend(rank.process.streams.iter().flatten().map(AsFd::as_fd));
        }
        fds.extend(also);
        let mut fds: Vec<PollFd<'_>> =
            fds.into_iter().map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN)).collect();
        let timeout = self.next_deadline().map(process::timespec_until);
        match poll(&mut fds, timeout.as_ref()) {
            Ok(_) | Err(rustix::io::Errno::INTR) => Ok(()),
            Err(errno) => Err(system("poll")(errno)),
        }
    }

    const fn is_running(&self) -> bool {
        matches!(self.state.stage, Stage::Running)
    }

    fn next_deadline(&self) -> Option<Instant> {
        let stage = match self.state.stage {
            Stage::Running => None,
            Stage::Ending { kill_at, .. } => Some(kill_at),
            Stage::Killed { give_up_at } => Some(give_up_at),
        };
        // Of nobody, when all have ended.
        let stage = stage.filter(|_| self.ranks.iter().any(|rank| !rank.is_done()));
        let drains = self.ranks.iter().filter_map(Rank::drain_until);
        let suspect = self.state.suspect.filter(|_| self.is_running());
        let decision = suspect.map(|suspect| {
            let next_look = Instant::now() + LOOK_EVERY;
            if suspect.is_cause() {
                suspect.decide_at.min(next_look)
            } else {
                suspect.decide_at
            }
        });
        let look = self.link.as_ref().map(|_| Instant::now() + LINK_LOOK_EVERY);
        let memory = self.ranks.iter().any(|rank| !rank.is_done()).then_some(self.memory_look_at);
        drains.chain(stage).chain(decision).chain(look).chain(memory).min()
    }

    fn handle_signal(&mut self, signal: Signal, meaning: Meaning, count: usize, now: Instant) {
        match meaning {
            Meaning::Forward => self.signal_all(signal),
            Meaning::Resize => self.resize(),
            Meaning::Suspend => {
                self.signal_all(Signal::STOP);
                let me = rustix::process::getpid();
                if let Err(errno) = rustix::process::kill_process(me, Signal::STOP) {
                    tracing::debug!(%errno, "could not stop");
                }
            }
            Meaning::End => {
                let again = self.state.end.ended_by.is_some() || count > 1;
                self.state.end.ended_by.get_or_insert(signal.as_raw());
                // Schedulers send SIGTERM repeatedly; a person who presses Ctrl-C twice means it.
                if again && signal == Signal::INT {
                    self.kill(now);
                    return;
                }
                self.ask_to_stop();
                self.wish_for_end(signal);
                self.signal_all(signal);
                self.dismiss_all();
                if self.is_running() {
                    let (name, grace) = (crate::signals::name(signal.as_raw()), self.grace);
                    if let Some(nodes) = &self.nodes {
                        nodes.announce_end(signal.as_raw());
                    }
                    self.notice(&format!(
                        "{name}: the ranks have {} s to end; Ctrl-C (again) kills them at once",
                        grace.as_secs_f64()
                    ));
                    let kill_at = now + grace;
                    self.state.stage = Stage::Ending { kill_at, patience: kill_at };
                }
            }
        }
    }

    fn resize(&self) {
        for rank in &self.ranks {
            if let Some(terminal) = &rank.process.streams[1] {
                process::resize(terminal);
                rank.process.signal_group(Signal::WINCH);
            }
        }
    }

    /// Those of whom something is still to come.
    fn signal_all(&self, signal: Signal) {
        for rank in self.ranks.iter().filter(|rank| !rank.is_done()) {
            rank.process.signal_group(signal);
        }
    }

    /// So that programs that look at [`crate::should_stop`] end at the next step.
    fn ask_to_stop(&self) {
        for rank in &self.ranks {
            if let Err(error) = recorder::ask_to_stop(&rank.flight) {
                tracing::debug!(rank = rank.number, %error, "it is not asked to stop");
            }
        }
    }

    fn kill(&mut self, now: Instant) {
        self.signal_all(Signal::KILL);
        self.state.stage = Stage::Killed { give_up_at: now + KILL_MAX };
    }

    fn advance(&mut self, now: Instant) {
        let Stage::Ending { kill_at, patience } = self.state.stage else { return };
        let left = self.ranks.iter().filter(|rank| !rank.is_done());
        if now < kill_at || left.clone().count() == 0 {
            return;
        }
        let is_busy =
            |rank: &Rank| rank.staying == Staying::Expected || rank.vitals().is_committing;
        let (busy, others): (Vec<&Rank>, Vec<&Rank>) =
            left.partition(|rank| now < patience && is_busy(rank));
        if !busy.is_empty() {
            for rank in others {
                rank.process.signal_group(Signal::KILL);
            }
            let next_look = patience.min(now + LOOK_EVERY);
            self.state.stage = Stage::Ending { kill_at: next_look, patience };
            return;
        }
        if !self.state.is_hasty || now >= patience {
            let (count, grace) = (others.len(), self.grace.as_secs_f64());
            self.notice(&format!("{count} ranks did not end within {grace} s: killed"));
        }
        self.kill(now);
    }
}

fn is_readable(stream: &UnixStream) -> Result<bool, LaunchError> {
    let mut fds = [PollFd::new(stream, PollFlags::IN)];
    let now = Timespec { tv_sec: 0, tv_nsec: 0 };
    poll(&mut fds, Some(&now)).map(|count| count > 0).map_err(system("poll"))
}

impl Supervisor {
    /// Kills what there is, and waits for its end.
    pub(crate) fn kill_all(&self) {
        let all = self.ranks.iter().chain(&self.kept);
        let left: Vec<&Rank> = all.filter(|rank| rank.ended.is_none()).collect();
        for rank in &left {
            rank.process.signal_group(Signal::KILL);
        }
        let deadline = Instant::now() + KILL_MAX;
        for rank in left {
            rank.process.wait_until(deadline);
        }
    }
}

impl Drop for Supervisor {
    /// Whatever went wrong: no rank outlives its launcher.
    fn drop(&mut self) {
        self.kill_all();
    }
}
