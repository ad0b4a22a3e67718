//! Which buckets may start: the readiness of one backward. Pure: no clock, no thread, no peer.
//!
//! Gradients become ready in any order; buckets are handed out strictly by index, so that every rank starts
//! the same collectives in the same order whatever its autograd engine does first.

use std::ops::Range;

/// What is ready in the backward that is running.
#[derive(Clone, Debug)]
pub(crate) struct Ready {
    bucket_of: Vec<usize>,
    /// By parameter: gradients that are still to come.
    left: Vec<u32>,
    /// By bucket: parameters that are not ready.
    pending: Vec<usize>,
    next: usize,
}

/// A gradient came after its bucket was handed out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct TooLate {
    /// Number of the parameter.
    pub(crate) parameter: usize,
}

impl Ready {
    /// Nothing ready; `bucket_of[parameter]` says which of `bucket_count` buckets a parameter is in, and
    /// `expected[parameter]` how many gradients it gets: none where it is frozen or unused.
    ///
    /// # Panics
    /// If the two lists differ in length, or a bucket does not exist: our bug.
    #[must_use]
    pub(crate) fn new(bucket_of: Vec<usize>, bucket_count: usize, expected: Vec<u32>) -> Self {
        assert_eq!(bucket_of.len(), expected.len(), "each parameter is expected some times");
        let mut pending = vec![0; bucket_count];
        for (&bucket, &count) in bucket_of.iter().zip(&expected) {
            pending[bucket] += usize::from(count > 0);
        }
        Self { bucket_of, left: expected, pending, next: 0 }
    }

    /// Hands out the buckets that are full.
    pub(crate) fn startable(&mut self) -> Range<usize> {
        let start = self.next;
        while self.next < self.pending.len() && self.pending[self.next] == 0 {
            self.next += 1;
        }
        start..self.next
    }

    /// The bucket that starts next; as many as there are when none is left.
    #[must_use]
    pub(crate) fn next(&self) -> usize {
        self.next
    }

    /// Marks one gradient of a parameter; returns the buckets that may start because of it. One more than
    /// expected is fine as long as the bucket has not started: it is in there.
    ///
    /// # Errors
    /// [`TooLate`] when the bucket was handed out before.
    pub(crate) fn mark(&mut self, parameter: usize) -> Result<Range<usize>, TooLate> {
        let bucket = self.bucket_of[parameter];
        if bucket < self.next {
            return Err(TooLate { parameter });
        }
        match self.left[parameter] {
            0 => return Ok(self.next..self.next),
            1 => self.pending[bucket] -= 1,
            _ => {}
        }
        self.left[parameter] -= 1;
        Ok(self.startable())
    }

    /// Takes a parameter for ready, however many gradients are still to come.
    pub(crate) fn settle(&mut self, parameter: usize) -> Range<usize> {
        if std::mem::take(&mut self.left[parameter]) > 0 {
            self.pending[self.bucket_of[parameter]] -= 1;
        }
        self.startable()
    }

    /// Whether every bucket was handed out.
    #[cfg(test)]
    fn is_complete(&self) -> bool {
        self.next == self.pending.len()
    }

    /// Parameters for which gradients are still to come, by number.
    #[must_use]
    pub(crate) fn missing(&self) -> Vec<usize> {
        (0..self.left.len()).filter(|&parameter| self.left[parameter] > 0).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn permutations(items: &[usize]) -> Vec<Vec<usize>> {
        if items.is_empty() {
            return vec![Vec::new()];
        }
        let mut all = Vec::new();
        for (at, &first) in items.iter().enumerate() {
            let mut rest = items.to_vec();
            rest.remove(at);
            for mut tail in permutations(&rest) {
                tail.insert(0, first);
                all.push(tail);
            }
        }
        all
    }

    #[test]
    fn buckets_start_by_index_in_every_arrival_order() {
        let bucket_of = vec![2, 2, 1, 0, 0, 3];
        for order in permutations(&[0, 1, 2, 3, 4, 5]) {
            let mut ready = Ready::new(bucket_of.clone(), 4, vec![1; 6]);
            let mut started: Vec<usize> = ready.startable().collect();
            for (count, &parameter) in order.iter().enumerate() {
                started.extend(ready.mark(parameter).unwrap());
                for bucket in &started {
                    let full = (0..6).filter(|&p| bucket_of[p] == *bucket);
                    assert!(
                        full.clone().all(|p| order[..=count].contains(&p)),
                        "started too early"
                    );
                }
            }
            assert_eq!(started, [0, 1, 2, 3]);
            assert!(ready.is_complete());
            assert!(ready.missing().is_empty());
        }
    }

    #[test]
    fn frozen_parameters_are_not_waited_for() {
        let mut ready = Ready::new(vec![0, 1, 1, 2], 3, vec![0, 1, 0, 0]);
        assert_eq!(ready.startable(), 0..1);
        assert_eq!(ready.missing(), [1]);
        assert_eq!(ready.mark(1), Ok(1..3));
        assert!(ready.is_complete());
    }

    #[test]
    fn a_parameter_is_ready_with_the_last_of_its_gradients() {
        let mut ready = Ready::new(vec![0, 0], 1, vec![2, 1]);
        assert_eq!(ready.mark(0), Ok(0..0));
        assert_eq!(ready.mark(1), Ok(0..0));
        assert_eq!(ready.missing(), [0]);
        assert_eq!(ready.mark(0), Ok(0..1));
    }

    #[test]
    fn what_is_missing_is_named_and_can_be_settled() {
        let mut ready = Ready::new(vec![0, 1, 1], 2, vec![1, 1, 3]);
        assert_eq!(ready.mark(1), Ok(0..0));
        assert_eq!(ready.mark(0), Ok(0..1));
        assert_eq!(ready.missing(), [2]);
        assert!(!ready.is_complete());
        assert_eq!(ready.settle(2), 1..2);
        assert_eq!(ready.settle(2), 2..2);
        assert!(ready.is_complete());
    }

    #[test]
    fn a_gradient_more_is_fine_until_its_bucket_has_started() {
        let mut ready = Ready::new(vec![0, 1], 2, vec![1, 1]);
        assert_eq!(ready.mark(1), Ok(0..0));
        assert_eq!(ready.mark(1), Ok(0..0));
        assert_eq!(ready.mark(0), Ok(0..2));
        assert_eq!(ready.mark(1), Err(TooLate { parameter: 1 }));
    }
}
