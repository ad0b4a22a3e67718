//! Whose loader is too slow: the share of the steps' time that each rank waited for data.

/// Steps that are looked at together: a single one that waits says nothing.
const WINDOW_STEPS: u32 = 10;

/// A loader becomes slow when its rank waits for this share of a window, and is slow until the
/// share is less than half of it.
const SLOW_MIN: f64 = 0.2;

/// A rank whose model waits for its loader.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub struct SlowLoader {
    /// The rank.
    pub rank: usize,
    /// Which share of the last steps it waited for data, from 0 to 1.
    pub share: f64,
}

/// Adds up how long each rank waits for data, where the times of all ranks
/// ([`Step::data_wait`](crate::Step::data_wait)) have been gathered.
///
/// A step takes as long on every rank as on the slowest one, so that the duration of one rank's
/// steps is that of all.
#[derive(Clone, Debug)]
pub struct WaitShares {
    ranks: Vec<Waits>,
    /// Steps and time of the window, and the time of all steps.
    steps: u32,
    time: f64,
    time_total: f64,
    is_first: bool,
}

#[derive(Clone, Copy, Debug, Default)]
struct Waits {
    window: f64,
    total: f64,
    is_slow: bool,
}

impl WaitShares {
    /// For so many ranks.
    pub fn new(world_size: usize) -> Self {
        WaitShares {
            ranks: vec![Waits::default(); world_size],
            steps: 0,
            time: 0.0,
            time_total: 0.0,
            is_first: true,
        }
    }

    /// After each step: what each rank waited for data, and how long the step took, in the same
    /// unit. Gives the ranks that have become slow, at the end of every tenth step. The first step
    /// is not counted: its batch was not begun before.
    pub fn step(&mut self, waits: &[f64], step: f64) -> Vec<SlowLoader> {
        if std::mem::take(&mut self.is_first) {
            return Vec::new();
        }
        for (rank, wait) in self.ranks.iter_mut().zip(waits) {
            rank.window += wait;
            rank.total += wait;
        }
        self.steps += 1;
        self.time += step;
        self.time_total += step;
        if self.steps < WINDOW_STEPS {
            return Vec::new();
        }
        let mut news = Vec::new();
        for (rank, own) in self.ranks.iter_mut().enumerate() {
            let share = share(std::mem::take(&mut own.window), self.time);
            if share >= SLOW_MIN && !own.is_slow {
                news.push(SlowLoader { rank, share });
            }
            own.is_slow = share >= if own.is_slow { SLOW_MIN / 2.0 } else { SLOW_MIN };
        }
        (self.steps, self.time) = (0, 0.0);
        news
    }

    /// The ranks that were slow over all steps together.
    pub fn slow(&self) -> Vec<SlowLoader> {
        let all = self.ranks.iter().enumerate();
        let all = all.map(|(rank, waits)| (rank, share(waits.total, self.time_total)));
        all.filter(|(_, share)| *share >= SLOW_MIN)
            .map(|(rank, share)| SlowLoader { rank, share })
            .collect()
    }
}

fn share(wait: f64, time: f64) -> f64 {
    if time > 0.0 {
        (wait / time).min(1.0)
    } else {
        0.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_slow_rank_is_named_once_within_twenty_steps() {
        let mut shares = WaitShares::new(3);
        let mut named = Vec::new();
        for step in 1..=100 {
            let news = shares.step(&[0.1, 200.0, 0.0], 240.0);
            named.extend(news.into_iter().map(|slow| (step, slow.rank)));
        }
        assert_eq!(named, [(11, 1)]);
        let slow = shares.slow();
        // Two sums of 99 steps, and their quotient.
        let tolerance = 200.0 * f64::EPSILON;
        assert!(slow.len() == 1 && (slow[0].share - 200.0 / 240.0).abs() < tolerance, "{slow:?}");
    }

    #[test]
    fn balanced_steps_the_first_one_and_single_waits_are_no_news() {
        let mut shares = WaitShares::new(2);
        assert!(shares.step(&[500.0, 500.0], 540.0).is_empty());
        for step in 0..1000 {
            let wait = if step % 10 == 3 { 60.0 } else { 0.2 };
            assert!(shares.step(&[wait, 0.2], 40.0 + wait).is_empty(), "step {step}");
        }
        assert!(shares.slow().is_empty());
    }

    #[test]
    fn who_was_slow_and_is_again_is_named_again() {
        let mut shares = WaitShares::new(1);
        let mut news = 0;
        shares.step(&[0.0], 1.0);
        for phase in [9.0, 0.0, 1.5, 9.0, 1.5, 9.0] {
            for _ in 0..10 {
                news += shares.step(&[phase], 10.0).len();
            }
        }
        assert_eq!(news, 2, "15 % is too little to become slow, and too much to be no longer");
    }
}
