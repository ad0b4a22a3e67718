//! How a job ended: one line for people and grep, one record for programs.
//!
//! The line's form is the project's message contract: `error[PHX….]: who … | what is known … | help: …`.

use std::fmt;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use crate::out_of_memory::OutOfMemory;
use crate::process::Exit;
use crate::restart::GiveUp;
use crate::signals;

/// How a job ended.
#[derive(Clone, Debug)]
pub struct Report {
    /// What was wrong first, if anything was.
    pub failure: Option<Failure>,
    /// The signal that the user ended the job with.
    pub ended_by: Option<i32>,
    /// How long the ranks ran, all attempts together.
    pub elapsed: Duration,
    /// How often they were started again.
    pub restarts: u32,
    /// Why they were not started once more, when they failed.
    pub gave_up: Option<GiveUp>,
}

/// The first failure of a job: its root cause as far as the launcher can see.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum Failure {
    /// A rank of this launcher, or one that its ranks accuse.
    Rank(RankFailure),
    /// Another node's launcher said that it failed.
    Node {
        /// The other node.
        node: usize,
        /// Its report, one line.
        report: String,
        /// Its launcher's exit code.
        code: u8,
    },
}

/// A rank that died, ended with an error, or failed the others.
#[derive(Clone, Debug)]
pub struct RankFailure {
    /// The rank.
    pub rank: usize,
    /// The machine's name and the rank's process id. `None`: it is of another node, whose launcher has not told its end.
    pub process: Option<(String, i32)>,
    /// How it ended, as far as this launcher knows.
    pub exit: Exit,
    /// When (or when the others had ended because of it), counted from the start.
    pub after: Duration,
    /// The last lines of its standard error, oldest first.
    pub last_lines: Vec<String>,
    /// What the ranks' flight recorders add.
    pub evidence: Box<Evidence>,
}

/// What is known of a failure beside its process.
#[derive(Clone, Debug, Default)]
pub struct Evidence {
    /// What the rank is in its job, if it has told.
    pub role: Option<String>,
    /// The collective that the rank was in, or had finished last: `op=all_reduce seq=412 …`.
    pub operation: Option<String>,
    /// The rank that noticed first, and how long after the end of this one.
    pub witness: Option<(usize, Option<Duration>)>,
    /// What that rank's group said.
    pub testimony: Option<String>,
    /// Where every rank was, in one line.
    pub lineup: Option<String>,
    /// The file with every rank's last operations.
    pub lineup_path: Option<PathBuf>,
    /// The file with the rank's output.
    pub log: Option<PathBuf>,
    /// That it was killed for lack of memory, where the system tells.
    pub out_of_memory: Option<OutOfMemory>,
}

impl Report {
    /// The exit code that says what happened: 0, the ranks' own code where it is one of the contract's (64, 65, 69, 74,
    /// 75, 124), 70 for any other failure of a rank, 128 + signal when the user ended the job.
    #[must_use]
    pub fn code(&self) -> u8 {
        match (&self.failure, self.ended_by) {
            (Some(failure), _) => code_of(failure),
            (None, Some(signal)) => u8::try_from(128 + signal).unwrap_or(70),
            (None, None) => 0,
        }
    }

    /// [`Report::code`] as `main` returns it.
    #[must_use]
    pub fn exit_code(&self) -> ExitCode {
        ExitCode::from(self.code())
    }
}

/// The exit code of a job that failed like this.
pub(crate) fn code_of(failure: &Failure) -> u8 {
    match failure {
        Failure::Node { code, .. } => *code,
        Failure::Rank(failure) => match failure.exit {
            Exit::Code(code @ (64 | 65 | 69 | 74 | 75 | 124)) => u8::try_from(code).unwrap_or(70),
            _ => 70,
        },
    }
}

impl RankFailure {
    /// Of a rank of another node.
    pub(crate) fn elsewhere(rank: usize, after: Duration, evidence: Box<Evidence>) -> Self {
        Self { rank, process: None, exit: Exit::Not, after, last_lines: Vec::new(), evidence }
    }

    fn cause(&self) -> String {
        match self.exit {
            Exit::Signal(signal) => format!("died: signal {signal} ({})", signals::name(signal)),
            Exit::Code(0) => "left early, with exit code 0".to_owned(),
            Exit::Code(code) => format!("ended with exit code {code}"),
            Exit::Not if self.process.is_none() => "failed the others".to_owned(),
            Exit::Not if self.is_shared() => "has an error that every rank has".to_owned(),
            Exit::Not => "failed the others and has not ended".to_owned(),
        }
    }

    /// Whether nobody was lost: an error that all ranks have.
    fn is_shared(&self) -> bool {
        self.evidence.witness.is_none() && self.evidence.testimony.is_some()
    }

