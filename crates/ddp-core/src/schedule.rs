//! Learning-rate schedules: a linear warm-up, then a [`Shape`]. Pure functions of the step.
//!
//! With peak *p*, floor *f*, warm-up *w*, total *n* and the step's index *s*, from 0:
//!
//! | | rate |
//! |---|---|
//! | warm-up, *s* < *w* | *p* (*s* + 1) / *w* |
//! | [`Shape::Constant`] | *p* |
//! | [`Shape::Linear`] | *f* + (*p* − *f*) (*n* − *s*) / (*n* − *w*) |
//! | [`Shape::Cosine`] | *f* + (*p* − *f*) (1 + cos(π (*s* − *w*) / (*n* − *w*))) / 2 |
//! | [`Shape::Polynomial`], power *q* | *f* + (*p* − *f*) ((*n* − *s*) / (*n* − *w*))^*q* |
//! | [`Shape::WarmupStableDecay`], decay *d* | *p* while *s* < *n* − *d*, then *f* + (*p* − *f*) (1 + cos(π (*s* − *n* + *d*) / *d*)) / 2 |
//! | all but the constant one, *s* ≥ *n* | *f* |
//!
//! # Source
//!
//! `optimization.py` of transformers: `get_constant_schedule_with_warmup`, `get_linear_schedule_with_warmup`,
//! `get_cosine_schedule_with_warmup` (half a period), `get_polynomial_decay_schedule_with_warmup` and `get_wsd_schedule`
//! (decay `cosine`). After the warm-up the rates are theirs; in the warm-up those of one step later, so that the first step trains.
//! The floor is `eta_min` of PyTorch's `CosineAnnealingLR`, `lr_end` of the polynomial. Devlin et al. 2019, appendix
//! A.2, trained BERT with the linear one; Hu et al. 2024 (`MiniCPM`) is the last one's paper.

use std::f64::consts::PI;

use crate::{Error, Result};

/// What follows the warm-up; formulas at the [module](self).
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Shape {
    /// The peak for ever.
    Constant,
    /// A straight line to the floor at the last step.
    Linear,
    /// Half a cosine: slow at first and at the end.
    Cosine,
    /// A power of what is left; 1 is the straight line.
    Polynomial {
        /// The power.
        power: f64,
    },
    /// The peak, and half a cosine to the floor in the last steps: how many there are in all need not be known
    /// until the decay begins.
    WarmupStableDecay {
        /// The steps of the decay.
        decay_steps: u64,
    },
}

/// A learning rate for every step.
///
/// # Example
///
/// ```
/// use phalanx_ddp_core::schedule::{Schedule, Shape};
///
/// let schedule = Schedule::new(Shape::Linear, 1e-4, 110)?.with_warmup(10)?;
/// assert_eq!(schedule.lr(0), 1e-5);
/// assert_eq!(schedule.lr(9), 1e-4);
/// assert!(schedule.lr(60) < 1e-4);
/// assert_eq!(schedule.lr(110), 0.0);
/// # Ok::<(), phalanx_ddp_core::Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Schedule {
    shape: Shape,
    peak: f64,
    floor: f64,
    warmup_steps: u64,
    total_steps: u64,
}

impl Schedule {
    /// A schedule with the highest rate `peak`, no warm-up and the floor 0, of `total_steps` steps, which
    /// [`Shape::Constant`] does not heed.
    ///
    /// # Errors
    ///
    /// [`Error::BadSetting`]: a rate or a power that is negative or no number, a decay that is longer than
    /// everything.
    pub fn new(shape: Shape, peak: f64, total_steps: u64) -> Result<Self> {
        Self { shape, peak, floor: 0.0, warmup_steps: 0, total_steps }.checked()
    }

    /// With a warm-up of so many steps, the last of which has the peak.
    ///
    /// # Errors
    ///
    /// [`Error::BadSetting`]: warm-up and decay together are longer than everything.
    pub fn with_warmup(self, warmup_steps: u64) -> Result<Self> {
        Self { warmup_steps, ..self }.checked()
    }

    /// With another lowest rate.
    ///
    /// # Errors
    ///
    /// [`Error::BadSetting`]: it is negative, no number, or above the peak.
    pub fn with_floor(self, floor: f64) -> Result<Self> {
        Self { floor, ..self }.checked()
    }

