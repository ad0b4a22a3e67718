//! What a rank says in the log while a call waits for long: who has not come, and what that one called last.
//!
//! A rank that is dead, stopped or cut off is found by its heartbeats within seconds. One that lives and does not call
//! (it evaluates, saves, or is stuck) is no error before the time limit, which is long: until then the log says
//! for whom this rank waits, after [`GroupOptions::remind_after`](crate::GroupOptions::remind_after), and then each time
//! when the wait has become twice as long.

use std::time::Duration;

use super::peers::Peers;
use crate::call::Call;
use crate::error::{list, Error};

/// The line, from the error that the wait would end with.
fn line(late: &Error, waited: Duration) -> Option<String> {
    let waited = waited.as_secs_f64();
    match late {
        Error::Timeout { rank, call, timeout, absent } if !absent.is_empty() => Some(format!(
            "rank {rank} has waited {waited:.0} s in {call} for {}; {} alive; it is an error after {:.0} s",
            list(absent),
            if absent.len() == 1 { "that rank is" } else { "those ranks are" },
            timeout.as_secs_f64(),
        )),
        Error::Stalled { rank, backend, call, timeout, .. } => Some(format!(
            "rank {rank} has waited {waited:.0} s in {call}, which every rank has called and {backend} does not end; it is an \
             error after {:.0} s",
            timeout.as_secs_f64(),
        )),
        _ => None,
    }
}

impl Peers {
    /// Says in the log for whom `call` waits, when it has waited for long. `left`: until its time is over, which would
    /// be the error `late`.
    pub(crate) fn remind(&self, call: &Call, left: Duration, late: impl FnOnce() -> Error) {
        let waited = call.timeout.saturating_sub(left);
        if !call.reminds(waited, self.liveness.remind_after) {
            return;
        }
        if let Some(line) = line(&late(), waited) {
            tracing::warn!("{line}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::{Absent, LastCall};
    use crate::fingerprint::{CallRecord, Op};

    const SECOND: Duration = Duration::from_secs(1);

    fn record(seq: u64, tag: &str) -> CallRecord {
        CallRecord {
            op: Op::Barrier,
            seq,
            dtype: None,
            len: 0,
            reduction: "",
            root: None,
            tag: tag.to_owned(),
        }
    }

    #[test]
    fn the_line_says_who_waits_where_for_whom_and_until_when() {
        let absent = |rank, last| Absent { rank, host: "a".to_owned(), pid: 811, last };
        let late = |whom| Error::Timeout {
            rank: 1,
            call: Box::new(record(412, "bucket 0")),
            timeout: SECOND * 1800,
            absent: whom,
        };
        let one = late(vec![absent(0, LastCall::Call(record(411, "loss")))]);
        assert_eq!(
            line(&one, SECOND * 30).unwrap(),
            "rank 1 has waited 30 s in barrier #412 \"bucket 0\" for rank 0 (host a, pid 811), whose last call was \
             barrier #411 \"loss\"; that rank is alive; it is an error after 1800 s"
        );
        let two = late(vec![absent(0, LastCall::Nothing), absent(2, LastCall::Unknown)]);
        let text = line(&two, SECOND * 60).unwrap();
        assert!(text.contains("called nothing yet; rank 2"), "{text}");
        assert!(text.contains("; those ranks are alive; "), "{text}");
        assert_eq!(line(&late(Vec::new()), SECOND), None);
        let stalled = Error::Stalled {
            rank: 1,
            backend: "nccl",
            call: Box::new(record(412, "bucket 0")),
            timeout: SECOND * 1800,
            said: None,
        };
        let said = line(&stalled, SECOND * 30).unwrap();
        assert!(said.contains("every rank has called and nccl does not end"), "{said}");
    }
}
