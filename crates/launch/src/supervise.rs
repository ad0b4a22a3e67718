//! The launcher's loop: output, exits and signals of all ranks, from one thread and one poll.
//!
//! The first rank that fails is the root cause: the others are asked to end (SIGTERM), and killed after a grace. Every
//! process group is killed before its leader's number is given back, so that nothing stays behind.

use std::io::{self, Read as _};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use rustix::event::{poll, PollFd, PollFlags, Timespec};
use rustix::process::Signal;

use crate::error::{system, LaunchError};
use crate::flight::{self, Culprit};
use crate::guard::Guard;
use crate::nodes::Nodes;
use crate::process::{self, Exit};
use crate::rank::{Ended, Rank};
use crate::report::{Failure, RankFailure, Report};
use crate::screen::{Screen, Stream};
use crate::signals::{Meaning, Signals};
use crate::suspect::{Accuses, Suspect};

/// After a kill everything should be gone in no time; a process stuck in the kernel is left to it after this.
const KILL_MAX: Duration = Duration::from_secs(5);
const READ_BYTES: usize = 64 << 10;
/// Reads of one stream before the others get their turn.
const READS_PER_TURN: usize = 8;

/// How far the job's end has come.
#[derive(Clone, Copy, Debug)]
enum Stage {
    Running,
    Ending { kill_at: Instant },
    Killed { give_up_at: Instant },
}

/// The ranks and everything around them.
#[derive(Debug)]
pub(crate) struct Supervisor {
    pub(crate) ranks: Vec<Rank>,
    pub(crate) signals: Signals,
    pub(crate) guard: Guard,
    pub(crate) screen: Screen,
    pub(crate) nodes: Option<Nodes>,
    pub(crate) host: String,
    pub(crate) grace: Duration,
    /// Where the ranks' operations are written when the job fails.
    pub(crate) lineup_path: PathBuf,
    /// How many ranks all nodes have.
    pub(crate) world_size: usize,
    pub(crate) started: Instant,
    state: State,
}

#[derive(Debug)]
struct State {
    stage: Stage,
    suspect: Option<Suspect>,
    failure: Option<Failure>,
    ended_by: Option<i32>,
}

const STREAMS: [Stream; 2] = [Stream::Output, Stream::Error];

impl Supervisor {
    pub(crate) fn new(
        signals: Signals,
        nodes: Option<Nodes>,
        host: String,
        grace: Duration,
    ) -> Self {
        Self {
            ranks: Vec::new(),
            signals,
            guard: Guard::start(),
            screen: Screen::new(),
            nodes,
            host,
            grace,
            lineup_path: PathBuf::new(),
            world_size: 0,
            started: Instant::now(),
            state: State { stage: Stage::Running, suspect: None, failure: None, ended_by: None },
        }
    }

    /// Puts a started rank under supervision.
    pub(crate) fn add(&mut self, rank: Rank) {
        self.guard.watch(rank.process.id());
        self.ranks.push(rank);
    }

    /// Runs until every rank has ended.
    pub(crate) fn run(mut self) -> Result<Report, LaunchError> {
        while self.has_work() {
            self.poll(None)?;
            let now = Instant::now();
            for (signal, meaning, count) in self.signals.pending() {
                self.handle_signal(signal, meaning, count, now);
            }
            for at in 0..self.ranks.len() {
                self.read(at);
            }
            self.collect(now)?;
            self.hear_news(now);
            self.advance(now);
        }
        if self.is_running() {
            self.wait_for_nodes()?;
        }
        if let Some(nodes) = &mut self.nodes {
            nodes.flush();
        }
        self.line_up_nodes();
        if let Some(failure) = &self.state.failure {
            self.screen.write(Stream::Error, format!("{failure}\n").as_bytes());
        }
        let State { failure, ended_by, .. } = &self.state;
        Ok(Report {
            failure: failure.clone(),
            ended_by: *ended_by,
            elapsed: self.started.elapsed(),
        })
    }

