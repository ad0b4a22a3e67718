//! Which checkpoints are kept. Pure.

/// What is kept of the checkpoints in a folder.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Keep {
    /// The newest so many; at least 1. With 2, damage to the newest costs no more than the steps between.
    pub last: usize,
    /// And for ever those whose step is a multiple of this.
    pub every: Option<u64>,
}

impl Default for Keep {
    fn default() -> Self {
        Keep { last: 2, every: None }
    }
}

impl Keep {
    /// The steps that go, of complete checkpoints, after one of step `saved` was written.
    ///
    /// What is newer than that one belongs to a run that was given up; it is neither counted nor removed.
    pub(crate) fn removed(&self, steps: &[u64], saved: u64) -> Vec<u64> {
        let mut older: Vec<u64> = steps.iter().copied().filter(|step| *step < saved).collect();
        older.sort_unstable();
        let spare = older.len().saturating_sub(self.last.max(1) - 1);
        older.truncate(spare);
        older.retain(|step| self.every.is_none_or(|every| every == 0 || step % every != 0));
        older
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_and_every_nth_stay() {
        let steps = [100, 200, 250, 300, 400];
        let removed = |last, every, saved| Keep { last, every }.removed(&steps, saved);
        assert_eq!(removed(2, None, 400), [100, 200, 250]);
        assert_eq!(removed(1, Some(200), 400), [100, 250, 300]);
        assert_eq!(removed(0, None, 400), [100, 200, 250, 300], "one is always kept");
        assert_eq!(removed(9, None, 400), [0; 0]);
        assert_eq!(removed(1, None, 250), [100, 200], "what is newer is not ours to judge");
        assert_eq!(removed(1, Some(0), 300), [100, 200, 250]);
    }
}
