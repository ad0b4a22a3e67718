//! Who ends the ranks when the launcher is killed with -9?
//!
//! The kernel does, by the parent-death signal; but that reaches only the ranks themselves, not what they started.
//! So a tiny shell sits at the end of a pipe, knows the process groups, and kills them when the pipe closes without a
//! good-bye. It is in a session of its own, so that no Ctrl-C reaches it.

use std::io::Write as _;
use std::os::unix::process::CommandExt as _;
use std::process::{Child, ChildStdin, Command, Stdio};

/// Reads one group a line (a dash's `kill` takes no `--`), or `none`, for those it knows have ended; the end of the input
/// without the line `done` is the launcher's death.
const SCRIPT: &str = "trap '' HUP INT TERM; g=; while read -r l; do \
    case $l in done) exit 0;; none) g=;; *) g=\"$g -$l\";; esac; done; \
    [ -z \"$g\" ] || kill -9 $g";

/// The shell at the end of the pipe.
#[derive(Debug)]
pub(crate) struct Guard {
    shell: Option<(Child, ChildStdin)>,
}

impl Guard {
    /// Starts the guard. Without a shell the parent-death signal has to do: that is said in the log.
    pub(crate) fn start() -> Self {
        let mut command = Command::new("/bin/sh");
        command
            .args(["-c", SCRIPT])
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .process_group(0);
        let shell = match command.spawn() {
            Ok(mut child) => child.stdin.take().map(|pipe| (child, pipe)),
            Err(error) => {
                tracing::debug!(%error, "no shell to guard the ranks' own children");
                None
            }
        };
        Self { shell }
    }

    /// Tells the guard of a process group.
    pub(crate) fn watch(&mut self, group: i32) {
        self.say(&group.to_string());
    }

    /// All groups that it knows have ended: their numbers may become others'.
    pub(crate) fn forget(&mut self) {
        self.say("none");
    }

    fn say(&mut self, line: &str) {
        if let Some((_, pipe)) = &mut self.shell {
            if let Err(error) = writeln!(pipe, "{line}").and_then(|()| pipe.flush()) {
                tracing::debug!(%error, "the guard is gone");
            }
        }
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        self.say("done");
        if let Some((mut child, pipe)) = self.shell.take() {
            drop(pipe);
            // It has nothing left to do; killing it makes the wait short whatever happened.
            if let Err(error) = child.kill().and_then(|()| child.wait()) {
                tracing::debug!(%error, "the guard could not be ended");
            }
        }
    }
}
