//! What the papers say of each schedule: idle time and activations, to the unit. The tests hold the schedules to it.

use super::{interleaved, Costs, ScheduleKind};

impl ScheduleKind {
    /// How long each of `rank_count` ranks is idle in a step, where transfers cost nothing; `costs` are those of a chunk.
    ///
    /// With F, B and W for forward, input and weight: GPipe and 1F1B (p − 1)(F + B + W). Interleaved as well, of chunks, which cost 1/v of a
    /// stage. ZB-H1 (p − 1)(F + B) − (min(p, m) − 1) min(F, B, W), which is the paper's (p − 1)(F + B − W) for m ≥ p and weights that take no longer than the others;
    /// the general form is our own.
    ///
    /// # Source
    ///
    /// Those of the schedules: the heads of their files.
    #[must_use]
    pub fn idle(self, rank_count: usize, micro_batch_count: usize, costs: &Costs) -> u64 {
        let ranks = wide(rank_count.saturating_sub(1));
        let round = costs.forward + costs.backward();
        match self {
            Self::GPipe | Self::OneFOneB | Self::Interleaved { .. } => ranks * round,
            Self::ZbH1 => {
                let filled = wide(rank_count.min(micro_batch_count).saturating_sub(1));
                let least = costs.forward.min(costs.backward_input).min(costs.backward_weight);
                ranks * (costs.forward + costs.backward_input) - filled * least
            }
        }
    }

    /// Of how many micro-batches in a chunk a rank keeps the activations, at most.
    ///
    /// # Source
    ///
    /// Those of the schedules: the heads of their files.
    #[must_use]
    pub fn activations_max(
        self,
        rank_count: usize,
        micro_batch_count: usize,
        rank: usize,
    ) -> usize {
        let (p, m) = (rank_count, micro_batch_count);
        match self {
            Self::GPipe => m,
            Self::OneFOneB => p.saturating_sub(rank).min(m),
            Self::Interleaved { chunks } => {
                (interleaved::ahead(p, m, chunks, rank) + 1).min(m * chunks)
            }
            Self::ZbH1 => p.min(m),
        }
    }
}

fn wide(number: usize) -> u64 {
    u64::try_from(number).unwrap_or(u64::MAX)
}
