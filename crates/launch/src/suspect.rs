//! Which of several ranks that failed at about the same time is the cause. Pure: times are given.

use std::time::{Duration, Instant};

use crate::process::Exit;

/// A rank that ended because a peer is gone may be seen before that peer.
const CAUSE_WAIT: Duration = Duration::from_millis(500);
/// What the others, who lose a peer in this moment, have to say is a part of the report.
const WITNESS_WAIT: Duration = Duration::from_millis(100);

/// A rank that failed, and until when a likelier cause is waited for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Suspect {
    suspicion: u8,
    pub(crate) at: usize,
    pub(crate) decide_at: Instant,
}

impl Suspect {
    /// The likelier of the suspect so far and rank `at`, which has ended `now`. `accuses`: whether its record names
    /// another rank; `None` without a record.
    pub(crate) fn likelier(
        so_far: Option<Self>,
        at: usize,
        exit: Exit,
        accuses: Option<bool>,
        now: Instant,
    ) -> Option<Self> {
        let suspicion = suspicion(exit, accuses == Some(true));
        if suspicion <= so_far.map_or(0, |suspect| suspect.suspicion) {
            return so_far;
        }
        let wait = match accuses {
            _ if suspicion == CONSEQUENCE => CAUSE_WAIT,
            Some(_) => WITNESS_WAIT,
            None => Duration::ZERO,
        };
        Some(Self { suspicion, at, decide_at: now + wait })
    }
}

/// The suspicion of what follows from another rank's failure.
const CONSEQUENCE: u8 = 1;

/// Of ranks that failed in the same instant, the likeliest cause: a death by signal or a panic before an ordinary error,
/// and that before "a peer is gone" (69) or "timed out" (124), which are consequences.
const fn suspicion(exit: Exit, accuses_another: bool) -> u8 {
    match exit {
        Exit::Code(0) | Exit::Not => 0,
        Exit::Code(69 | 124) => CONSEQUENCE,
        // A panic or an abort over an error that names another rank is no cause either.
        Exit::Code(_) | Exit::Signal(6) if accuses_another => CONSEQUENCE,
        Exit::Code(101) => 3,
        Exit::Code(_) => 2,
        Exit::Signal(_) => 4,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Who is blamed when ranks 0, 1, … end like this, one after the other, and how long that waits.
    fn blamed(ends: &[(Exit, Option<bool>)]) -> Option<(usize, Duration)> {
        let now = Instant::now();
        let suspect = ends.iter().enumerate().fold(None, |so_far, (at, (exit, accuses))| {
            Suspect::likelier(so_far, at, *exit, *accuses, now)
        });
        suspect.map(|suspect| (suspect.at, suspect.decide_at - now))
    }

    #[test]
    fn who_ends_well_is_no_suspect() {
        assert_eq!(blamed(&[(Exit::Code(0), Some(false)), (Exit::Code(0), None)]), None);
    }

    #[test]
    fn a_death_comes_before_what_follows_from_it() {
        let (gone, killed) = ((Exit::Code(69), Some(true)), (Exit::Signal(9), Some(false)));
        assert_eq!(blamed(&[gone, killed]), Some((1, WITNESS_WAIT)));
        assert_eq!(blamed(&[killed, gone]), Some((0, WITNESS_WAIT)));
        assert_eq!(blamed(&[gone, gone]), Some((0, CAUSE_WAIT)), "a likelier cause is waited for");
    }

    #[test]
    fn a_panic_over_another_ranks_failure_is_a_consequence() {
        let (panicked, over_another) =
            ((Exit::Code(101), Some(false)), (Exit::Code(101), Some(true)));
        assert_eq!(blamed(&[over_another, panicked]), Some((1, WITNESS_WAIT)));
        let aborted_over_another = (Exit::Signal(6), Some(true));
        let failed = (Exit::Code(1), None);
        assert_eq!(blamed(&[aborted_over_another, failed]), Some((1, Duration::ZERO)));
    }

    #[test]
    fn of_equals_the_first_stays() {
        let panicked = (Exit::Code(101), Some(false));
        assert_eq!(blamed(&[panicked, panicked]).map(|(at, _)| at), Some(0));
    }
}