    fn checked(self) -> Result<Self> {
        let Self { shape, peak, floor, warmup_steps, total_steps } = self;
        let bad =
            |setting, value: String, expected| Err(Error::BadSetting { setting, value, expected });
        if !(peak >= 0.0 && peak.is_finite()) {
            return bad("the schedule's peak", peak.to_string(), "a rate of 0 or more");
        }
        if !(floor >= 0.0 && floor <= peak) {
            return bad("the schedule's floor", floor.to_string(), "a rate from 0 to the peak");
        }
        let decay_steps = match shape {
            Shape::Constant => return Ok(self),
            Shape::Polynomial { power } if !(power >= 0.0 && power.is_finite()) => {
                return bad("the schedule's power", power.to_string(), "a number of 0 or more");
            }
            Shape::WarmupStableDecay { decay_steps } => decay_steps,
            Shape::Linear | Shape::Cosine | Shape::Polynomial { .. } => 0,
        };
        if warmup_steps > total_steps {
            let value = format!("{warmup_steps} steps of {total_steps}");
            return bad("the schedule's warm-up", value, "at most all steps");
        }
        if decay_steps > total_steps - warmup_steps {
            let value =
                format!("{decay_steps} steps of {total_steps} after {warmup_steps} of warm-up");
            return bad("the schedule's decay", value, "at most the steps after the warm-up");
        }
        Ok(self)
    }

    /// The rate of the optimizer step with index `step`: the first is 0. A function of its arguments alone, so that a run that
    /// goes on from a checkpoint has the rates that it would have had.
    #[must_use]
    pub fn lr(&self, step: u64) -> f64 {
        let Self { shape, peak, floor, warmup_steps, total_steps } = *self;
        if step < warmup_steps {
            return peak * number(step + 1) / number(warmup_steps);
        }
        let span = match shape {
            Shape::Constant => return peak,
            Shape::WarmupStableDecay { decay_steps } if step < total_steps - decay_steps => {
                return peak;
            }
            Shape::WarmupStableDecay { decay_steps } => decay_steps,
            Shape::Linear | Shape::Cosine | Shape::Polynomial { .. } => total_steps - warmup_steps,
        };
        let left = total_steps.saturating_sub(step);
        if left == 0 {
            return floor;
        }
        let (height, left, span) = (peak - floor, number(left), number(span));
        floor
            + match shape {
                Shape::Polynomial { power } => height * (left / span).powf(power),
                Shape::Cosine | Shape::WarmupStableDecay { .. } => {
                    height * (0.5 * (1.0 + (PI * (span - left) / span).cos()))
                }
                Shape::Constant | Shape::Linear => height * left / span,
            }
    }
}

#[expect(clippy::cast_precision_loss, reason = "step counts are far below 2^53")]
fn number(steps: u64) -> f64 {
    steps as f64
}

#[cfg(test)]
#[expect(clippy::float_cmp, reason = "values that are exact in f64")]
mod tests {
    use super::*;

    const SHAPES: [Shape; 6] = [
        Shape::Constant,
        Shape::Linear,
        Shape::Cosine,
        Shape::Polynomial { power: 1.0 },
        Shape::Polynomial { power: 2.0 },
        Shape::WarmupStableDecay { decay_steps: 4 },
    ];

    /// Peak 2, four steps of warm-up, twelve in all.
    fn schedule(shape: Shape, floor: f64) -> Schedule {
        let bare = Schedule::new(shape, 2.0, 12).unwrap();
        bare.with_warmup(4).unwrap().with_floor(floor).unwrap()
    }

    fn near(actual: f64, expected: f64) {
        assert!((actual - expected).abs() <= 4.0 * f64::EPSILON, "{actual} is not {expected}");
    }

    #[test]
    fn every_shape_rises_to_the_peak_alike() {
        for shape in SHAPES {
            for floor in [0.0, 0.5] {
                let rates: Vec<f64> = (0..5).map(|step| schedule(shape, floor).lr(step)).collect();
                assert_eq!(rates, [0.5, 1.0, 1.5, 2.0, 2.0], "{shape:?}");
            }
        }
    }

    #[test]
    fn every_shape_but_the_constant_one_ends_at_the_floor_and_stays() {
        for shape in SHAPES {
            for floor in [0.0, 0.5] {
                let end = if shape == Shape::Constant { 2.0 } else { floor };
                for step in [12, 13, 1_000_000, u64::MAX] {
                    assert_eq!(schedule(shape, floor).lr(step), end, "{shape:?} at {step}");
                }
            }
        }
    }

    #[test]
    fn every_shape_falls_and_keeps_to_its_bounds() {
        for shape in SHAPES {
            let rates: Vec<f64> = (4..14).map(|step| schedule(shape, 0.25).lr(step)).collect();
            assert!(rates.is_sorted_by(|left, right| left >= right), "{shape:?}: {rates:?}");
            assert!(rates.iter().all(|rate| (0.25..=2.0).contains(rate)), "{shape:?}: {rates:?}");
        }
    }

