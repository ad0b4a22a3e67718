//! Which of several ranks that failed at about the same time is the cause. Pure: times are given.

use std::time::{Duration, Instant};

use crate::process::Exit;

/// A rank that ended because a peer is gone may be seen before that peer.
const CAUSE_WAIT: Duration = Duration::from_millis(500);
/// The launcher of another node, whose rank is accused, knows more of it, and says so in this time.
const ELSEWHERE_WAIT: Duration = Duration::from_secs(2);
/// What the others, who lose a peer in this moment, have to say is a part of the report.
const WITNESS_WAIT: Duration = Duration::from_millis(100);

/// Whom a rank's record blames for the failure of its group.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Accuses {
    /// It has no record.
    Unknown,
    Nobody,
    /// Another rank of this launcher.
    Here,
    /// A rank of another node.
    Elsewhere,
}

/// A rank that failed, and until when a likelier cause is waited for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Suspect {
    suspicion: u8,
    pub(crate) at: usize,
    pub(crate) decide_at: Instant,
    /// Another node may have more to say, though all ranks of this one have ended.
    pub(crate) is_of_elsewhere: bool,
}

impl Suspect {
    /// Whether it is more than a consequence of somebody else's failure: nobody likelier is to be expected when all
    /// others have said what they saw.
    pub(crate) const fn is_cause(&self) -> bool {
        self.suspicion > CONSEQUENCE
    }

    /// The likelier of the suspect so far and rank `at`, which has ended `now`.
    pub(crate) fn likelier(
        so_far: Option<Self>,
        at: usize,
        exit: Exit,
        accuses: Accuses,
        now: Instant,
    ) -> Option<Self> {
        let suspicion = suspicion(exit, matches!(accuses, Accuses::Here | Accuses::Elsewhere));
        if suspicion <= so_far.map_or(0, |suspect| suspect.suspicion) {
            return so_far;
        }
        let wait = match accuses {
            Accuses::Elsewhere => ELSEWHERE_WAIT,
            _ if suspicion == CONSEQUENCE => CAUSE_WAIT,
            Accuses::Here | Accuses::Nobody => WITNESS_WAIT,
            Accuses::Unknown => Duration::ZERO,
        };
        let is_of_elsewhere = accuses == Accuses::Elsewhere;
        Some(Self { suspicion, at, decide_at: now + wait, is_of_elsewhere })
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
    fn blamed(ends: &[(Exit, Accuses)]) -> Option<(usize, Duration)> {
        let now = Instant::now();
        let suspect = ends.iter().enumerate().fold(None, |so_far, (at, (exit, accuses))| {
            Suspect::likelier(so_far, at, *exit, *accuses, now)
        });
        suspect.map(|suspect| (suspect.at, suspect.decide_at - now))
    }

    #[test]
    fn who_ends_well_is_no_suspect() {
        assert_eq!(
            blamed(&[(Exit::Code(0), Accuses::Nobody), (Exit::Code(0), Accuses::Unknown)]),
            None
        );
    }

    #[test]
    fn a_death_comes_before_what_follows_from_it() {
        let (gone, killed) = ((Exit::Code(69), Accuses::Here), (Exit::Signal(9), Accuses::Nobody));
        assert_eq!(blamed(&[gone, killed]), Some((1, WITNESS_WAIT)));
        assert_eq!(blamed(&[killed, gone]), Some((0, WITNESS_WAIT)));
        assert_eq!(blamed(&[gone, gone]), Some((0, CAUSE_WAIT)), "a likelier cause is waited for");
    }

    #[test]
    fn a_panic_over_another_ranks_failure_is_a_consequence() {
        let (panicked, over_another) =
            ((Exit::Code(101), Accuses::Nobody), (Exit::Code(101), Accuses::Here));
        assert_eq!(blamed(&[over_another, panicked]), Some((1, WITNESS_WAIT)));
        let aborted_over_another = (Exit::Signal(6), Accuses::Here);
        let failed = (Exit::Code(1), Accuses::Unknown);
        assert_eq!(blamed(&[aborted_over_another, failed]), Some((1, Duration::ZERO)));
    }

    #[test]
    fn the_node_of_an_accused_rank_has_time_to_speak() {
        let over_another = (Exit::Code(101), Accuses::Elsewhere);
        assert_eq!(blamed(&[over_another]), Some((0, ELSEWHERE_WAIT)));
    }

    #[test]
    fn of_equals_the_first_stays() {
        let panicked = (Exit::Code(101), Accuses::Nobody);
        assert_eq!(blamed(&[panicked, panicked]).map(|(at, _)| at), Some(0));
    }
}