    /// After a failure node 0 shows the ranks of all nodes side by side.
    fn line_up_nodes(&mut self) {
        let Some(nodes) = self.nodes.as_ref().filter(|_| self.state.failure.is_some()) else {
            return;
        };
        let is_here = |number: &usize| self.ranks.iter().any(|rank| rank.number == *number);
        let others = nodes.gather((0..self.world_size).filter(|number| !is_here(number)));
        if others.is_empty() {
            return;
        }
        let own = self.ranks.iter().filter_map(Rank::record);
        let mut all: Vec<_> = own.chain(others).collect();
        all.sort_unstable_by_key(|record| record.rank);
        if let Some(said) = flight::line_up_nodes(&all, &self.lineup_path) {
            self.notice(&said);
        }
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
            self.poll(Some(done.as_fd()))?;
            for (signal, meaning, _) in self.signals.pending() {
                if meaning == Meaning::End {
                    self.state.ended_by = Some(signal.as_raw());
                    return Ok(());
                }
            }
            let news = self.nodes.as_ref().and_then(Nodes::news);
            if news.is_some() || is_readable(&done)? {
                // What happens elsewhere does not change that the ranks of another node have ended well.
                self.state.failure = news.filter(|_| hosts_store);
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
        self.ranks
            .iter()
            .any(|rank| rank.ended.is_none() || rank.process.streams.iter().any(Option::is_some))
    }

    /// Waits for a signal, news, output, an exit, `also`, or the next deadline.
    fn poll(&self, also: Option<BorrowedFd<'_>>) -> Result<(), LaunchError> {
        let mut fds: Vec<BorrowedFd<'_>> = self.signals.fds().collect();
        fds.extend(self.nodes.iter().filter(|_| self.is_running()).map(Nodes::fd));
        for rank in &self.ranks {
            if rank.ended.is_none() {
                fds.push(rank.process.pidfd.as_fd());
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
            Stage::Ending { kill_at } => Some(kill_at),
            Stage::Killed { give_up_at } => Some(give_up_at),
        };
        let drains = self.ranks.iter().filter_map(Rank::drain_until);
        let suspect = self.state.suspect.filter(|_| self.is_running());
        drains.chain(stage).chain(suspect.map(|suspect| suspect.decide_at)).min()
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
                let again = self.state.ended_by.is_some() || count > 1;
                self.state.ended_by.get_or_insert(signal.as_raw());
                // Schedulers send SIGTERM repeatedly; a person who presses Ctrl-C twice means it.
                if again && signal == Signal::INT {
                    self.kill(now);
                    return;
                }
                self.signal_all(signal);
                if self.is_running() {
                    let (name, grace) = (crate::signals::name(signal.as_raw()), self.grace);
                    if let Some(nodes) = &self.nodes {
                        nodes.announce_end(signal.as_raw());
                    }
                    self.notice(&format!(
                        "{name}: the ranks have {} s to end; Ctrl-C (again) kills them at once",
                        grace.as_secs_f64()
                    ));
                    self.state.stage = Stage::Ending { kill_at: now + grace };
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

    fn signal_all(&self, signal: Signal) {
        for rank in self.ranks.iter().filter(|rank| rank.ended.is_none()) {
            rank.process.signal_group(signal);
        }
    }

    fn kill(&mut self, now: Instant) {
        self.signal_all(Signal::KILL);
        self.state.stage = Stage::Killed { give_up_at: now + KILL_MAX };
    }

    /// Reads what a rank has written, and shows it.
    fn read(&mut self, at: usize) {
        let mut buffer = vec![0; READ_BYTES];
        for (which, stream) in STREAMS.into_iter().enumerate() {
            for _ in 0..READS_PER_TURN {
                let rank = &mut self.ranks[at];
                let Some(file) = &mut rank.process.streams[which] else { break };
                let count = match file.read(&mut buffer) {
                    Ok(count) => count,
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                    Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                    // A pseudo-terminal whose other end is closed answers EIO: that is its end of file.
                    Err(_) => 0,
                };
                if count == 0 {
                    self.close(at, which);
                    break;
                }
                rank.keep(stream, &buffer[..count]);
                let shown = rank.lines[which].push(&buffer[..count]);
                self.show(stream, &shown, at);
            }
        }
    }

    fn close(&mut self, at: usize, which: usize) {
        self.ranks[at].process.streams[which] = None;
        let rest = self.ranks[at].lines[which].finish();
        self.show(STREAMS[which], &rest, at);
    }

    /// Writes to the screen; a progress bar of another stream that stands there is cleared first, and redraws itself.
    fn show(&mut self, stream: Stream, bytes: &[u8], from: usize) {
        if bytes.is_empty() {
            return;
        }
        for (at, rank) in self.ranks.iter_mut().enumerate() {
            let is_itself = at == from && stream == Stream::Error;
            if rank.lines[1].is_inside_line() && !is_itself && Screen::is_terminal(stream) {
                self.screen.write(Stream::Error, b"\r\x1b[2K");
                rank.lines[1].line_was_cleared();
            }
        }
        self.screen.write(stream, bytes);
    }

    fn notice(&mut self, line: &str) {
        for rank in &mut self.ranks {
            if rank.lines[1].is_inside_line() {
                self.screen.write(Stream::Error, b"\n");
                rank.lines[1].line_was_cleared();
            }
        }
        self.screen.notice(line);
    }

    /// Collects the ranks that have ended, and finds the root cause among those that failed.
    fn collect(&mut self, now: Instant) -> Result<(), LaunchError> {
        for at in 0..self.ranks.len() {
            if self.ranks[at].ended.is_none() {
                if let Some(exit) = self.ranks[at].process.collect()? {
                    let clock_ns = flight::clock_ns();
                    self.ranks[at].ended = Some(Ended { exit, at: now, clock_ns });
                    self.read(at);
                    self.suspect(at, exit, now);
                }
            }
            if self.ranks[at].drain_until().is_some_and(|until| until <= now) {
                self.close(at, 0);
                self.close(at, 1);
            }
        }
        let all_ended = self.ranks.iter().all(|rank| rank.ended.is_some());
        let is_due =
            |suspect: &Suspect| all_ended && !suspect.is_of_elsewhere || suspect.decide_at <= now;
        if let Some(suspect) = self.state.suspect.filter(is_due).filter(|_| self.is_running()) {
            self.blame(suspect.at, now);
        }
        Ok(())
    }

    fn suspect(&mut self, at: usize, exit: Exit, now: Instant) {
        let record = self.ranks[at].record();
        let accused = record.as_ref().map(|it| flight::accused(it, &self.ranks, self.world_size));
        let accuses = match accused {
            None => Accuses::Unknown,
            Some(None) => Accuses::Nobody,
            Some(Some(Culprit::Here(_))) => Accuses::Here,
            Some(Some(Culprit::Elsewhere(_))) => Accuses::Elsewhere,
        };
        self.state.suspect = Suspect::likelier(self.state.suspect, at, exit, accuses, now);
    }

    /// Decides that this rank is the root cause, and ends the others.
    fn blame(&mut self, at: usize, now: Instant) {
        let failure = self.failure_of(at);
        let left = self.ranks.iter().filter(|rank| rank.ended.is_none()).count();
        if left > 0 {
            self.notice(&format!("rank {} failed; ending the others ({left})", failure.rank));
        }
        let line = failure.to_string();
        let report = Report {
            failure: Some(Failure::Rank(failure)),
            ended_by: None,
            elapsed: self.started.elapsed(),
        };
        if let Some(nodes) = &self.nodes {
            nodes.announce(&line, report.code());
        }
        self.fail(report.failure, now);
    }

    fn failure_of(&mut self, suspect: usize) -> RankFailure {
        let finding = flight::investigate(&self.ranks, suspect, self.world_size, &self.lineup_path);
        let evidence = Box::new(finding.evidence);
        let (started, now) = (self.started, Instant::now());
        let after = |ended: Option<Ended>| ended.map_or(now, |end| end.at).duration_since(started);
        match finding.culprit {
            Culprit::Elsewhere(number) => {
                RankFailure::elsewhere(number, after(self.ranks[suspect].ended), evidence)
            }
            Culprit::Here(at) => {
                let rank = &mut self.ranks[at];
                RankFailure {
                    rank: rank.number,
                    process: Some((self.host.clone(), rank.process.id())),
                    exit: rank.ended.map_or(Exit::Not, |end| end.exit),
                    after: after(rank.ended),
                    last_lines: rank.tail.lines(),
                    evidence,
                }
            }
        }
    }

    fn hear_news(&mut self, now: Instant) {
        if !self.is_running() {
            return;
        }
        if let Some(news) = self.nodes.as_ref().and_then(Nodes::news) {
            self.notice("another node failed; ending the ranks of this one");
            self.fail(Some(news), now);
        }
    }

    fn fail(&mut self, failure: Option<Failure>, now: Instant) {
        self.state.failure = failure;
        // As it is before the others are told to end.
        if let Some(nodes) = &self.nodes {
            nodes.publish(&self.ranks);
        }
        self.signal_all(Signal::TERM);
        // A stopped process takes SIGTERM only when it continues.
        self.signal_all(Signal::CONT);
        self.state.stage = Stage::Ending { kill_at: now + self.grace };
    }

    fn advance(&mut self, now: Instant) {
        if let Stage::Ending { kill_at } = self.state.stage {
            let left = self.ranks.iter().filter(|rank| rank.ended.is_none()).count();
            if left > 0 && now >= kill_at {
                let grace = self.grace.as_secs_f64();
                self.notice(&format!("{left} ranks did not end within {grace} s: killed"));
                self.kill(now);
            }
        }
    }
}

fn is_readable(stream: &UnixStream) -> Result<bool, LaunchError> {
    let mut fds = [PollFd::new(stream, PollFlags::IN)];
    let now = Timespec { tv_sec: 0, tv_nsec: 0 };
    poll(&mut fds, Some(&now)).map(|count| count > 0).map_err(system("poll"))
}

impl Drop for Supervisor {
    /// Whatever went wrong: no rank outlives its launcher.
    fn drop(&mut self) {
        let left: Vec<&Rank> = self.ranks.iter().filter(|rank| rank.ended.is_none()).collect();
        for rank in &left {
            rank.process.signal_group(Signal::KILL);
        }
        let deadline = Instant::now() + KILL_MAX;
        for rank in left {
            rank.process.wait_until(deadline);
        }
    }
}
