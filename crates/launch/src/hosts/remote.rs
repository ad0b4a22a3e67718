//! The launchers of the other hosts of a hostfile, started through ssh: the same command line, in the same folder, with
//! their place in the environment.
//!
//! The job token goes over the standard input, which nobody else can read; a command line can be read by every user of
//! both machines. The input stays open for the job's life: when it closes without a good-bye, because this launcher has
//! gone, whatever way, the other one is asked to end.

use std::io::{BufRead as _, BufReader, Read, Write as _};
use std::os::unix::process::CommandExt as _;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::thread;
use std::time::{Duration, Instant};

use rustix::event::{poll, PollFd, PollFlags};
use rustix::process::{pidfd_open, Pid, PidfdFlags};

use super::file::{quoted, Host};
use crate::error::{system, LaunchError};
use crate::process::timespec_until;
use crate::screen::{Screen, Stream};

/// What the launchers of all hosts have in common.
pub(crate) struct Remote<'r> {
    /// The command that starts others on a host: `ssh`, with options.
    pub(crate) ssh: &'r str,
    pub(crate) node_count: usize,
    pub(crate) job_token: &'r str,
    pub(crate) run_id: &'r str,
    pub(crate) master_addr: &'r str,
    pub(crate) master_port: u16,
    /// The folder and the command line of this process.
    pub(crate) folder: String,
    pub(crate) command: Vec<String>,
}

/// A launcher on another host. Dropping it closes its input.
#[derive(Debug)]
pub(crate) struct RemoteNode {
    host: String,
    child: Child,
    input: Option<ChildStdin>,
    /// Closed when all that it has said is shown.
    shown: Receiver<()>,
}

impl Remote<'_> {
    /// Starts the launcher of `host` as node `node`.
    pub(crate) fn start(&self, node: usize, host: &Host) -> Result<RemoteNode, LaunchError> {
        let mut words = self.ssh.split_ascii_whitespace();
        let program = words.next().unwrap_or("ssh");
        let mut command = Command::new(program);
        command.args(words).arg(&host.name).arg(self.script(node, host.slots));
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        // A Ctrl-C at the terminal is for this launcher, which tells the others.
        command.process_group(0);
        let start = |source| LaunchError::Start { program: program.to_owned(), source };
        let mut child = command.spawn().map_err(start)?;
        let mut input = child.stdin.take();
        if let Some(pipe) = &mut input {
            // Who has gone already is noticed when it does not come.
            let told = writeln!(pipe, "{}", self.job_token).and_then(|()| pipe.flush());
            if let Err(error) = told {
                tracing::debug!(%error, host = host.name, "it did not take the job token");
            }
        }
        let (output, errors) = (child.stdout.take(), child.stderr.take());
        let (showing, shown) = mpsc::channel();
        let started = RemoteNode { host: host.name.clone(), child, input, shown };
        if let Some(pipe) = output {
            show(pipe, Stream::Output, showing.clone())?;
        }
        if let Some(pipe) = errors {
            show(pipe, Stream::Error, showing)?;
        }
        Ok(started)
    }

    /// What the host's shell does: take the token, watch the input, become the launcher.
    fn script(&self, node: usize, slots: Option<usize>) -> String {
        let command: Vec<String> = self.command.iter().map(|word| quoted(word)).collect();
        let mut place = vec![
            ("PET_NNODES", self.node_count.to_string()),
            ("PET_NODE_RANK", node.to_string()),
            ("PET_MASTER_ADDR", self.master_addr.to_owned()),
            ("PET_MASTER_PORT", self.master_port.to_string()),
            ("PHALANX_RUN_ID", self.run_id.to_owned()),
        ];
        place.extend(slots.map(|slots| ("PET_NPROC_PER_NODE", slots.to_string())));
        let place: Vec<String> =
            place.iter().map(|(name, value)| format!("{name}={}", quoted(value))).collect();
        let place = place.join(" ");
        let script = format!(
            "IFS= read -r PHALANX_JOB_TOKEN && export PHALANX_JOB_TOKEN && cd {} || exit 69; \
             exec 3<&0 </dev/null; (IFS= read -r bye <&3 || kill -TERM $$) >/dev/null 2>&1 & \
             exec env {place} {} 3<&-",
            quoted(&self.folder),
            command.join(" "),
        );
        // Whatever the user's login shell is.
        format!("exec sh -c {}", quoted(&script))
    }
}

/// Shows what comes, by whole lines.
fn show(
    pipe: impl Read + Send + 'static,
    stream: Stream,
    showing: Sender<()>,
) -> Result<(), LaunchError> {
    let body = move || {
        let (mut screen, mut reader) = (Screen::new(), BufReader::new(pipe));
        let mut line = Vec::new();
        while reader.read_until(b'\n', &mut line).is_ok_and(|count| count > 0) {
            screen.write(stream, &line);
            line.clear();
        }
        drop(showing);
    };
    let thread = thread::Builder::new().name("output of another host".to_owned());
    thread.spawn(body).map(drop).map_err(system("start a thread"))
}

impl RemoteNode {
    /// Whether it has ended, and how, before anybody expected it.
    pub(crate) fn early_end(&mut self) -> Option<String> {
        let status = self.child.try_wait().ok().flatten().filter(|status| !status.success())?;
        Some(format!("the command that was to start it on {} has ended: {status}", self.host))
    }

    /// The job has ended: waits until this launcher has, too, as it does by itself.
    pub(crate) fn end(&mut self, deadline: Instant) {
        // From now on the end of its input is no sign.
        if let Some(Err(error)) = self.input.as_mut().map(|pipe| writeln!(pipe, "bye")) {
            tracing::debug!(%error, host = self.host, "it has gone before");
        }
        if !self.has_ended_by(deadline) {
            tracing::warn!(host = self.host, "the command that started its launcher is killed");
        }
        self.kill();
        if self.shown.recv_timeout(SHOW_MAX) == Err(RecvTimeoutError::Timeout) {
            tracing::debug!(host = self.host, "what it says at the end is not shown");
        }
    }

    fn has_ended_by(&self, deadline: Instant) -> bool {
        let Ok(pidfd) = pidfd_open(Pid::from_child(&self.child), PidfdFlags::empty()) else {
            return true;
        };
        let mut fds = [PollFd::new(&pidfd, PollFlags::IN)];
        poll(&mut fds, Some(&timespec_until(deadline))).is_ok_and(|count| count > 0)
    }

    fn kill(&mut self) {
        if let Err(error) = self.child.kill().and_then(|()| self.child.wait()) {
            tracing::debug!(%error, host = self.host, "its starter had gone");
        }
    }
}

/// What a command has said before its end is shown by then.
const SHOW_MAX: Duration = Duration::from_secs(1);

impl Drop for RemoteNode {
    fn drop(&mut self) {
        self.input = None;
        self.kill();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_token_is_in_no_command_line() {
        let remote = Remote {
            ssh: "ssh -p 22",
            node_count: 4,
            job_token: "secret",
            run_id: "run",
            master_addr: "n0",
            master_port: 29_500,
            folder: "/my work".to_owned(),
            command: ["/bin/train", "--name", "a b"].map(str::to_owned).to_vec(),
        };
        let script = remote.script(3, Some(8));
        assert!(!script.contains("secret"), "{script}");
        assert!(script.contains("PET_NODE_RANK=3 PET_MASTER_ADDR=n0"), "{script}");
        assert!(script.contains("PET_NPROC_PER_NODE=8"), "{script}");
        assert!(script.starts_with("exec sh -c '"), "{script}");
    }
}
