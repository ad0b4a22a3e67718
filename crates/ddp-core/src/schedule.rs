//! Learning-rate schedules. Pure functions of the step.

/// Linear warm-up to a peak, then linear decay to zero: what BERT was trained with.
///
/// # Source
/// Devlin et al. 2019, appendix A.2; `get_linear_schedule_with_warmup` of transformers.
///
/// # Example
/// ```
/// use phalanx_ddp_core::schedule::LinearWarmup;
/// let schedule = LinearWarmup { peak: 1e-4, warmup_steps: 10, total_steps: 110 };
/// assert_eq!(schedule.lr(0), 1e-5);
/// assert_eq!(schedule.lr(9), 1e-4);
/// assert!(schedule.lr(60) < 1e-4);
/// ```
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LinearWarmup {
    /// Learning rate at the end of the warm-up.
    pub peak: f64,
    /// Steps of the warm-up; 0 starts at the peak.
    pub warmup_steps: u64,
    /// Steps after which the rate would be zero; 0 or less than the warm-up keeps it at the peak.
    pub total_steps: u64,
}

impl LinearWarmup {
    /// The rate of the optimizer step with index `step` (the first is 0 and has a rate above zero).
    #[must_use]
    #[expect(clippy::cast_precision_loss, reason = "step counts are far below 2^53")]
    pub fn lr(&self, step: u64) -> f64 {
        if step < self.warmup_steps {
            return self.peak * (step + 1) as f64 / self.warmup_steps as f64;
        }
        if self.total_steps <= self.warmup_steps {
            return self.peak;
        }
        let left = self.total_steps.saturating_sub(step) as f64;
        self.peak * left / (self.total_steps - self.warmup_steps) as f64
    }
}

#[cfg(test)]
#[expect(clippy::float_cmp, reason = "values that are exact in f64")]
mod tests {
    use super::*;

    #[test]
    fn it_rises_to_the_peak_and_falls_to_zero() {
        let schedule = LinearWarmup { peak: 2.0, warmup_steps: 4, total_steps: 12 };
        let rates: Vec<f64> = (0..13).map(|step| schedule.lr(step)).collect();
        assert_eq!(rates[..4], [0.5, 1.0, 1.5, 2.0]);
        assert_eq!(rates[4..7], [2.0, 1.75, 1.5]);
        assert_eq!(rates[11], 0.25);
        assert_eq!(rates[12], 0.0);
    }

    #[test]
    fn without_warm_up_or_end_it_is_constant() {
        let schedule = LinearWarmup { peak: 2.0, warmup_steps: 0, total_steps: 0 };
        assert_eq!(schedule.lr(0), 2.0);
        assert_eq!(schedule.lr(1_000_000), 2.0);
    }
}
