//! Whether a silent peer lives: heartbeats are counted here, and what the kernel knows of a silent
//! process or connection is put into words.
//!
//! The monitor's thread sends a heartbeat to every peer twice a second, so a rank that computes for
//! long does not look dead; a stopped process, a frozen machine or a cut network does. Only time in
//! which this process itself could listen counts as silence: a rank that was stopped and goes on
//! blames nobody. Source: `proc(5)` for `/proc/PID/stat` and `/proc/net/tcp`.

use std::os::fd::{AsFd, BorrowedFd};
use std::time::Duration;

use rustix::net::{getpeername, getsockname, sockopt, SocketAddrAny};

/// The kernel gives a connection up this long after the heartbeats should have: their error says more.
const KERNEL_LATER: Duration = Duration::from_millis(500);

/// How often ranks say that they live, when silence means death, and when a wait is worth a line in the log.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Liveness {
    pub(crate) heartbeat: Duration,
    pub(crate) dead_after: Duration,
    pub(crate) remind_after: Duration,
}

/// How long each peer has been silent.
#[derive(Debug)]
pub(crate) struct Silences {
    /// `None` until its first word: it may still be connecting to others.
    of: Vec<Option<Duration>>,
    liveness: Liveness,
}

impl Silences {
    pub(crate) fn new(peers: usize, liveness: Liveness) -> Self {
        Self { of: vec![None; peers], liveness }
    }

    pub(crate) fn heard(&mut self, peer: usize) {
        self.of[peer] = Some(Duration::ZERO);
    }

    /// `elapsed` has passed since the last look. More than two heartbeats of it are not counted:
    /// then it was this process that did not run.
    pub(crate) fn pass(&mut self, elapsed: Duration) {
        let counted = elapsed.min(self.liveness.heartbeat * 2);
        for silence in self.of.iter_mut().flatten() {
            *silence += counted;
        }
    }

    /// Peers that have been silent for too long, and how long.
    pub(crate) fn dead(&self) -> impl Iterator<Item = (usize, Duration)> + '_ {
        let limit = self.liveness.dead_after;
        self.of
            .iter()
            .enumerate()
            .filter_map(|(peer, silence)| Some((peer, (*silence)?)))
            .filter(move |(_, silence)| *silence >= limit)
    }
}

/// The fields of `/proc/PID/stat` from the state on: the command's name before them, in parentheses,
/// may hold anything.
pub(crate) fn stat_fields(pid: u32) -> Option<Vec<String>> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    Some(stat.rsplit_once(')')?.1.split_whitespace().map(str::to_owned).collect())
}

/// What a process of this machine is doing instead of answering.
pub(crate) fn process_state(pid: u32) -> String {
    let Some(fields) = stat_fields(pid) else { return "its process is gone".to_owned() };
    let letter = fields.first().map_or("?", String::as_str);
    let meaning = match letter {
        "T" => "stopped: SIGCONT lets it go on",
        "t" => "held by a debugger",
        "D" => "waiting for a device or a file system",
        "R" => "running: it gets too little CPU time, or one of its threads holds all others",
        "S" | "I" => "sleeping: its thread that answers is stuck",
        "Z" | "X" => "ended",
        _ => "unknown",
    };
    format!("process state {letter} ({meaning})")
}

/// What the kernel knows about the connection to a process of another machine.
pub(crate) fn connection_state(control: BorrowedFd<'_>) -> String {
    let address = |name: SocketAddrAny| std::net::SocketAddr::try_from(name).ok();
    let ours = getsockname(control).ok().and_then(address);
    let theirs = getpeername(control).ok().flatten().and_then(address);
    let (Some(ours), Some(theirs)) = (ours, theirs) else {
        return "the connection is closed".to_owned();
    };
    let waiting = ["/proc/net/tcp", "/proc/net/tcp6"]
        .iter()
        .filter_map(|path| std::fs::read_to_string(path).ok())
        .find_map(|table| unacknowledged(&table, ours.port(), theirs.port()));
    match waiting {
        Some(0) => format!(
            "{theirs} acknowledges what is sent: that process is stopped, or gets no CPU time"
        ),
        Some(bytes) => format!(
            "no contact with {theirs}: {bytes} bytes to it are unacknowledged: its machine, or the network between, is down"
        ),
        None => format!("no contact with {theirs}: its machine, or the network between, is down"),
    }
}

/// Bytes in a connection's send queue, from the text of `/proc/net/tcp`.
fn unacknowledged(table: &str, our_port: u16, their_port: u16) -> Option<u64> {
    let (ours, theirs) = (format!(":{our_port:04X}"), format!(":{their_port:04X}"));
    table.lines().skip(1).find_map(|line| {
        let fields: Vec<&str> = line.split_ascii_whitespace().collect();
        let is_it = fields.get(1)?.ends_with(&ours) && fields.get(2)?.ends_with(&theirs);
        let (queued, _) = fields.get(4)?.split_once(':')?;
        is_it.then(|| u64::from_str_radix(queued, 16).ok())?
    })
}

/// Unacknowledged data ends the connection a little after `dead_after`; so do unanswered keep-alives
/// (the kernel lets the same limit decide about them).
pub(crate) fn watch_connection(fd: impl AsFd, dead_after: Duration) -> std::io::Result<()> {
    let fd = fd.as_fd();
    sockopt::set_socket_keepalive(fd, true)?;
    sockopt::set_tcp_keepidle(fd, Duration::from_secs(1))?;
    sockopt::set_tcp_keepintvl(fd, Duration::from_secs(1))?;
    sockopt::set_tcp_keepcnt(fd, 4)?;
    let limit = dead_after.saturating_add(KERNEL_LATER);
    // The kernel takes a signed number.
    let limit = i32::try_from(limit.as_millis()).unwrap_or(i32::MAX);
    let limit = limit.unsigned_abs();
    sockopt::set_tcp_user_timeout(fd, limit)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const BEAT: Duration = Duration::from_millis(500);

    fn silences() -> Silences {
        Silences::new(3, Liveness { heartbeat: BEAT, dead_after: BEAT * 10, remind_after: BEAT })
    }

    #[test]
    fn silence_counts_from_the_first_word_and_ends_with_the_next() {
        let mut silences = silences();
        silences.heard(1);
        silences.heard(2);
        for beat in 1..=10 {
            assert_eq!(silences.dead().count(), 0, "after {beat} beats");
            silences.pass(BEAT);
            silences.heard(2);
        }
        assert_eq!(silences.dead().collect::<Vec<_>>(), [(1, BEAT * 10)]);
        silences.heard(1);
        assert_eq!(silences.dead().count(), 0);
    }

    #[test]
    fn a_process_that_was_stopped_itself_blames_nobody() {
        let mut silences = silences();
        silences.heard(1);
        silences.pass(Duration::from_secs(3600));
        assert_eq!(silences.dead().count(), 0);
    }

    #[test]
    fn the_state_of_a_process_is_read() {
        assert!(process_state(std::process::id()).starts_with("process state "));
        assert!(process_state(u32::MAX).contains("gone"));
    }

    #[test]
    fn the_send_queue_of_a_connection_is_found() {
        let table = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode\n\
            0: 0100630A:733C 0200630A:9999 01 00000048:00000000 01:00000000 00000003     0        0 777 1 0 100 0 0 10 0\n";
        assert_eq!(unacknowledged(table, 0x733C, 0x9999), Some(0x48));
        assert_eq!(unacknowledged(table, 0x9999, 0x733C), None);
        assert_eq!(unacknowledged("garbage\nx y", 1, 2), None);
    }
}
