//! A launcher under test: started, listened to, and never left running.
#![allow(dead_code, reason = "each test file uses its part")]

use std::io::{BufRead as _, BufReader, Read};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{self, Receiver};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{kill_process, Pid, Signal};

/// Longer than anything takes on a busy machine, and far shorter than what ranks wait for that nobody ends.
pub(crate) const LIMIT: Duration = Duration::from_secs(60);

/// A launcher and what it says.
pub(crate) struct Job {
    pub(crate) child: Child,
    pub(crate) output: Receiver<String>,
    pub(crate) errors: Receiver<String>,
}

/// What a finished launcher has said.
pub(crate) struct Finished {
    pub(crate) code: Option<i32>,
    pub(crate) output: Vec<String>,
    pub(crate) errors: Vec<String>,
}

fn lines_of(stream: impl Read + Send + 'static) -> Receiver<String> {
    let (sender, receiver) = mpsc::channel();
    thread::spawn(move || {
        for line in BufReader::new(stream).lines().map_while(Result::ok) {
            if sender.send(line).is_err() {
                return;
            }
        }
    });
    receiver
}

/// The test rank under its own launcher, with a clean environment.
pub(crate) fn command(args: &str) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_launch-test-rank"));
    command.args(args.split_whitespace()).stdin(Stdio::null());
    for name in ["RANK", "WORLD_SIZE", "MASTER_ADDR", "OMP_NUM_THREADS", "PHALANX_JOB_TOKEN"] {
        command.env_remove(name);
    }
    command
}

impl Job {
    pub(crate) fn start(args: &str) -> Self {
        Self::of(command(args))
    }

    pub(crate) fn of(mut command: Command) -> Self {
        let mut child = command
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("the test rank was built");
        let output = lines_of(child.stdout.take().expect("a pipe"));
        let errors = lines_of(child.stderr.take().expect("a pipe"));
        Self { child, output, errors }
    }

    /// The next `count` numbers that ranks print after `word`.
    pub(crate) fn numbers(&self, word: &str, count: usize) -> Vec<i32> {
        let mut numbers = Vec::new();
        while numbers.len() < count {
            let line = self.output.recv_timeout(LIMIT).expect("the ranks say so");
            if let Some((_, number)) = line.split_once(&format!("{word} ")) {
                numbers.push(number.trim().parse().expect("a number"));
            }
        }
        numbers
    }

    pub(crate) fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.child), signal).expect("the launcher lives");
    }

    pub(crate) fn status(&mut self) -> ExitStatus {
        let deadline = Instant::now() + LIMIT;
        while Instant::now() < deadline {
            if let Some(status) = self.child.try_wait().expect("our own child") {
                return status;
            }
            thread::park_timeout(Duration::from_millis(2));
        }
        let said = |lines: &Receiver<String>| lines.try_iter().collect::<Vec<_>>();
        let (output, errors) = (said(&self.output), said(&self.errors));
        panic!("the launcher did not end within {LIMIT:?}: {output:#?} {errors:#?}");
    }

    /// Kills the launcher, as nothing else can: it says nothing to anybody.
    pub(crate) fn kill(mut self) {
        self.signal(Signal::KILL);
        assert_eq!(self.status().code(), None);
    }

    pub(crate) fn finish(mut self) -> Finished {
        let code = self.status().code();
        let rest = |lines: &Receiver<String>| {
            let mut all = Vec::new();
            while let Ok(line) = lines.recv_timeout(LIMIT) {
                all.push(line);
            }
            all
        };
        Finished { code, output: rest(&self.output), errors: rest(&self.errors) }
    }
}

impl Drop for Job {
    fn drop(&mut self) {
        // A test that failed leaves nothing running; one that passed has nothing left.
        if let Err(error) = self.child.kill().and_then(|()| self.child.wait()) {
            panic!("our own child: {error}");
        }
    }
}

impl Finished {
    pub(crate) fn report(&self) -> &str {
        let is_report = |line: &&String| line.starts_with("error[PHX");
        let reports: Vec<_> = self.errors.iter().filter(is_report).collect();
        assert_eq!(reports.len(), 1, "one line per failure: {:#?}", self.errors);
        reports[0]
    }
}

/// Whether a process is there and more than a corpse that nobody collected.
pub(crate) fn lives(pid: i32) -> bool {
    let Ok(stat) = std::fs::read_to_string(format!("/proc/{pid}/stat")) else { return false };
    let state = stat.rsplit_once(") ").and_then(|(_, rest)| rest.chars().next());
    !matches!(state, Some('Z' | 'X') | None)
}

/// Waits until no such process is left; with no limit there must be none.
pub(crate) fn assert_gone(pids: &[i32], limit: Duration) {
    let deadline = Instant::now() + limit;
    while pids.iter().any(|&pid| lives(pid)) {
        assert!(Instant::now() < deadline, "still there: {pids:?}");
        thread::park_timeout(Duration::from_millis(5));
    }
}

pub(crate) fn sorted(mut lines: Vec<String>) -> Vec<String> {
    lines.sort();
    lines
}
