//! Steps that are begun before they are asked for, delivered in order; an error waits for the good ones before it.

use std::collections::VecDeque;

use crate::error::{Error, Result};

/// Steps under way, and what came instead of the one after them.
#[derive(Debug)]
pub(super) struct Ahead<S> {
    steps: VecDeque<S>,
    failed: Option<Error>,
    /// What the error said that was delivered: what came after it may lack a step.
    stopped: Option<String>,
}

impl<S> Default for Ahead<S> {
    fn default() -> Self {
        Ahead { steps: VecDeque::new(), failed: None, stopped: None }
    }
}

impl<S> Ahead<S> {
    /// The next step, or the error in its place, while `count` more are begun by `begin`, which gives `None` at the end of the data. It is
    /// told whether a step is needed now; if none is, it may give `None` rather than wait.
    pub(super) fn next(
        &mut self,
        count: usize,
        mut begin: impl FnMut(bool) -> Option<Result<S>>,
    ) -> Option<Result<S>> {
        if let Some(first) = &self.stopped {
            return Some(Err(phalanx_data::Error::Stopped { first: first.clone() }.into()));
        }
        while self.steps.len() <= count && self.failed.is_none() {
            match begin(self.steps.is_empty()) {
                Some(Ok(step)) => self.steps.push_back(step),
                Some(Err(error)) => self.failed = Some(error),
                None => break,
            }
        }
        if let Some(step) = self.steps.pop_front() {
            return Some(Ok(step));
        }
        let error = self.failed.take()?;
        self.stopped = Some(error.to_string());
        Some(Err(error))
    }

    /// Whether nothing is under way, not even an error.
    pub(super) fn is_empty(&self) -> bool {
        self.steps.is_empty() && self.failed.is_none()
    }

    /// What is under way.
    pub(super) fn drain(&mut self) -> impl Iterator<Item = S> + '_ {
        self.steps.drain(..)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn broken() -> Error {
        Error::NoGradients
    }

    #[test]
    fn good_steps_come_before_the_error_after_them() {
        for count in 0..4 {
            let mut number = 0;
            let mut begin = |_| {
                number += 1;
                Some(if number == 5 { Err(broken()) } else { Ok(number) })
            };
            let mut ahead = Ahead::default();
            for expected in 1..=4 {
                assert_eq!(ahead.next(count, &mut begin).unwrap().unwrap(), expected);
            }
            assert!(!ahead.is_empty() || count == 0, "the error is still to come");
            assert!(matches!(ahead.next(count, &mut begin), Some(Err(Error::NoGradients))));
            let after = ahead.next(count, &mut begin).unwrap().unwrap_err().to_string();
            assert!(after.contains(&broken().to_string()), "it stays stopped: {after}");
        }
    }

    #[test]
    fn a_step_that_is_there_waits_for_no_other() {
        let mut number = 0;
        let mut begin = |is_needed: bool| {
            // Each second one is there before it is needed.
            (is_needed || number % 2 == 1).then(|| {
                number += 1;
                Ok(number)
            })
        };
        let mut ahead = Ahead::default();
        for expected in 1..=5 {
            assert_eq!(ahead.next(1, &mut begin).unwrap().unwrap(), expected);
        }
        assert_eq!(number, 6, "the one that was there is under way");
    }

    #[test]
    fn at_the_end_all_that_is_under_way_is_delivered() {
        let mut numbers = 1..=3;
        let mut begin = |_| numbers.next().map(Ok);
        let mut ahead = Ahead::default();
        let mut next = || ahead.next(2, &mut begin).map(Result::unwrap);
        assert_eq!([next(), next(), next(), next()], [Some(1), Some(2), Some(3), None]);
    }
}
