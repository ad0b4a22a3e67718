//! Our schedules are closed forms; PyTorch's schedulers step.

use phalanx_ddp_core::schedule::{Constant, Cosine, Linear, Polynomial, WarmupStableDecay};

use super::fixtures::Fixtures;

/// Linear warm-up and decay.
pub(crate) fn linear(peak: f64, warmup_steps: u64, total_steps: u64) -> impl Fn(u64) -> f64 {
    let schedule = Linear { peak, warmup_steps, total_steps };
    move |step| schedule.lr(step)
}

#[test]
fn schedules_are_those_of_pytorch() {
    let of = Fixtures::read().schedules;
    let (peak, warmup_steps, total_steps, power, decay_steps) =
        (of.peak, of.warmup_steps, of.total_steps, of.power, of.decay_steps);
    let constant = Constant { peak, warmup_steps };
    let cosine = Cosine { peak, warmup_steps, total_steps, floor: 0.0 };
    let polynomial = Polynomial { peak, warmup_steps, total_steps, power };
    let stable = WarmupStableDecay { peak, warmup_steps, total_steps, decay_steps };
    let ours: [(&str, Box<dyn Fn(u64) -> f64>); 5] = [
        ("constant", Box::new(move |step| constant.lr(step))),
        ("linear", Box::new(linear(peak, warmup_steps, total_steps))),
        ("cosine", Box::new(move |step| cosine.lr(step))),
        ("polynomial", Box::new(move |step| polynomial.lr(step))),
        ("warmup_stable_decay", Box::new(move |step| stable.lr(step))),
    ];
    assert_eq!(of.rates.len(), ours.len());
    for (name, ours) in ours {
        for (step, theirs) in of.rates[name].iter().enumerate() {
            let rate = ours(step as u64);
            // PyTorch multiplies each rate by a ratio to get the next: that rounds.
            assert!(
                (rate - theirs).abs() <= 1e-12,
                "{name}: step {step}: {rate}, and PyTorch's {theirs}"
            );
        }
    }
}
