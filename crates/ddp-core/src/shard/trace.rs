//! In which order a step needs its buckets: what is gathered ahead. Pure.

/// So much of a step is remembered: more are evaluations without a step between them.
const MOST: usize = 1 << 14;

/// The order of the last step, and how far this one has come.
#[derive(Debug, Default)]
pub(crate) struct Trace {
    last: Vec<usize>,
    now: Vec<usize>,
    /// Where in `last` the bucket that was needed last stands.
    at: usize,
}

impl Trace {
    /// `bucket` was not here and is needed; says which one will be next, if the last step tells.
    pub(crate) fn needed(&mut self, bucket: usize) -> Option<usize> {
        if self.now.len() < MOST {
            self.now.push(bucket);
        }
        let from = self.at.min(self.last.len());
        let behind = self.last[from..].iter().position(|&other| other == bucket);
        let found = match behind {
            Some(distance) => Some(from + distance),
            None => self.last.iter().position(|&other| other == bucket),
        };
        self.at = found? + 1;
        self.last.get(self.at).copied()
    }

    /// The step is over: the next one will be like it.
    pub(crate) fn turn(&mut self) {
        if !self.now.is_empty() {
            self.last = std::mem::take(&mut self.now);
        }
        self.at = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_next_one_is_what_it_was_in_the_last_step() {
        let mut trace = Trace::default();
        let step = [3, 2, 1, 1, 2, 3];
        assert!(step.iter().all(|&bucket| trace.needed(bucket).is_none()), "nothing is known");
        trace.turn();
        let told: Vec<_> = step.iter().map(|&bucket| trace.needed(bucket)).collect();
        assert_eq!(told, [Some(2), Some(1), Some(1), Some(2), Some(3), None]);
        trace.turn();
        // Another way, and back.
        assert_eq!(trace.needed(1), Some(1));
        assert_eq!(trace.needed(3), None);
        assert_eq!(trace.needed(3), Some(2));
        assert_eq!(trace.needed(7), None);
        trace.turn();
        trace.turn();
        assert_eq!(trace.needed(1), Some(3), "a turn without a step changes nothing");
    }

    #[test]
    fn what_no_step_ends_is_remembered_up_to_a_limit() {
        let mut trace = Trace::default();
        (0..MOST + 9).for_each(|at| assert_eq!(trace.needed(at % 7), None));
        assert_eq!(trace.now.len(), MOST);
    }
}
