//! Programs of others under a deadline, and where they are.

use std::io::{BufRead as _, BufReader, Read};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

/// The folder with `python` and `torchrun` that `scripts/setup.sh --test-extras` makes; else says that the test is
/// skipped, or fails where `PHALANX_REQUIRE` names torchrun.
pub(crate) fn torch() -> Option<PathBuf> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../third_party/torch-python/bin");
    if root.join("torchrun").exists() {
        return Some(root);
    }
    let required = std::env::var("PHALANX_REQUIRE").unwrap_or_default();
    let hint = "no third_party/torch-python: scripts/setup.sh --test-extras makes it";
    assert!(!required.split(',').any(|what| what == "torchrun"), "torchrun is required: {hint}");
    eprintln!("SKIPPED: {hint}");
    None
}

/// A process group of ours; dropping kills what is left of it.
pub(crate) struct Owned {
    child: Child,
}

impl Owned {
    pub(crate) fn start(command: &mut Command) -> Self {
        command.process_group(0).stdout(Stdio::piped()).stderr(Stdio::piped());
        Self { child: command.spawn().expect("the program starts") }
    }

    /// The first line of its output.
    pub(crate) fn first_line(&mut self, limit: Duration) -> String {
        let stdout = self.child.stdout.take().expect("piped");
        let (sender, receiver) = mpsc::channel();
        thread::spawn(move || {
            let mut line = String::new();
            drop(BufReader::new(stdout).read_line(&mut line));
            drop(sender.send(line));
        });
        receiver.recv_timeout(limit).expect("a first line in time").trim().to_owned()
    }

    /// How it ended, and all that it said.
    pub(crate) fn finish(mut self, limit: Duration) -> (ExitStatus, String) {
        let end = Instant::now() + limit;
        let (out, err) = (self.child.stdout.take(), self.child.stderr.take());
        let readers = [thread::spawn(move || read_all(out)), thread::spawn(move || read_all(err))];
        let status = loop {
            if let Some(status) = self.child.try_wait().expect("our own child") {
                break Some(status);
            }
            if Instant::now() > end {
                self.kill();
                break None;
            }
            thread::park_timeout(Duration::from_millis(10));
        };
        self.kill();
        let text: String =
            readers.into_iter().map(|reader| reader.join().expect("a reader")).collect();
        (status.unwrap_or_else(|| panic!("not done after {limit:?}:\n{text}")), text)
    }

    fn kill(&self) {
        let group = format!("-{}", self.child.id());
        let kill =
            Command::new("kill").args(["-KILL", "--", &group]).stderr(Stdio::null()).status();
        // It may be gone already.
        drop(kill);
    }
}

impl Drop for Owned {
    fn drop(&mut self) {
        self.kill();
        drop(self.child.wait());
    }
}

fn read_all(pipe: Option<impl Read>) -> String {
    let mut all = Vec::new();
    if let Some(mut pipe) = pipe {
        drop(pipe.read_to_end(&mut all));
    }
    String::from_utf8_lossy(&all).into_owned()
}
