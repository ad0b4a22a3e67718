//! Whether a job that failed is started again: a budget of restarts, in all or per time, and an end to crash loops. Pure:
//! times and steps are given.
//!
//! Source: the budget without a window is that of `torchrun --max-restarts`; with one, of OTP's supervisors
//! (`intensity` and `period`).

use std::collections::VecDeque;
use std::fmt;
use std::time::Duration;

use crate::process::Exit;

/// What the user allows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Limits {
    /// So many restarts …
    pub(crate) restarts_max: u32,
    /// … in a time as long as this. `None`: in all.
    pub(crate) window: Option<Duration>,
    /// So many attempts one after the other may come no further than the one before them.
    pub(crate) attempts_in_vain_max: u32,
}

/// How an attempt ended, as far as it matters here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Ending {
    /// A rank asked to be started again (exit code 75).
    Asked,
    /// A failure that may not come again.
    Failed,
    /// A failure that comes again: wrong usage (64) or damaged data (65).
    Certain(i32),
}

impl Ending {
    pub(crate) const fn of(exit: Exit) -> Self {
        match exit {
            Exit::Code(75) => Self::Asked,
            Exit::Code(code @ (64 | 65)) => Self::Certain(code),
            Exit::Code(_) | Exit::Signal(_) | Exit::Not => Self::Failed,
        }
    }
}

/// What is done about it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Decision {
    /// Start all ranks again; it is restart number …
    Restart {
        number: u32,
    },
    GiveUp(GiveUp),
}

/// Why a job that failed is not started again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum GiveUp {
    /// Nobody asked for restarts.
    NotWanted,
    /// The failure would come again: the exit code of wrong usage or damaged data.
    Certain {
        /// The rank's exit code.
        code: i32,
    },
    /// As many restarts as were allowed.
    BudgetSpent {
        /// How many.
        restarts: u32,
        /// Within which time; `None`: in all.
        window: Option<Duration>,
    },
    /// A crash loop.
    NoProgress {
        /// The furthest step.
        step: u64,
        /// Attempts one after the other that came no further.
        attempts: u32,
    },
}

impl fmt::Display for GiveUp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotWanted => write!(f, "no restart was asked for"),
            Self::Certain { code } => {
                write!(f, "exit code {code} would come again (64: usage, 65: data)")
            }
            Self::BudgetSpent { restarts, window: None } => {
                write!(f, "{restarts} restarts are used up")
            }
            Self::BudgetSpent { restarts, window: Some(window) } => {
                write!(f, "{restarts} restarts within {} s are used up", window.as_secs_f64())
            }
            Self::NoProgress { step, attempts } => {
                write!(f, "no progress since step {step} in {attempts} attempts")
            }
        }
    }
}

/// What has happened so far, and what follows from it.
#[derive(Clone, Debug)]
pub(crate) struct Policy {
    limits: Limits,
    /// When those restarts were that count against the budget, oldest first.
    counted: VecDeque<Duration>,
    restarts: u32,
    furthest: Option<u64>,
    /// Attempts one after the other whose furthest step is `furthest`, or that came no further.
    in_vain: u32,
}

impl Policy {
    pub(crate) const fn new(limits: Limits) -> Self {
        Self { limits, counted: VecDeque::new(), restarts: 0, furthest: None, in_vain: 0 }
    }

    /// How often the job was started again.
    pub(crate) const fn restarts(&self) -> u32 {
        self.restarts
    }

    /// The number of the last restart beside what was allowed: `1/3`, or `1 (of 3 in 600 s)`.
    pub(crate) fn count_text(&self) -> String {
        let (restarts, Limits { restarts_max, window, .. }) = (self.restarts, self.limits);
        match window {
            None => format!("{restarts}/{restarts_max}"),
            Some(window) => format!("{restarts} (of {restarts_max} in {} s)", window.as_secs_f64()),
        }
    }

    /// Decides about an attempt that ended `at` (since the job's start), whose furthest step was `step`.
    ///
    /// A rank that asks for it after progress is started again whatever the budget: that is how programs with a limited
    /// life go on. Without progress its restart counts as any other.
    pub(crate) fn decide(&mut self, ending: Ending, step: Option<u64>, at: Duration) -> Decision {
        let has_progress = self.note_progress(step);
        let Limits { restarts_max, window, attempts_in_vain_max } = self.limits;
        if restarts_max == 0 {
            return Decision::GiveUp(GiveUp::NotWanted);
        }
        if let Ending::Certain(code) = ending {
            return Decision::GiveUp(GiveUp::Certain { code });
        }
        if let Some(furthest) = self.furthest.filter(|_| self.in_vain >= attempts_in_vain_max) {
            let attempts = self.in_vain;
            return Decision::GiveUp(GiveUp::NoProgress { step: furthest, attempts });
        }
        let is_free = ending == Ending::Asked && has_progress;
        if !is_free {
            self.forget_before(at);
            if self.counted.len() >= usize::try_from(restarts_max).unwrap_or(usize::MAX) {
                return Decision::GiveUp(GiveUp::BudgetSpent { restarts: restarts_max, window });
            }
            self.counted.push_back(at);
        }
        self.restarts += 1;
        Decision::Restart { number: self.restarts }
    }

