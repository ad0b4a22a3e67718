//! Which buckets may start: the readiness of one backward. Pure: no clock, no thread, no peer.
//!
//! Gradients become ready in any order; buckets are handed out strictly by index, so that every rank starts
//! the same collectives in the same order whatever its autograd engine does first.

use std::ops::Range;

/// What is ready in the backward that is running.
#[derive(Clone, Debug)]
pub struct Ready {
    bucket_of: Vec<usize>,
    sizes: Vec<usize>,
    pending: Vec<usize>,
    marked: Vec<bool>,
    next: usize,
}

/// A gradient was ready a second time in one backward.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MarkedTwice {
    /// Registration index of the parameter.
    pub parameter: usize,
}

impl Ready {
    /// Nothing ready; `bucket_of[parameter]` says which of `bucket_count` buckets a parameter is in.
    #[must_use]
    pub fn new(bucket_of: Vec<usize>, bucket_count: usize) -> Self {
        let mut sizes = vec![0; bucket_count];
        for &bucket in &bucket_of {
            sizes[bucket] += 1;
        }
        let marked = vec![false; bucket_of.len()];
        Self { bucket_of, pending: sizes.clone(), sizes, marked, next: 0 }
    }

    /// Marks a parameter's gradient as ready; returns the buckets that may start because of it.
    ///
    /// # Errors
    /// [`MarkedTwice`] when it was marked before in this backward.
    pub fn mark(&mut self, parameter: usize) -> Result<Range<usize>, MarkedTwice> {
        if std::mem::replace(&mut self.marked[parameter], true) {
            return Err(MarkedTwice { parameter });
        }
        self.pending[self.bucket_of[parameter]] -= 1;
        let start = self.next;
        while self.next < self.pending.len() && self.pending[self.next] == 0 {
            self.next += 1;
        }
        Ok(start..self.next)
    }

    /// Whether every bucket was handed out.
    #[must_use]
    pub fn is_complete(&self) -> bool {
        self.next == self.pending.len()
    }

    /// Parameters whose gradient is not ready, by registration index.
    #[must_use]
    pub fn missing(&self) -> Vec<usize> {
        (0..self.marked.len()).filter(|&parameter| !self.marked[parameter]).collect()
    }

    /// Forgets this backward.
    pub fn reset(&mut self) {
        self.pending.clone_from(&self.sizes);
        self.marked.fill(false);
        self.next = 0;
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
            let mut ready = Ready::new(bucket_of.clone(), 4);
            let mut started = Vec::new();
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
    fn what_is_missing_is_named_and_a_second_backward_starts_afresh() {
        let mut ready = Ready::new(vec![0, 1, 1], 2);
        assert_eq!(ready.mark(1), Ok(0..0));
        assert_eq!(ready.mark(0), Ok(0..1));
        assert_eq!(ready.missing(), [2]);
        assert!(!ready.is_complete());
        ready.reset();
        assert_eq!(ready.missing(), [0, 1, 2]);
        assert_eq!(ready.mark(0), Ok(0..1));
    }

    #[test]
    fn a_gradient_that_is_ready_twice_is_refused() {
        let mut ready = Ready::new(vec![0, 0], 1);
        assert_eq!(ready.mark(0), Ok(0..0));
        assert_eq!(ready.mark(0), Err(MarkedTwice { parameter: 0 }));
    }
}
