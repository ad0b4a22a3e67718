//! One rank as a process: a group of its own, dead when its launcher dies, its output in our hands.

#![expect(unsafe_code, reason = "the parent-death signal must be set between fork and exec")]

use std::ffi::OsString;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::event::{poll, PollFd, PollFlags, Timespec};
use rustix::process::{
    getpid, getppid, kill_process_group, pidfd_open, set_parent_process_death_signal, waitid, Pid,
    PidfdFlags, Signal, WaitId, WaitIdOptions,
};
use rustix::pty::{grantpt, openpt, ptsname, unlockpt, OpenptFlags};
use rustix::termios::{tcgetattr, tcgetwinsize, tcsetattr, tcsetwinsize, OptionalActions};

use crate::error::{system, LaunchError};

/// How a rank ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exit {
    /// By itself, with this code.
    Code(i32),
    /// By this signal.
    Signal(i32),
    /// Not at all: it was still there when the others ended because of it.
    Not,
}

/// A started rank.
#[derive(Debug)]
pub(crate) struct Process {
    pid: Pid,
    /// Becomes readable when the process ends.
    pub(crate) pidfd: OwnedFd,
    /// Its standard output and standard error, until they end.
    pub(crate) streams: [Option<File>; 2],
}

/// What a rank's standard error is connected to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ErrorStream {
    Pipe,
    /// A pseudo-terminal, so that a progress bar shows.
    Terminal,
}

/// What to start.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Start<'s> {
    pub(crate) program: &'s Path,
    pub(crate) args: &'s [OsString],
    pub(crate) environment: &'s [(&'static str, String)],
    pub(crate) error_stream: ErrorStream,
}

impl Process {
    /// Starts a rank. Must be called from the thread that waits for it: the kernel sends the parent-death signal when
    /// the *thread* that forked ends.
    pub(crate) fn start(start: &Start<'_>) -> Result<Self, LaunchError> {
        let failed =
            |source| LaunchError::Start { program: start.program.display().to_string(), source };
        let mut command = Command::new(start.program);
        command
            .args(start.args)
            .envs(start.environment.iter().map(|(name, value)| (name, value)))
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .process_group(0);
        let terminal = match start.error_stream {
            ErrorStream::Pipe => None,
            ErrorStream::Terminal => Some(pseudo_terminal()?),
        };
        let controller = match terminal {
            None => {
                command.stderr(Stdio::piped());
                None
            }
            Some((controller, user)) => {
                command.stderr(user);
                Some(controller)
            }
        };
        let launcher = getpid();
        let before_exec = move || {
            set_parent_process_death_signal(Some(Signal::KILL))?;
            // The launcher may have died before the line above: then nobody would send the signal.
            if getppid() == Some(launcher) {
                Ok(())
            } else {
                Err(io::Error::from_raw_os_error(rustix::io::Errno::SRCH.raw_os_error()))
            }
        };
        // SAFETY: the closure runs between fork and exec, where only async-signal-safe calls are allowed; it makes two
        // plain system calls (prctl, getppid) and builds an error from a number, which allocates nothing.
        unsafe { command.pre_exec(before_exec) };
        let child = command.spawn().map_err(failed)?;
        // The command keeps its end of the pseudo-terminal, which must close for us to see the other end close.
        drop(command);
        Self::from_child(child, controller)
    }

    fn from_child(mut child: Child, controller: Option<OwnedFd>) -> Result<Self, LaunchError> {
        let pid = Pid::from_child(&child);
        let stdout = child.stdout.take().map(|pipe| File::from(OwnedFd::from(pipe)));
        let stderr = controller.or_else(|| child.stderr.take().map(OwnedFd::from)).map(File::from);
        let opened = pidfd_open(pid, PidfdFlags::empty()).and_then(|pidfd| {
            for stream in [&stdout, &stderr].into_iter().flatten() {
                rustix::io::ioctl_fionbio(stream, true)?;
            }
            Ok(pidfd)
        });
        match opened {
            Ok(pidfd) => Ok(Self { pid, pidfd, streams: [stdout, stderr] }),
            Err(errno) => {
                // Without a pidfd nobody would wait for it.
                if let Err(error) = child.kill().and_then(|()| child.wait()) {
                    tracing::debug!(%error, "a rank that could not be watched could not be ended");
                }
                Err(system("pidfd_open")(errno))
            }
        }
    }

