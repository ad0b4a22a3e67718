//! Runs the examples `bert_large` and `gpt` as a user would, under a deadline, and reads what it wrote.
#![allow(dead_code, reason = "each test file uses its part")]

use std::ffi::OsStr;
use std::fs;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;
use tempfile::TempDir;

/// More than any run of the tiny model takes on two busy cores.
const DEADLINE: Duration = Duration::from_secs(240);

/// The example beside the test that runs: `cargo test` and `cargo nextest` build both.
pub(crate) fn example(name: &str) -> PathBuf {
    let test = std::env::current_exe().expect("the test's own path");
    let profile = test.parent().and_then(Path::parent).expect("target/<profile>/deps/<test>");
    let path = profile.join("examples").join(name);
    assert!(path.exists(), "{} is not built: run the tests with cargo", path.display());
    path
}

/// Says loudly that a test is left out, or fails where `PHALANX_REQUIRE` names what is missing.
#[expect(clippy::print_stderr, reason = "a skipped test is loud")]
pub(crate) fn skip(what: &str, why: &str) {
    let required = std::env::var("PHALANX_REQUIRE").unwrap_or_default();
    assert!(!required.split(',').any(|other| other == what), "{what} is required: {why}");
    eprintln!("SKIPPED: {why} (scripts/setup.sh --test-extras)");
}

/// A command for `sh` that runs in user and mount namespaces of its own: what it mounts is seen by what it starts alone. None, said aloud,
/// where they cannot be made.
pub(crate) fn apart() -> Option<Command> {
    let command = || {
        let mut command = Command::new("unshare");
        command.args(["--user", "--map-root-user", "--mount", "sh", "-c"]);
        command
    };
    let tried = command().arg("mount -t tmpfs tmpfs /mnt").output();
    let why = match &tried {
        Ok(output) if output.status.success() => return Some(command()),
        Ok(output) => String::from_utf8_lossy(&output.stderr).trim().to_owned(),
        Err(error) => format!("unshare: {error}"),
    };
    skip("userns", &format!("no namespaces of a user's own here: {why}"));
    None
}

/// A process group of our own that is gone when this is dropped.
pub(crate) struct Owned(pub(crate) Child);

impl Owned {
    pub(crate) fn start(command: &mut Command) -> Self {
        command.process_group(0).stdin(Stdio::null());
        Self(command.spawn().expect("the program starts"))
    }

    /// Sends a signal to the whole group.
    pub(crate) fn signal(&self, signal: &str) {
        let group = format!("-{}", self.0.id());
        // The group may be gone already; that is what the caller wants.
        drop(Command::new("kill").args([signal, "--", &group]).stderr(Stdio::null()).status());
    }

    /// Waits for the end, killing at the deadline.
    pub(crate) fn finish(mut self, deadline: Duration) -> Output {
        let end = Instant::now() + deadline;
        let mut readers = Vec::new();
        let (out, err) = (self.0.stdout.take(), self.0.stderr.take());
        readers.push(std::thread::spawn(move || read_all(out)));
        readers.push(std::thread::spawn(move || read_all(err)));
        let status = loop {
            if let Some(status) = self.0.try_wait().expect("our own child") {
                break status;
            }
            if Instant::now() > end {
                self.signal("-KILL");
                let stderr = readers.remove(1).join().expect("reader");
                panic!("not done after {deadline:?}:\n{}", String::from_utf8_lossy(&stderr));
            }
            std::thread::park_timeout(Duration::from_millis(10));
        };
        let stderr = readers.remove(1).join().expect("reader");
        let stdout = readers.remove(0).join().expect("reader");
        Output { status, stdout, stderr }
    }
}

impl Drop for Owned {
    fn drop(&mut self) {
        self.signal("-KILL");
        drop(self.0.wait());
    }
}

/// Waits until `is_there`, or until the deadline.
pub(crate) fn wait_until(what: &str, deadline: Duration, mut is_there: impl FnMut() -> bool) {
    let end = Instant::now() + deadline;
    while !is_there() {
        assert!(Instant::now() < end, "never: {what}");
        std::thread::park_timeout(Duration::from_millis(2));
    }
}

/// The processes that a launcher has started: its ranks.
pub(crate) fn children_of(launcher: u32) -> Vec<String> {
    // Children belong to the thread that made them.
    let tasks = fs::read_dir(format!("/proc/{launcher}/task")).expect("the launcher lives");
    let of = |task: fs::DirEntry| fs::read_to_string(task.path().join("children"));
    let ids: String = tasks.flatten().filter_map(|task| of(task).ok()).collect();
    ids.split_whitespace().map(str::to_owned).collect()
}

/// Kills the last child of a launcher, which is a rank.
pub(crate) fn kill_child_of(launcher: u32) {
    let ids = children_of(launcher);
    let last = ids.last().expect("a rank");
    let kill = Command::new("kill").args(["-KILL", last]).stderr(Stdio::null()).status();
    assert!(kill.expect("kill").success(), "{last} of {ids:?}");
}

/// A port that nobody listens at.
pub(crate) fn free_port() -> u16 {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a free port");
    listener.local_addr().expect("its own").port()
}

fn read_all(pipe: Option<impl std::io::Read>) -> Vec<u8> {
    let mut all = Vec::new();
    if let Some(mut pipe) = pipe {
        drop(pipe.read_to_end(&mut all));
    }
    all
}

/// What a run of the example left.
pub(crate) struct Run {
    pub(crate) folder: TempDir,
    pub(crate) output: Output,
    pub(crate) steps: Vec<Value>,
    pub(crate) summary: Value,
}

impl Run {
    /// The losses, as written.
    pub(crate) fn losses(&self) -> Vec<f64> {
        self.steps.iter().map(|step| step["loss"].as_f64().expect("a loss")).collect()
    }

    /// The bytes of the final weights.
    pub(crate) fn weights(&self) -> Vec<u8> {
        fs::read(self.folder.path().join("out/model.safetensors")).expect("final weights")
    }
}

/// `bert_large` with `args`, as [`run_of`].
pub(crate) fn bert<S: AsRef<OsStr>>(args: &[S]) -> Run {
    run_of("bert_large", args)
}

/// The example with `args`, its metrics and output in a temporary folder; it must succeed.
pub(crate) fn run_of<S: AsRef<OsStr>>(program: &str, args: &[S]) -> Run {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let metrics = folder.path().join("metrics.jsonl");
    let mut command = Command::new(example(program));
    command.current_dir(env!("CARGO_MANIFEST_DIR")).args(args);
    command.arg("--metrics").arg(&metrics).arg("--output").arg(folder.path().join("out"));
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    let output = Owned::start(&mut command).finish(DEADLINE);
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{:?}\n{text}", output.status);
    let written = fs::read_to_string(&metrics).expect("metrics");
    let parse = |line: &str| serde_json::from_str(line).expect("a JSON object a line");
    let mut steps: Vec<Value> = written.lines().map(parse).collect();
    let summary = steps.pop().expect("a last object");
    assert!(summary.get("summary").is_some(), "the last object is the summary: {summary}");
    Run { folder, output, steps, summary }
}