    fn help(&self) -> &'static str {
        match self.exit {
            Exit::Signal(9) if self.evidence.out_of_memory.is_some() => "a smaller micro-batch, recomputation, sharding (ZeRO) or fewer loader buffers need less memory; or raise the limit",
            Exit::Signal(9) => "killed from outside: look for the out-of-memory killer (dmesg, cgroup memory.events) or who sent it",
            Exit::Signal(11 | 7) => "a memory fault in native code: a core dump or a debugger on this rank shows where",
            Exit::Signal(6) => "it aborted: its last lines say why",
            Exit::Code(101) => "it panicked: its last lines say where; RUST_BACKTRACE=1 shows the way there",
            Exit::Code(0) => "every rank must run the same number of collectives before it ends",
            Exit::Not if self.process.is_none() => "its node's launcher has not said how it ended: look at the output there",
            Exit::Not if self.is_shared() => "the error says what to do; no rank was lost",
            Exit::Not => "what the others say of it names its state; a stopped process goes on with SIGCONT",
            Exit::Code(_) | Exit::Signal(_) => "its last lines say why",
        }
    }

    /// 0701: died by a signal; 0702: ended with an error, or too early; 0703: did not end, but failed the others.
    const fn number(&self) -> &'static str {
        match self.exit {
            Exit::Signal(_) => "PHX0701",
            Exit::Code(_) => "PHX0702",
            Exit::Not => "PHX0703",
        }
    }

    /// Who failed, how and when: the beginning of the line.
    pub(crate) fn brief(&self) -> String {
        let (rank, cause) = (self.rank, self.cause());
        let place = match &self.process {
            Some((host, pid)) => format!("host {host} (pid {pid})"),
            None => "another node".to_owned(),
        };
        let seconds = self.after.as_secs_f64();
        let said = self.evidence.testimony.as_ref().filter(|_| self.is_shared());
        let said = said.map_or_else(String::new, |text| format!(": {}", text.replace('\n', " ⏎ ")));
        let role = self.evidence.role.as_ref();
        let role = role.map_or_else(String::new, |role| format!(" ({})", role.replace('\n', " ")));
        let killed = self.evidence.out_of_memory.as_ref();
        let killed = killed.map_or_else(String::new, |memory| format!(": {memory}"));
        format!("rank {rank}{role} on {place} {cause} after {seconds:.1} s{said}{killed}")
    }

    pub(crate) fn to_value(&self) -> serde_json::Value {
        let (exit_code, signal) = match self.exit {
            Exit::Code(code) => (Some(code), None),
            Exit::Signal(signal) => (None, Some(signal)),
            Exit::Not => (None, None),
        };
        let Evidence {
            role,
            operation,
            witness,
            testimony,
            lineup,
            lineup_path,
            log,
            out_of_memory,
        } = &*self.evidence;
        serde_json::json!({
            "code": self.number(),
            "rank": self.rank,
            "role": role,
            "host": self.process.as_ref().map(|(host, _)| host),
            "pid": self.process.as_ref().map(|(_, pid)| pid),
            "exit_code": exit_code,
            "signal": signal,
            "after_s": self.after.as_secs_f64(),
            "last_lines": self.last_lines,
            "operation": operation,
            "first_seen_by": witness.map(|(rank, _)| rank),
            "first_seen_after_s": witness.and_then(|(_, after)| after).map(|after| after.as_secs_f64()),
            "testimony": testimony,
            "lineup": lineup,
            "lineup_path": lineup_path,
            "log": log,
            "out_of_memory": out_of_memory.as_ref().map(|memory| serde_json::json!({
                "limit_bytes": memory.limit_bytes,
                "resident_bytes": memory.resident_bytes,
                "of_control_group": memory.is_of_group,
            })),
            "message": self.to_string(),
        })
    }
}

/// Lines of standard error that the report repeats; the rest was shown when it came.
const SHOWN_LINES: usize = 3;

impl fmt::Display for RankFailure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "error[{}]: {}", self.number(), self.brief())?;
        self.evidence.fmt(f)?;
        let skipped = self.last_lines.len().saturating_sub(SHOWN_LINES);
        if !self.last_lines.is_empty() {
            write!(f, " | last lines: {}", self.last_lines[skipped..].join(" ⏎ "))?;
        }
        write!(f, " | help: {}", self.help())
    }
}

