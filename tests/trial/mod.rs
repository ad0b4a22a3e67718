//! Runs the trainer as its user would and holds it to a deadline: what it printed, how it ended,
//! and that nothing of it is left.
#![allow(dead_code, reason = "each test file uses its part")]

use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{channel, Receiver, RecvTimeoutError, Sender};
use std::time::{Duration, Instant};

/// What one run of the trainer left behind.
#[derive(Debug)]
pub(crate) struct Ended {
    pub(crate) status: ExitStatus,
    pub(crate) output: String,
}

impl Ended {
    /// Failed, said all of `parts`, and did not spill a panic or a backtrace.
    #[track_caller]
    pub(crate) fn assert_failed_saying(&self, parts: &[&str]) {
        assert!(!self.status.success(), "ended well:\n{}", self.output);
        for part in parts {
            assert!(self.output.contains(part), "does not say {part:?}:\n{}", self.output);
        }
        for unwanted in ["panicked at", "stack backtrace", "RUST_BACKTRACE"] {
            assert!(!self.output.contains(unwanted), "{unwanted}:\n{}", self.output);
        }
    }
}

/// A run of the example with a folder of its own.
pub(crate) struct Trial {
    child: Child,
    folder: tempfile::TempDir,
    lines: Receiver<String>,
    output: String,
    deadline: Instant,
}

impl Trial {
    /// Starts `bert_large` with the tiny configuration and these arguments.
    pub(crate) fn start(arguments: &[&str], deadline: Duration) -> Trial {
        Self::start_in(tempfile::tempdir().expect("a temporary folder"), arguments, deadline)
    }

    /// As `start`, with `{folder}` in the arguments standing for `folder`.
    pub(crate) fn start_in(
        folder: tempfile::TempDir,
        arguments: &[&str],
        deadline: Duration,
    ) -> Trial {
        let place = folder.path().display().to_string();
        let mut command = Command::new(example("bert_large"));
        command
            .args(arguments.iter().map(|argument| argument.replace("{folder}", &place)))
            .current_dir(env!("CARGO_MANIFEST_DIR"))
            .env("PHALANX_TRIAL", &place)
            .env_remove("RUST_BACKTRACE")
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .process_group(0);
        let mut child = command.spawn().expect("the example starts");
        let (sender, lines) = channel();
        pass_lines(child.stdout.take().expect("piped"), sender.clone());
        pass_lines(child.stderr.take().expect("piped"), sender);
        let deadline = Instant::now() + deadline;
        Trial { child, folder, lines, output: String::new(), deadline }
    }

    /// The folder of this run.
    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// The process that was started.
    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Waits until a file in the folder has this many lines.
    pub(crate) fn wait_for_lines(&mut self, name: &str, count: usize) {
        let path = self.path(name);
        let has = || fs::read_to_string(&path).is_ok_and(|text| text.lines().count() >= count);
        while !has() {
            if !self.take_output(Duration::from_millis(20)) {
                panic!("ended before {name} had {count} lines:\n{}", self.output);
            }
        }
    }

    /// Waits until this has been printed.
    pub(crate) fn wait_for_output(&mut self, text: &str) {
        while !self.output.contains(text) {
            if !self.take_output(Duration::from_millis(2)) {
                panic!("ended before it said {text:?}:\n{}", self.output);
            }
        }
    }

    /// The process of a rank.
    pub(crate) fn rank_pid(&self, rank: usize) -> u32 {
        let wanted = format!("RANK={rank}");
        self.processes()
            .into_iter()
            .find(|pid| environment(*pid).contains(&wanted))
            .unwrap_or_else(|| panic!("no process of rank {rank}:\n{}", self.output))
    }

    /// All living processes of this run.
    pub(crate) fn processes(&self) -> Vec<u32> {
        let mark = format!("PHALANX_TRIAL={}", self.folder.path().display());
        let entries = fs::read_dir("/proc").expect("Linux");
        entries
            .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
            .filter(|pid| environment(*pid).contains(&mark))
            .collect()
    }

    /// Waits for the end, of the process and of all that it started.
    pub(crate) fn end(mut self) -> Ended {
        while self.take_output(Duration::from_millis(100)) {}
        let status = self.child.wait().expect("our own child");
        // Output is at its end when the last process that held it is gone; a process may still be
        // on its way out for a moment.
        while !self.processes().is_empty() {
            assert!(Instant::now() < self.deadline, "left running: {:?}", self.processes());
            std::thread::yield_now();
        }
        Ended { status, output: std::mem::take(&mut self.output) }
    }

    /// Takes what was printed; false at the end of all output.
    fn take_output(&mut self, patience: Duration) -> bool {
        assert!(Instant::now() < self.deadline, "still running at the deadline:\n{}", self.output);
        match self.lines.recv_timeout(patience) {
            Ok(line) => {
                self.output.push_str(&line);
                true
            }
            Err(RecvTimeoutError::Timeout) => true,
            Err(RecvTimeoutError::Disconnected) => false,
        }
    }
}

impl Drop for Trial {
    fn drop(&mut self) {
        // After a failed assertion: nothing of this run may outlive it.
        for pid in self.processes() {
            signal("KILL", pid);
        }
        let _ended = self.child.wait();
    }
}

/// Sends a signal to a process of ours.
pub(crate) fn signal(name: &str, pid: u32) {
    let command = format!("kill -{name} {pid}");
    let _gone_already = Command::new("sh").args(["-c", &command]).stderr(Stdio::null()).status();
}

/// The example as cargo built it with this test.
fn example(name: &str) -> PathBuf {
    let test = std::env::current_exe().expect("a path");
    let profile = test.parent().and_then(Path::parent).expect("target/<profile>/deps/<test>");
    let example = profile.join("examples").join(name);
    assert!(example.exists(), "not built: cargo build --example {name}");
    example
}

fn environment(pid: u32) -> Vec<String> {
    let variables = fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
    variables.split(|byte| *byte == 0).map(|one| String::from_utf8_lossy(one).into()).collect()
}

fn pass_lines(from: impl Read + Send + 'static, to: Sender<String>) {
    std::thread::spawn(move || {
        let mut reader = BufReader::new(from);
        let mut line = Vec::new();
        while reader.read_until(b'\n', &mut line).is_ok_and(|read| read > 0) {
            let text = String::from_utf8_lossy(&line).into_owned();
            if to.send(text).is_err() {
                return;
            }
            line.clear();
        }
    });
}