    /// Its process id, which is also that of its group.
    pub(crate) const fn id(&self) -> i32 {
        self.pid.as_raw_pid()
    }

    /// Signals the whole group: shells, data loaders and all.
    pub(crate) fn signal_group(&self, signal: Signal) {
        match kill_process_group(self.pid, signal) {
            Ok(()) | Err(rustix::io::Errno::SRCH) => {}
            Err(errno) => tracing::warn!(pid = self.id(), %errno, "could not signal a rank"),
        }
    }

    /// Waits for a process that was killed, and collects it.
    pub(crate) fn wait_until(&self, deadline: Instant) {
        let mut fds = [PollFd::new(&self.pidfd, PollFlags::IN)];
        if let Err(errno) = poll(&mut fds, Some(&timespec_until(deadline))) {
            tracing::debug!(%errno, "waiting for a killed rank failed");
        }
        if let Err(error) = self.collect() {
            tracing::debug!(%error, "a killed rank could not be collected");
        }
    }

    /// Collects an ended process and kills what is left of its group. `None`: it has not ended.
    pub(crate) fn collect(&self) -> Result<Option<Exit>, LaunchError> {
        let look = WaitIdOptions::EXITED | WaitIdOptions::NOHANG | WaitIdOptions::NOWAIT;
        let Some(status) =
            waitid(WaitId::PidFd(self.pidfd.as_fd()), look).map_err(system("waitid"))?
        else {
            return Ok(None);
        };
        let take = WaitIdOptions::EXITED | WaitIdOptions::NOHANG;
        // Still a zombie: its group's number cannot belong to anybody else yet.
        self.signal_group(Signal::KILL);
        waitid(WaitId::PidFd(self.pidfd.as_fd()), take).map_err(system("waitid"))?;
        Ok(Some(match (status.exit_status(), status.terminating_signal()) {
            (Some(code), _) => Exit::Code(code),
            (None, Some(signal)) => Exit::Signal(signal),
            (None, None) => Exit::Code(-1),
        }))
    }
}

/// Time until `deadline`, rounded up to a millisecond so that poll does not return just before it.
pub(crate) fn timespec_until(deadline: Instant) -> Timespec {
    let left = deadline.saturating_duration_since(Instant::now()) + Duration::from_millis(1);
    Timespec {
        tv_sec: i64::try_from(left.as_secs()).unwrap_or(i64::MAX),
        tv_nsec: i64::from(left.subsec_nanos()),
    }
}

/// A pseudo-terminal of the size of ours, with both ends.
fn pseudo_terminal() -> Result<(OwnedFd, OwnedFd), LaunchError> {
    let failed = system("open a pseudo-terminal");
    let open = || -> rustix::io::Result<(OwnedFd, OwnedFd)> {
        let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
        let controller = openpt(flags)?;
        grantpt(&controller)?;
        unlockpt(&controller)?;
        let name = ptsname(&controller, Vec::new())?;
        let file_flags =
            rustix::fs::OFlags::RDWR | rustix::fs::OFlags::NOCTTY | rustix::fs::OFlags::CLOEXEC;
        let user = rustix::fs::open(name, file_flags, rustix::fs::Mode::empty())?;
        // The real terminal does the output processing (line feed to carriage return and line feed).
        let mut modes = tcgetattr(&user)?;
        modes.make_raw();
        tcsetattr(&user, OptionalActions::Now, &modes)?;
        Ok((controller, user))
    };
    let (controller, user) = open().map_err(failed)?;
    resize(&controller);
    Ok((controller, user))
}

/// Gives a pseudo-terminal the size of the terminal behind our standard error.
pub(crate) fn resize(controller: impl AsFd) {
    let size = tcgetwinsize(std::io::stderr());
    if let Err(errno) = size.and_then(|size| tcsetwinsize(controller, size)) {
        tracing::debug!(%errno, "the size of the terminal is not known");
    }
}
