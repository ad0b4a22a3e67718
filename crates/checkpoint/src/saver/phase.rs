//! The phases of a checkpoint that all ranks go through together. Pure.
//!
//! Writing, until each rank has written or failed; then committing on rank 0, if all have written; and, after a failure, abandoning,
//! also on rank 0. A rank says of each phase that it works, is done or has failed; all see the same reports, so all take the same step.

use super::agree::{Report, Status};

/// Where a checkpoint is on its way.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Phase {
    Writing,
    Committing,
    Abandoning(Failure),
}

/// The first rank that failed, and why.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Failure {
    pub(super) rank: usize,
    pub(super) reason: String,
}

/// What all ranks do next.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Next {
    /// Go on as before; with `true` stop writing, because somebody failed.
    Wait(bool),
    Commit,
    Abandon(Failure),
    Saved,
    Failed(Failure),
}

impl Phase {
    /// Whether this rank has something to do in it.
    pub(super) fn concerns(&self, rank: usize) -> bool {
        *self == Phase::Writing || rank == 0
    }

    /// The next step, by what all ranks report.
    pub(super) fn next(&self, reports: &[Report]) -> Next {
        let is_working = reports.iter().any(|report| report.status == Status::Working);
        let failure = first_failure(reports);
        match (self, failure, is_working) {
            (Phase::Writing, failure, true) => Next::Wait(failure.is_some()),
            (Phase::Committing | Phase::Abandoning(_), _, true) => Next::Wait(false),
            (Phase::Writing | Phase::Committing, Some(failure), false) => Next::Abandon(failure),
            (Phase::Writing, None, false) => Next::Commit,
            (Phase::Committing, None, false) => Next::Saved,
            (Phase::Abandoning(failure), ..) => Next::Failed(failure.clone()),
        }
    }
}

/// The first rank that failed by itself; one that stopped because of another is not the cause.
fn first_failure(reports: &[Report]) -> Option<Failure> {
    let cancelled = crate::Error::Cancelled.to_string();
    let failures = || {
        reports.iter().enumerate().filter_map(|(rank, report)| match &report.status {
            Status::Failed(reason) => Some(Failure { rank, reason: reason.clone() }),
            Status::Working | Status::Done => None,
        })
    };
    failures().find(|failure| failure.reason != cancelled).or_else(|| failures().next())
}

/// The ranks that still work.
pub(super) fn working(reports: &[Report]) -> Vec<usize> {
    let working = |(_, report): &(usize, &Report)| report.status == Status::Working;
    reports.iter().enumerate().filter(working).map(|(rank, _)| rank).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn next(phase: &Phase, statuses: &[&str]) -> Next {
        let report = |text: &&str| Report {
            status: match *text {
                "working" => Status::Working,
                "done" => Status::Done,
                reason => Status::Failed(reason.to_owned()),
            },
            is_late: false,
        };
        phase.next(&statuses.iter().map(report).collect::<Vec<_>>())
    }

    #[test]
    fn all_must_have_written_before_anything_is_committed() {
        use Phase::{Abandoning, Committing, Writing};
        let full = Failure { rank: 1, reason: "full".to_owned() };
        assert_eq!(next(&Writing, &["done", "working"]), Next::Wait(false));
        assert_eq!(next(&Writing, &["working", "full"]), Next::Wait(true));
        assert_eq!(next(&Writing, &["done", "done"]), Next::Commit);
        let cancelled = crate::Error::Cancelled.to_string();
        assert_eq!(next(&Writing, &[&cancelled, "full", "done"]), Next::Abandon(full.clone()));
        assert_eq!(next(&Committing, &["working", "done"]), Next::Wait(false));
        assert_eq!(next(&Committing, &["done", "done"]), Next::Saved);
        assert_eq!(next(&Committing, &["done", "full"]), Next::Abandon(full.clone()));
        let abandoning = Abandoning(full.clone());
        assert_eq!(next(&abandoning, &["working", "done"]), Next::Wait(false));
        assert_eq!(next(&abandoning, &["done", "done"]), Next::Failed(full));
        assert!(Writing.concerns(3) && !Committing.concerns(3) && Committing.concerns(0));
    }
}
