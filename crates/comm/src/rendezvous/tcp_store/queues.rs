//! The queues of a `TCPStore`: values that are taken out in the order in which they came. Pure.
//!
//! A client that wants a value waits for its queue, then takes one. One push ends one wait, so that of two clients
//! which wait the second is not sent to an empty queue.

use std::collections::{BTreeMap, VecDeque};

use super::super::table::{check_entry, STORE_BYTES_MAX};
use super::super::StoreError;

/// All queues, by key.
#[derive(Debug, Default)]
pub(super) struct Queues {
    queues: BTreeMap<String, Queue>,
    bytes: usize,
}

#[derive(Debug, Default)]
struct Queue {
    values: VecDeque<Vec<u8>>,
    /// Clients that wait.
    waiting: usize,
    /// How many of them may stop: at most one for each push.
    woken: usize,
}

impl Queues {
    pub(super) fn push(&mut self, key: &str, value: Vec<u8>) -> Result<(), StoreError> {
        check_entry(key, &value)?;
        let bytes = self.bytes + cost(key, &value);
        if bytes > STORE_BYTES_MAX {
            return Err(StoreError::Full { max: STORE_BYTES_MAX });
        }
        self.bytes = bytes;
        let queue = self.queues.entry(key.to_owned()).or_default();
        queue.values.push_back(value);
        queue.woken = queue.waiting.min(queue.woken + 1);
        Ok(())
    }

    /// How many values there were, and the first of them.
    pub(super) fn pop(&mut self, key: &str) -> (usize, Option<Vec<u8>>) {
        let Some(queue) = self.queues.get_mut(key) else { return (0, None) };
        let count = queue.values.len();
        let value = queue.values.pop_front();
        self.bytes -= value.as_ref().map_or(0, |value| cost(key, value));
        self.tidy(key);
        (count, value)
    }

    pub(super) fn len(&self, key: &str) -> usize {
        self.queues.get(key).map_or(0, |queue| queue.values.len())
    }

    /// A client begins to wait for the queue.
    pub(super) fn enter(&mut self, key: &str) {
        self.queues.entry(key.to_owned()).or_default().waiting += 1;
    }

    /// Whether one that waits may stop.
    pub(super) fn wakes(&self, key: &str) -> bool {
        self.queues.get(key).is_some_and(|queue| queue.woken > 0 && !queue.values.is_empty())
    }

    /// A client waits no longer: it was woken, has called its wait off, or is gone.
    pub(super) fn leave(&mut self, key: &str, was_woken: bool) {
        let Some(queue) = self.queues.get_mut(key) else { return };
        queue.waiting = queue.waiting.saturating_sub(1);
        queue.woken = queue.woken.saturating_sub(usize::from(was_woken)).min(queue.waiting);
        self.tidy(key);
    }

    fn tidy(&mut self, key: &str) {
        if self.queues.get(key).is_some_and(|queue| queue.values.is_empty() && queue.waiting == 0) {
            self.queues.remove(key);
        }
    }
}

fn cost(key: &str, value: &[u8]) -> usize {
    key.len() + value.len()
}

#[cfg(test)]
mod tests {
    use super::super::super::table::VALUE_BYTES_MAX;
    use super::*;

    #[test]
    fn values_come_out_in_their_order_and_leave_nothing() {
        let mut queues = Queues::default();
        assert_eq!(queues.pop("q"), (0, None));
        queues.push("q", vec![1]).unwrap();
        queues.push("q", vec![2, 2]).unwrap();
        assert_eq!((queues.len("q"), queues.len("other")), (2, 0));
        assert_eq!(queues.pop("q"), (2, Some(vec![1])));
        assert_eq!(queues.pop("q"), (1, Some(vec![2, 2])));
        assert_eq!(queues.pop("q"), (0, None));
        assert_eq!((queues.bytes, queues.queues.len()), (0, 0));
    }

    #[test]
    fn a_push_ends_one_wait() {
        let mut queues = Queues::default();
        queues.enter("q");
        queues.enter("q");
        assert!(!queues.wakes("q"));
        queues.push("q", vec![1]).unwrap();
        assert!(queues.wakes("q"));
        queues.leave("q", true);
        assert!(!queues.wakes("q"), "the second waits on");
        queues.push("q", vec![2]).unwrap();
        assert!(queues.wakes("q"));
        queues.leave("q", true);
        assert_eq!(queues.len("q"), 2);
    }

    #[test]
    fn a_wait_that_is_called_off_takes_nobodys_turn() {
        let mut queues = Queues::default();
        queues.enter("q");
        queues.enter("q");
        queues.push("q", vec![1]).unwrap();
        queues.leave("q", false);
        assert!(queues.wakes("q"), "the other's");
        queues.leave("q", false);
        assert!(!queues.wakes("q"));
        assert_eq!(queues.pop("q"), (1, Some(vec![1])));
        assert!(queues.queues.is_empty());
    }

    #[test]
    fn all_queues_together_are_bounded() {
        let mut queues = Queues::default();
        let value = vec![0; VALUE_BYTES_MAX];
        let mut pushed = 0;
        while queues.push(&format!("{pushed:02}"), value.clone()).is_ok() {
            pushed += 1;
        }
        assert_eq!(pushed, STORE_BYTES_MAX / (VALUE_BYTES_MAX + 2));
        queues.pop("00");
        queues.push("again", value).unwrap();
        assert!(matches!(
            queues.push("q", vec![0; VALUE_BYTES_MAX + 1]),
            Err(StoreError::ValueTooLong { .. })
        ));
    }
}