impl fmt::Display for Evidence {
    /// The parts of the line that are known, each after ` | `.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(operation) = &self.operation {
            write!(f, " | {operation}")?;
        }
        if let Some((rank, after)) = self.witness {
            write!(f, " | first seen by rank {rank}")?;
            if let Some(after) = after {
                write!(f, " after {:.2} s", after.as_secs_f64())?;
            }
        }
        if let Some(testimony) = &self.testimony {
            write!(f, ": {}", testimony.replace('\n', " ⏎ "))?;
        }
        if let Some(lineup) = &self.lineup {
            write!(f, " | ranks: {lineup}")?;
        }
        if let Some(path) = &self.lineup_path {
            write!(f, " | operations of all ranks: {}", path.display())?;
        }
        match &self.log {
            Some(path) => write!(f, " | log: {}", path.display()),
            None => Ok(()),
        }
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Rank(failure) => failure.fmt(f),
            // The other node's line is complete; it is marked as coming from there.
            Self::Node { node, report, .. } => write!(f, "{report} | reported by node {node}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn failure(exit: Exit) -> RankFailure {
        RankFailure {
            rank: 2,
            process: Some(("a".to_owned(), 811)),
            exit,
            after: Duration::from_millis(3210),
            evidence: Box::default(),
            last_lines: ["one", "two", "three", "four \"quoted\""].map(str::to_owned).to_vec(),
        }
    }

    fn code(failure: Option<Failure>, ended_by: Option<i32>) -> u8 {
        Report { failure, ended_by, elapsed: Duration::ZERO, restarts: 0, gave_up: None }.code()
    }

    #[test]
    fn the_line_names_rank_host_pid_cause_and_last_lines() {
        let line = failure(Exit::Signal(9)).to_string();
        assert!(
            line.starts_with("error[PHX0701]: rank 2 on host a (pid 811) died: signal 9 (SIGKILL) after 3.2 s | last lines: two ⏎ three ⏎ four"),
            "{line}"
        );
        assert!(!line.contains('\n') && line.contains("| help: "), "{line}");
        let mut known = failure(Exit::Not);
        *known.evidence = Evidence {
            operation: Some("op=all_reduce seq=412".to_owned()),
            witness: Some((1, Some(Duration::from_millis(20)))),
            testimony: Some("rank 2 not responding".to_owned()),
            log: Some("run/rank2.log".into()),
            ..Evidence::default()
        };
        let line_of_known = known.to_string();
        assert!(
            line_of_known.contains("(pid 811) failed the others and has not ended after 3.2 s | op=all_reduce seq=412 | first seen by rank 1 after 0.02 s: rank 2 not responding | log: run/rank2.log | last lines: "),
            "{line_of_known}"
        );
        known.evidence.role = Some("pp 1, tp 0".to_owned());
        assert!(known.brief().starts_with("rank 2 (pp 1, tp 0) on host a (pid 811)"), "{known}");
        known.evidence.role = None;
        let remote = RankFailure::elsewhere(5, known.after, known.evidence);
        let line_of_remote = remote.to_string();
        assert!(
            line_of_remote.starts_with("error[PHX0703]: rank 5 on another node failed the others after 3.2 s | op=all_reduce seq=412 | first seen by rank 1 after 0.02 s: rank 2 not responding | log: run/rank2.log | help: "),
            "{line_of_remote}"
        );
        let record: serde_json::Value =
            serde_json::from_str(&remote.to_value().to_string()).unwrap();
        assert_eq!((&record["rank"], &record["host"]), (&5.into(), &serde_json::Value::Null));
        let panicked = failure(Exit::Code(101)).to_string();
        assert!(panicked.contains("ended with exit code 101"), "{panicked}");
        assert!(panicked.contains("RUST_BACKTRACE=1"), "{panicked}");
    }

    #[test]
    fn the_record_is_json_with_the_same_facts() {
        let record: serde_json::Value = failure(Exit::Signal(11)).to_value();
        assert_eq!(record["rank"], 2);
        assert_eq!(record["signal"], 11);
        assert_eq!(record["exit_code"], serde_json::Value::Null);
        assert_eq!(record["last_lines"][3], "four \"quoted\"");
        assert_eq!(record["out_of_memory"], serde_json::Value::Null);
        let mut killed = failure(Exit::Signal(9));
        let memory =
            OutOfMemory { limit_bytes: Some(64 << 20), resident_bytes: None, is_of_group: true };
        killed.evidence.out_of_memory = Some(memory);
        let record_of_killed: serde_json::Value =
            serde_json::from_str(&killed.to_value().to_string()).unwrap();
        assert_eq!(record_of_killed["out_of_memory"]["limit_bytes"], 64 << 20);
        let line = killed.to_string();
        assert!(line.contains("(SIGKILL) after 3.2 s: out of memory: its control"), "{line}");
        assert!(
            line.contains("the limit is 64.0 MiB | ") && line.contains("micro-batch"),
            "{line}"
        );
    }

    #[test]
    fn exit_codes_follow_the_contract() {
        let rank = |exit| Some(Failure::Rank(failure(exit)));
        assert_eq!(code(None, None), 0);
        assert_eq!(code(None, Some(2)), 130);
        assert_eq!(code(None, Some(15)), 143);
        assert_eq!(code(rank(Exit::Signal(9)), None), 70);
        for (of_rank, of_job) in [
            (1, 70),
            (101, 70),
            (64, 64),
            (65, 65),
            (69, 69),
            (74, 74),
            (75, 75),
            (124, 124),
            (255, 70),
        ] {
            assert_eq!(code(rank(Exit::Code(of_rank)), None), of_job, "{of_rank}");
        }
        let remote = RankFailure::elsewhere(1, Duration::ZERO, Box::default());
        assert_eq!(code(Some(Failure::Rank(remote)), None), 70);
        let node = Failure::Node { node: 1, report: String::new(), code: 74 };
        assert_eq!(code(Some(node), None), 74);
    }
}
