//! Ranks as processes: this test binary started again, once for each rank, to run `rank_process`.

use std::io::{Read, Write as _};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use crate::faults::LIMIT;
use phalanx_comm::testing::free_port;
use rustix::process::{kill_process, Pid, Signal};

/// What a rank's process runs: the value of this variable.
pub(crate) const ROLE: &str = "PHALANX_TEST_ROLE";

/// The processes of a world. Dropping kills what is left of them.
pub(crate) struct Ranks {
    children: Vec<Child>,
}

/// The machine's monotonic clock, which all processes share.
pub(crate) fn clock_ns() -> u64 {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    u64::try_from(time.tv_sec * 1_000_000_000 + time.tv_nsec).expect("after the boot")
}

/// How a rank ended.
#[derive(Debug)]
pub(crate) struct Ended {
    pub(crate) status: std::process::ExitStatus,
    pub(crate) output: String,
}

impl Ended {
    /// When the rank got its error.
    pub(crate) fn error_ns(&self) -> u64 {
        self.time_ns("error at ")
    }

    /// The time that it printed after these words.
    pub(crate) fn time_ns(&self, words: &str) -> u64 {
        let text = self.output.split_once(words).and_then(|(_, rest)| rest.split_once(" ns"));
        let (number, _) = text.unwrap_or_else(|| panic!("no {words}: {}", self.output));
        number.parse().expect("a number")
    }
}

/// The environment of a rank of a job on one machine.
pub(crate) fn rank_environment(
    command: &mut Command,
    role: &str,
    rank: usize,
    world: usize,
    port: u16,
) {
    let token = format!("{:064x}", u128::from(std::process::id()) << 16 | u128::from(port));
    command.args(["--exact", "rank_process", "--ignored", "--nocapture", "--test-threads", "1"]);
    command.env(ROLE, role).env("RUST_BACKTRACE", "0");
    command.env("RANK", rank.to_string()).env("LOCAL_RANK", rank.to_string());
    command.env("WORLD_SIZE", world.to_string()).env("LOCAL_WORLD_SIZE", world.to_string());
    command.env("MASTER_ADDR", "127.0.0.1").env("MASTER_PORT", port.to_string());
    command.env("PHALANX_JOB_TOKEN", token);
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
}

/// Waits until there is something to read, or the end of it; panics at `end`.
fn wait_to_read(pipe: &impl std::os::fd::AsFd, end: Instant) {
    let left = end.saturating_duration_since(Instant::now());
    let left = rustix::time::Timespec::try_from(left).expect("short");
    let mut watched = [rustix::event::PollFd::new(pipe, rustix::event::PollFlags::IN)];
    let ready = rustix::event::poll(&mut watched, Some(&left)).expect("poll");
    assert!(ready > 0, "a rank has said nothing more for {LIMIT:?}");
}

impl Ranks {
    /// Starts `world` ranks on this machine, over `link`.
    pub(crate) fn start(role: &str, world: usize, link: &str) -> Self {
        let program = std::env::current_exe().expect("this test's own path");
        let port = free_port();
        let start = |rank| {
            let mut command = Command::new(&program);
            rank_environment(&mut command, role, rank, world, port);
            command.env("PHALANX_HOST_LINK", link).spawn().expect("a rank starts")
        };
        Self { children: (0..world).map(start).collect() }
    }

    pub(crate) fn of(children: Vec<Child>) -> Self {
        Self { children }
    }

    pub(crate) fn pid(&self, rank: usize) -> u32 {
        self.children[rank].id()
    }

    /// Waits until `rank` has printed a line that contains `text`.
    pub(crate) fn wait_for_line(&mut self, rank: usize, text: &str) {
        let stdout = self.children[rank].stdout.as_mut().expect("stdout is piped");
        let end = Instant::now() + LIMIT;
        let mut line = Vec::new();
        let mut byte = [0];
        loop {
            wait_to_read(stdout, end);
            if stdout.read(&mut byte).expect("the pipe") == 0 {
                break;
            }
            if byte[0] == b'\n' {
                if String::from_utf8_lossy(&line).contains(text) {
                    return;
                }
                line.clear();
            } else {
                line.push(byte[0]);
            }
        }
        panic!("rank {rank} ended without printing {text:?}");
    }

    /// Writes a line to the input of `rank`.
    pub(crate) fn say(&mut self, rank: usize, line: &str) {
        let stdin = self.children[rank].stdin.as_mut().expect("stdin is piped");
        stdin.write_all(line.as_bytes()).expect("the rank lives");
    }

    pub(crate) fn signal(&self, rank: usize, signal: Signal) {
        kill_process(Pid::from_child(&self.children[rank]), signal).expect("the rank lives");
    }

    pub(crate) fn kill(&mut self, rank: usize) {
        self.children[rank].kill().expect("kill -9");
    }

    /// Waits for every rank to end.
    pub(crate) fn finish(self, limit: Duration) -> Vec<Ended> {
        self.finish_without(None, limit)
    }

    /// As [`Ranks::finish`]; rank `stopped` cannot end by itself and is killed once the others have ended.
    pub(crate) fn finish_without(mut self, stopped: Option<usize>, limit: Duration) -> Vec<Ended> {
        let start = Instant::now();
        let mut ended: Vec<Option<std::process::ExitStatus>> = vec![None; self.children.len()];
        while ended.iter().any(Option::is_none) {
            let is_left = |(rank, end): (usize, &Option<_>)| end.is_none() && Some(rank) != stopped;
            if let (Some(stopped), false) = (stopped, ended.iter().enumerate().any(is_left)) {
                self.kill(stopped);
            }
            if start.elapsed() > limit {
                self.fail(&ended);
            }
            for (child, slot) in self.children.iter_mut().zip(&mut ended) {
                if slot.is_none() {
                    *slot = child.try_wait().expect("wait");
                }
            }
            // A short sleep without std::thread::sleep: nobody sends.
            let (_sender, receiver) = std::sync::mpsc::channel::<()>();
            assert!(receiver.recv_timeout(Duration::from_millis(2)).is_err());
        }
        let mut all = Vec::new();
        for (child, slot) in self.children.iter_mut().zip(ended) {
            all.push(Ended { status: slot.expect("ended"), output: output_of(child) });
        }
        self.children.clear();
        all
    }

    /// Ends all ranks, and shows what they have said.
    fn fail(&mut self, ended: &[Option<std::process::ExitStatus>]) -> ! {
        for child in &mut self.children {
            drop((child.kill(), child.wait()));
        }
        let said: Vec<String> = self.children.iter_mut().map(output_of).collect();
        panic!("some ranks have not ended: {ended:?}\n{said:#?}");
    }
}

/// What a rank that has ended has said.
fn output_of(child: &mut Child) -> String {
    let mut output = String::new();
    for pipe in [
        child.stdout.take().map(|p| Box::new(p) as Box<dyn Read>),
        child.stderr.take().map(|p| Box::new(p) as Box<dyn Read>),
    ] {
        pipe.expect("piped").read_to_string(&mut output).expect("the rank's output");
    }
    output
}

impl Drop for Ranks {
    fn drop(&mut self) {
        for child in &mut self.children {
            // It may have ended already.
            drop(child.kill());
            drop(child.wait());
        }
    }
}