    /// Whether the attempt came further than any before.
    fn note_progress(&mut self, step: Option<u64>) -> bool {
        let has_progress = step > self.furthest;
        if has_progress {
            self.furthest = step;
            self.in_vain = 0;
        }
        self.in_vain += 1;
        has_progress
    }

    fn forget_before(&mut self, at: Duration) {
        let Some(window) = self.limits.window else { return };
        while self.counted.front().is_some_and(|then| at.saturating_sub(*then) >= window) {
            self.counted.pop_front();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn limits(restarts_max: u32) -> Limits {
        Limits { restarts_max, window: None, attempts_in_vain_max: 3 }
    }

    fn seconds(count: u64) -> Duration {
        Duration::from_secs(count)
    }

    /// What is decided when attempts end like this, a second apart.
    fn decisions(limits: Limits, attempts: &[(Ending, Option<u64>)]) -> Vec<Decision> {
        let mut policy = Policy::new(limits);
        let at = |index: usize| Duration::from_secs(index as u64);
        let each = attempts.iter().enumerate();
        each.map(|(index, (ending, step))| policy.decide(*ending, *step, at(index))).collect()
    }

    const fn restart(number: u32) -> Decision {
        Decision::Restart { number }
    }

    #[test]
    fn the_budget_is_exact() {
        for restarts_max in 1..5 {
            let failed = vec![(Ending::Failed, None); restarts_max as usize + 1];
            let mut expected: Vec<_> = (1..=restarts_max).map(restart).collect();
            let spent = GiveUp::BudgetSpent { restarts: restarts_max, window: None };
            expected.push(Decision::GiveUp(spent));
            assert_eq!(decisions(limits(restarts_max), &failed), expected);
        }
        assert_eq!(
            decisions(limits(0), &[(Ending::Asked, Some(1))]),
            [Decision::GiveUp(GiveUp::NotWanted)]
        );
    }

    #[test]
    fn a_budget_per_time_comes_back() {
        let window = Some(seconds(10));
        let mut policy = Policy::new(Limits { window, ..limits(2) });
        let mut decide = |at| policy.decide(Ending::Failed, None, seconds(at));
        assert_eq!([0, 5].map(&mut decide), [restart(1), restart(2)]);
        let spent = Decision::GiveUp(GiveUp::BudgetSpent { restarts: 2, window });
        assert_eq!(decide(9), spent);
        assert_eq!(decide(10), restart(3), "the first is ten seconds old");
        assert_eq!(decide(14), spent);
    }

    #[test]
    fn attempts_that_come_no_further_are_a_crash_loop() {
        let at = |step| (Ending::Failed, Some(step));
        let loops = |step| Decision::GiveUp(GiveUp::NoProgress { step, attempts: 3 });
        let same = decisions(limits(9), &[at(120), at(120), at(120)]);
        assert_eq!(same, [restart(1), restart(2), loops(120)]);
        let less = decisions(limits(9), &[at(120), at(110), (Ending::Failed, None)]);
        assert_eq!(less, [restart(1), restart(2), loops(120)]);
        let further = decisions(limits(9), &[at(1), at(1), at(2), at(2), at(2)]);
        assert_eq!(further[..4], [1, 2, 3, 4].map(restart));
        assert_eq!(further[4], loops(2));
        // Of a program that tells no steps nothing is known.
        let silent = decisions(limits(9), &[(Ending::Failed, None); 9]);
        assert_eq!(silent, (1..=9).map(restart).collect::<Vec<_>>());
    }

    #[test]
    fn what_would_come_again_is_not_tried_again() {
        for code in [64, 65] {
            let ending = Ending::of(Exit::Code(code));
            let expected = [Decision::GiveUp(GiveUp::Certain { code })];
            assert_eq!(decisions(limits(3), &[(ending, Some(1))]), expected);
        }
        for exit in [Exit::Code(1), Exit::Code(69), Exit::Code(0), Exit::Signal(9), Exit::Not] {
            assert_eq!(Ending::of(exit), Ending::Failed, "{exit:?}");
        }
    }

    #[test]
    fn who_asks_after_progress_is_started_again_for_ever() {
        let asked: Vec<_> = (0..50).map(|step| (Ending::Asked, Some(step))).collect();
        assert_eq!(decisions(limits(1), &asked).last(), Some(&restart(50)));
        let idle = decisions(limits(1), &[(Ending::Asked, None), (Ending::Asked, None)]);
        assert!(matches!(idle[1], Decision::GiveUp(GiveUp::BudgetSpent { .. })), "{idle:?}");
    }

    #[test]
    fn the_reason_is_one_phrase() {
        let text = |why: GiveUp| why.to_string();
        let no_progress = GiveUp::NoProgress { step: 120, attempts: 3 };
        assert_eq!(text(no_progress), "no progress since step 120 in 3 attempts");
        let spent = |window| GiveUp::BudgetSpent { restarts: 3, window };
        assert_eq!(text(spent(None)), "3 restarts are used up");
        assert_eq!(text(spent(Some(seconds(600)))), "3 restarts within 600 s are used up");
    }
}