    #[test]
    fn the_linear_one_has_the_values_of_its_formula() {
        let rates: Vec<f64> = (4..13).map(|step| schedule(Shape::Linear, 0.0).lr(step)).collect();
        assert_eq!(rates, [2.0, 1.75, 1.5, 1.25, 1.0, 0.75, 0.5, 0.25, 0.0]);
        assert_eq!(schedule(Shape::Linear, 1.0).lr(8), 1.5);
        assert_eq!(schedule(Shape::Linear, 1.0).lr(11), 1.125);
    }

    #[test]
    fn the_cosine_one_has_the_values_of_its_formula() {
        let cosine = schedule(Shape::Cosine, 0.0);
        near(cosine.lr(6), 1.0 + 0.5_f64.sqrt());
        near(cosine.lr(8), 1.0);
        near(cosine.lr(10), 1.0 - 0.5_f64.sqrt());
        near(cosine.lr(11), 1.0 - (PI / 8.0).cos());
        near(schedule(Shape::Cosine, 1.0).lr(8), 1.5);
    }

    #[test]
    fn the_polynomial_has_the_values_of_its_formula() {
        let square = schedule(Shape::Polynomial { power: 2.0 }, 0.0);
        assert_eq!([6, 8, 10, 11].map(|step| square.lr(step)), [1.125, 0.5, 0.125, 0.03125]);
        assert_eq!(schedule(Shape::Polynomial { power: 2.0 }, 1.0).lr(8), 1.25);
        for step in 0..14 {
            let line = schedule(Shape::Polynomial { power: 1.0 }, 0.0).lr(step);
            assert_eq!(line, schedule(Shape::Linear, 0.0).lr(step));
            let flat = schedule(Shape::Polynomial { power: 0.0 }, 0.0).lr(step.clamp(4, 11));
            assert_eq!(flat, 2.0);
        }
    }

    #[test]
    fn warm_up_stable_decay_stays_until_the_decay_begins() {
        let schedule = schedule(Shape::WarmupStableDecay { decay_steps: 4 }, 0.0);
        assert!((4..=8).all(|step| schedule.lr(step) == 2.0));
        near(schedule.lr(9), 1.0 + 0.5_f64.sqrt());
        near(schedule.lr(10), 1.0);
        near(schedule.lr(11), 1.0 - 0.5_f64.sqrt());
        let cut = Schedule::new(Shape::WarmupStableDecay { decay_steps: 0 }, 2.0, 12).unwrap();
        assert_eq!((cut.lr(11), cut.lr(12)), (2.0, 0.0));
    }

    #[test]
    fn a_run_of_warm_up_alone_is_one() {
        let alone = Schedule::new(Shape::Linear, 2.0, 4).unwrap().with_warmup(4).unwrap();
        assert_eq!([0, 3, 4].map(|step| alone.lr(step)), [0.5, 2.0, 0.0]);
        let nothing = Schedule::new(Shape::Cosine, 2.0, 0).unwrap();
        assert_eq!(nothing.lr(0), 0.0);
        // A constant one has no end that a warm-up could be too long for.
        let constant = Schedule::new(Shape::Constant, 2.0, 0).unwrap().with_warmup(8).unwrap();
        assert_eq!([0, 7, 8].map(|step| constant.lr(step)), [0.25, 2.0, 2.0]);
    }

    #[test]
    fn settings_out_of_range_are_errors_that_name_them() {
        let says = |made: Result<Schedule>, parts: &[&str]| {
            let text = made.unwrap_err().to_string();
            assert!(parts.iter().all(|part| text.contains(part)), "{text}");
        };
        for peak in [f64::NAN, -1.0, f64::INFINITY] {
            says(Schedule::new(Shape::Linear, peak, 10), &["peak", &peak.to_string()]);
        }
        let ten = || Schedule::new(Shape::Linear, 1.0, 10).unwrap();
        for floor in [f64::NAN, -1.0, 1.5] {
            says(ten().with_floor(floor), &["floor", &floor.to_string()]);
        }
        says(ten().with_warmup(11), &["warm-up is 11 steps of 10"]);
        for power in [f64::NAN, -1.0, f64::INFINITY] {
            says(Schedule::new(Shape::Polynomial { power }, 1.0, 10), &["power", "0 or more"]);
        }
        let decay = |decay_steps| Shape::WarmupStableDecay { decay_steps };
        says(Schedule::new(decay(11), 1.0, 10), &["decay is 11 steps of 10"]);
        let both = Schedule::new(decay(8), 1.0, 10).unwrap().with_warmup(3);
        says(both, &["decay is 8 steps of 10 after 3"]);
    }
}
