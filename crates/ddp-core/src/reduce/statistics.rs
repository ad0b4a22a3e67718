//! What exchanges cost, and which rank the others wait for. Pure: times come in, verdicts go out.

use std::collections::VecDeque;
use std::time::Duration;

/// Exchanges over which ranks are compared.
const WINDOW: usize = 20;
/// How much longer than the others' median a rank must take to be called slow.
const SLOW: f64 = 1.5;
/// Differences below this are no matter, whatever their ratio.
const SLOW_BY: Duration = Duration::from_millis(2);

/// Where a rank's own time goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Phase {
    /// From the end of one exchange to the beginning of the next backward: optimizer, data, forward.
    Outside,
    /// Backward's own work.
    Backward,
}

impl std::fmt::Display for Phase {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Outside => "forward, data and optimizer",
            Self::Backward => "backward",
        })
    }
}

/// A rank's own time of one exchange, without what it waited for others.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RankTimes {
    /// From the end of the exchange before to the beginning of backward.
    pub outside: Duration,
    /// Backward's own work.
    pub backward: Duration,
}

impl RankTimes {
    fn of(self, phase: Phase) -> Duration {
        match phase {
            Phase::Outside => self.outside,
            Phase::Backward => self.backward,
        }
    }
}

/// A rank that the others wait for: its median over the last exchanges beside the others'.
#[derive(Clone, Debug, PartialEq)]
pub struct Straggler {
    /// The rank.
    pub rank: usize,
    /// Where it is slow.
    pub phase: Phase,
    /// How many times as long as the others.
    pub slowdown: f64,
    /// Its median.
    pub median: Duration,
    /// The median of the other ranks' medians.
    pub others: Duration,
}

impl std::fmt::Display for Straggler {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "rank {} is {:.1}× slower in {} (p50 {:.0} ms vs {:.0} ms)",
            self.rank,
            self.slowdown,
            self.phase,
            self.median.as_secs_f64() * 1e3,
            self.others.as_secs_f64() * 1e3,
        )
    }
}

/// What the exchanges so far cost.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Statistics {
    /// Exchanges made.
    pub exchange_count: u64,
    /// Of the last one: how long backward waited for it after its last gradient was ready.
    pub exposed_comm: Duration,
    /// Of the last one: from the first bucket's start to the end of the last.
    pub exchange: Duration,
    /// Of the last one: the share of `exchange` that was hidden behind backward; 1 where nothing was sent.
    pub overlap: f64,
    /// Of the last one: buckets.
    pub bucket_count: usize,
    /// Of the last one: bytes of gradients in them.
    pub bytes: u64,
    /// Of the last one: bytes that a rank must send for it at least, as bandwidth of collectives is counted: 2 (P−1)/P of a buffer that is reduced to
    /// all of P ranks, (P−1)/P of one that is reduced to segments, gathered from them, or whose segments change places.
    pub bytes_sent: u64,
    /// Of the last one, by rank.
    pub ranks: Vec<RankTimes>,
    /// Ranks that were slow over the last 20 exchanges.
    pub stragglers: Vec<Straggler>,
}

/// The last exchanges' times of all ranks.
#[derive(Clone, Debug, Default)]
pub(crate) struct Window {
    rows: VecDeque<Vec<RankTimes>>,
}

impl Window {
    /// Takes the times of one exchange, by rank, and says who was slow over the last ones.
    pub(crate) fn push(&mut self, ranks: Vec<RankTimes>) -> Vec<Straggler> {
        if self.rows.front().is_some_and(|row| row.len() != ranks.len()) {
            self.rows.clear();
        }
        self.rows.push_back(ranks);
        if self.rows.len() > WINDOW {
            self.rows.pop_front();
        }
        if self.rows.len() < WINDOW {
            return Vec::new();
        }
        let mut slow: Vec<Straggler> = [Phase::Outside, Phase::Backward]
            .iter()
            .flat_map(|&phase| self.slow_in(phase))
            .collect();
        slow.sort_by_key(|straggler| straggler.rank);
        slow
    }

    fn slow_in(&self, phase: Phase) -> Vec<Straggler> {
        let ranks = self.rows.front().map_or(0, Vec::len);
        let medians: Vec<Duration> = (0..ranks)
            .map(|rank| median(self.rows.iter().map(|row| row[rank].of(phase)).collect()))
            .collect();
        let slow = |rank: usize| {
            let mine = medians[rank];
            let rest = medians.iter().enumerate().filter(|&(other, _)| other != rank);
            let others = median(rest.map(|(_, &time)| time).collect());
            let slowdown = mine.as_secs_f64() / others.as_secs_f64().max(1e-9);
            (slowdown >= SLOW && mine.saturating_sub(others) >= SLOW_BY).then_some(Straggler {
                rank,
                phase,
                slowdown,
                median: mine,
                others,
            })
        };
        if ranks < 2 {
            return Vec::new();
        }
        (0..ranks).filter_map(slow).collect()
    }
}

fn median(mut times: Vec<Duration>) -> Duration {
    times.sort_unstable();
    times.get(times.len() / 2).copied().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn times(outside: u64, backward: u64) -> RankTimes {
        RankTimes {
            outside: Duration::from_millis(outside),
            backward: Duration::from_millis(backward),
        }
    }

    #[test]
    fn a_slow_rank_is_named_after_twenty_exchanges_with_its_phase() {
        let mut window = Window::default();
        for step in 1..=20 {
            let slow = window.push(vec![times(10, 21), times(11, 20), times(10, 81)]);
            assert_eq!(slow.len(), usize::from(step == 20), "step {step}");
            if let [straggler] = slow.as_slice() {
                let text = straggler.to_string();
                assert_eq!(text, "rank 2 is 3.9× slower in backward (p50 81 ms vs 21 ms)");
            }
        }
    }

    #[test]
    fn noise_and_single_steps_are_no_stragglers() {
        let mut window = Window::default();
        for step in 0..1000_u64 {
            // One rank after the other takes five times as long, once in a while.
            let of = |rank: u64| if step % 7 == rank { 100 } else { 20 + (step * 7 + rank) % 5 };
            let slow = window.push((0..4).map(|rank| times(1, of(rank))).collect());
            assert_eq!(slow, [], "step {step}");
        }
    }

    #[test]
    fn one_rank_waits_for_nobody() {
        let mut window = Window::default();
        for _ in 0..40 {
            assert_eq!(window.push(vec![times(5, 5)]), []);
        }
    }
}
